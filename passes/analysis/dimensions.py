"""Sizes as expressions of the sizes of a graph's inputs: each dimension is followed from op to op.

A graph that was captured with fixed sizes contains only numbers. Here each dimension of an input that is not a weight
gets a symbol, and a dimension of any other tensor is a product of factors, which are expressions of the symbols.
Dimensions that an op requires to be equal get one symbol. A dimension that cannot be followed keeps the captured
number, so that at the captured sizes every expression has the captured value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import getitem
from typing import Any

import sympy
from torch import SymInt, Tensor, fx

from dit_rewrite.passes.analysis.dimension_algebra import Dimension, Shape, Sizes, constant, product, size_of
from dit_rewrite.passes.analysis.dimension_rules import RULES, SPLITS, attention, pieces, pointwise
from dit_rewrite.passes.analysis.graph import packet
from dit_rewrite.passes.capture import opaque_attention


class Dimensions(Sizes):
    """The shapes of all tensors of a graph."""

    def __init__(self, graph: fx.Graph, fixed: Iterable[int]) -> None:
        """`fixed` are the positions of inputs with fixed sizes: weights and attributes of the model. The other tensors
        among the inputs are in ``inputs``."""
        super().__init__()
        weights = set(fixed)
        self.inputs: list[fx.Node] = []
        for i, node in enumerate(graph.find_nodes(op="placeholder")):
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                sizes = self.numbers(value)
                self.shapes[node] = tuple(map(constant, sizes)) if i in weights else self.input(node, sizes)
                self.inputs += [] if i in weights else [node]
        for node in graph.nodes:
            if node.op in ("call_function", "get_attr"):
                self._visit(node)

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """Return the sizes of a tensor as expressions."""
        value = node.meta["val"]
        found: Shape = self.shapes[node]
        return tuple(self._checked(dimension, size) for dimension, size in zip(found, value.shape, strict=True))

    @property
    def all(self) -> Iterator[Dimension]:
        """Every dimension of every tensor."""
        return (dimension for shape in self.shapes.values() if isinstance(shape, tuple) for dimension in shape)

    def _checked(self, dimension: Dimension, size: int | SymInt) -> sympy.Expr:
        """Return the size of a dimension, or the captured one if the expression has another value there."""
        expression, captured = self.resolved(product(dimension)), self.number(size)
        return expression if self.at_capture(expression) == captured else product(self.plain(captured))

    def _visit(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = self.numbers(value)
            found = self._rule(node, sizes)
            fits = found is not None and [*map(size_of, found)] == sizes
            self.shapes[node] = found if fits else tuple(map(self.plain, sizes))
        elif isinstance(value, tuple | list):
            self.shapes[node] = self._several(node, value)

    def _rule(self, node: fx.Node, sizes: list[int]) -> Shape | None:
        if node.op == "get_attr":
            return tuple(map(constant, sizes))
        if node.target is getitem:
            several: Any = self.shapes.get(node.args[0])  # type: ignore[arg-type]
            found: Shape | None = None if several is None else several[node.args[1]]
            return found
        rule = attention if node.target is opaque_attention.OP else RULES.get(packet(node), pointwise)
        return rule(self, node, sizes)

    def _several(self, node: fx.Node, values: Sequence[Any]) -> list[Shape | None]:
        """Return the shapes of the results of an op with several: pieces of a tensor, or a norm and its statistics."""
        if packet(node) in SPLITS:
            return list(pieces(self, node, [self.numbers(value) for value in values]))
        return [self._leading(node, value) if isinstance(value, Tensor) else None for value in values]

    def _leading(self, node: fx.Node, value: Tensor) -> Shape:
        """Return a shape with the dimensions of the first operand, as far as they have the sizes of `value`."""
        shape = self.of(node.args[0])
        sizes = self.numbers(value)
        found = [shape[i] if i < len(shape) and size_of(shape[i]) == n else None for i, n in enumerate(sizes)]
        return tuple(self.plain(n) if d is None else d for d, n in zip(found, sizes, strict=True))
