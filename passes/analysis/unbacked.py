"""Data-dependent sizes (a mask selects tokens, a router counts them) as inputs of straight-line graphs.

In the trace, such a size is an unbacked symbol, which one op defines, or a sum of such symbols. A graph that takes a
tensor of that size from a slot or from another segment may not contain this op, and a sum cannot be read off a tensor.
Such a graph therefore gets new symbols, each of which is bound by an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis.graph import aten, packet
from dit_rewrite.torch_compat import FakeTensorMode, tree_leaves

_ONE = sympy.S.One
_SIZES = {aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset}


def is_unbacked(value: Any) -> bool:
    """Return whether `value` is, or has, a data-dependent size."""
    return bool(torch_compat.unbacked_symbols(value))


def asserted_tensors(node: fx.Node, operands: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node] | None:
    """Return the tensors whose sizes `node` asserts something about, or None if it does anything else.

    `operands` returns the nodes that a node reads. An assertion about an element of a tensor reads the tensor itself.
    """
    if packet(node) is not aten._assert_scalar:
        return None
    tensors: set[fx.Node] = set()
    stack = [*operands(node)]
    while stack:
        read = stack.pop()
        if packet(read) in _SIZES:
            tensors.update(operand for operand in operands(read) if isinstance(operand.meta["val"], Tensor))
        elif isinstance(read.meta.get("val"), Tensor):
            return None
        else:
            stack.extend(operands(read))
    return tensors


def size_assertions(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the assertions about sizes. A reusing step drops those about tensors that it does not compute."""
    return frozenset(node for node in graph.nodes if asserted_tensors(node, _inputs) is not None)


def _inputs(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def moving_sizes(graph: fx.Graph, invariant: Iterable[int]) -> frozenset[sympy.Symbol]:
    """Return the symbols of sizes that may differ from call to call.

    These depend on random numbers, or on inputs that are not at the positions `invariant`.
    """
    placeholders, fixed = graph.find_nodes(op="placeholder"), frozenset(invariant)
    moving = {node for i, node in enumerate(placeholders) if i not in fixed and isinstance(node.meta["val"], Tensor)}
    found: set[sympy.Symbol] = set()
    for node in graph.nodes:
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if drawn or any(argument in moving for argument in node.all_input_nodes):
            moving.add(node)
            fresh = _symbols(node).difference(*map(_symbols, node.all_input_nodes))
            found |= set() if _is_sized_by_others(node, moving, found) else fresh
    return frozenset(found)


def _is_sized_by_others(node: fx.Node, moving: set[fx.Node], sizes: set[sympy.Symbol]) -> bool:
    """Return whether new sizes of a value follow from operands that do not move, though its elements do.

    `index` selects as many elements as its masks do; a slice has the size that its bounds and its operand's shape give.
    """
    if packet(node) is aten.index:
        return not any(mask in moving for mask in node.args[1] if isinstance(mask, fx.Node))  # type: ignore[union-attr]
    if packet(node) is not aten.slice or any(_symbols(operand) & sizes for operand in node.all_input_nodes):
        return False
    bounds = (operand.meta["val"] for operand in node.all_input_nodes[1:])
    return all(isinstance(b, SymInt) and b.node.expr.free_symbols == torch_compat.unbacked_symbols(b) for b in bounds)


def _symbols(node: fx.Node) -> frozenset[sympy.Symbol]:
    values = tree_leaves(node.meta.get("val"))
    return frozenset[sympy.Symbol]().union(*map(torch_compat.unbacked_symbols, values))


def is_contiguous(value: Tensor) -> bool:
    """Return whether `value` is contiguous. `Tensor.is_contiguous` raises for a data-dependent size."""
    return memory_order(value) == list(range(value.ndim)) if is_unbacked(value) else value.is_contiguous()


def is_dense(value: Tensor) -> bool:
    """Return whether `value` has no gaps and no overlaps in memory, with its dimensions in any order."""
    if is_unbacked(value):
        return memory_order(value) is not None
    return bool(torch.ops.aten.is_non_overlapping_and_dense(value))


def memory_order(value: Tensor) -> list[int] | None:
    """Return the dimensions of a dense tensor in memory order, outermost first, or None if it has gaps or overlaps.

    Substitutes distinct primes for the symbols and compares the resulting sizes and strides.
    """
    symbols = {symbol for size in (*value.shape, *value.stride()) for symbol in _expression(size).free_symbols}
    tried = {symbol: sympy.prime(25 + i) for i, symbol in enumerate(sorted(symbols, key=str))}
    shape, strides = ([int(_expression(s).subs(tried)) for s in sizes] for sizes in (value.shape, value.stride()))
    expected, order = 1, list[int]()
    for dim in sorted(range(value.ndim), key=lambda dim: (strides[dim], shape[dim])):
        if strides[dim] != expected and shape[dim] != 1:
            return None
        expected *= shape[dim]
        order.insert(0, dim)
    return order


def bind_inputs(gm: fx.GraphModule, fake_mode: FakeTensorMode | None) -> None:
    """Replace the data-dependent sizes of a graph's inputs by new symbols that the inputs bind."""
    found = [node for node in gm.graph.find_nodes(op="placeholder") if is_unbacked(node.meta.get("val"))]
    if fake_mode is None or not found:
        return
    sizes = _Sizes(size for node in found for size in _sizes(node.meta["val"]))
    for node in found:
        node.meta = {**node.meta, "val": sizes.rebound(node.meta["val"], fake_mode)}


def _sizes(value: SymInt | Tensor) -> tuple[int | SymInt, ...]:
    """Return the sizes that describe an input. The strides of a dense tensor follow from its shape and memory order."""
    if not isinstance(value, Tensor):
        return (value,)
    return tuple(value.shape) if memory_order(value) is not None else (*value.shape, *value.stride())


class _Sizes:
    """Maps the expressions of old sizes to new sizes.

    A size that is an integer combination of others gets no symbol of its own, so that equal sizes, for example of
    tokens and of their mask, stay equal.
    """

    def __init__(self, sizes: Iterable[int | SymInt]) -> None:
        old: dict[sympy.Expr, SymInt] = {_expression(s): s for s in sizes if isinstance(s, SymInt) and is_unbacked(s)}
        self.basis: list[sympy.Expr] = []
        self.new: dict[sympy.Expr, int | SymInt] = {}

        def simplicity(expression: sympy.Expr) -> tuple[Any, ...]:
            negative = bool(torch_compat.value_bounds(old[expression])[0] < 0)  # the index of a slice from the end
            return negative, len(expression.free_symbols), sum(map(abs, _terms(expression).values())), str(expression)

        for expression in sorted(old, key=simplicity):
            combined = self._combined(expression) if self.basis else None
            self.new[expression] = self._fresh(old[expression]) if combined is None else combined

    def _fresh(self, old: SymInt) -> SymInt:
        self.basis.append(_expression(old))
        return torch_compat.unbacked_input(old)

    def _combined(self, expression: sympy.Expr) -> int | SymInt | None:
        """Return `expression` as an integer combination of the new sizes so far, or None."""
        terms, columns = _terms(expression), [_terms(base) for base in self.basis]
        rows = sorted({term for part in (terms, *columns) for term in part} - {_ONE}, key=str)
        matrix = sympy.Matrix(len(rows), len(columns), lambda i, j: columns[j].get(rows[i], 0))
        try:
            solution, free = matrix.gauss_jordan_solve(sympy.Matrix([terms.get(row, 0) for row in rows]))
        except ValueError:
            return None
        factors = list(solution.subs(dict.fromkeys(free, 0)))
        if not all(factor.is_integer for factor in factors):
            return None
        constant = terms.get(_ONE, 0) - sum(f * c.get(_ONE, 0) for f, c in zip(factors, columns, strict=True))
        parts = (int(f) * self.new[base] for f, base in zip(factors, self.basis, strict=True) if f != 0)
        return sum(parts, int(constant))

    def rebound(self, value: SymInt | Tensor, fake_mode: FakeTensorMode) -> int | SymInt | Tensor:
        """Return `value` with its new sizes."""
        if not isinstance(value, Tensor):
            return self._of(value)
        shape, order = [self._of(size) for size in value.shape], memory_order(value)
        with fake_mode:
            if order is not None:
                return torch.empty_permuted(shape, order, dtype=value.dtype, device=value.device)
            strides = [self._of(stride) for stride in value.stride()]
            return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    def _of(self, old: int | SymInt) -> int | SymInt:
        return self.new[_expression(old)] if is_unbacked(old) else old


def _expression(size: int | SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def _terms(expression: sympy.Expr) -> dict[sympy.Expr, Any]:
    """Return the terms of a sum with their coefficients."""
    return dict(sympy.expand(expression).as_coefficients_dict())
