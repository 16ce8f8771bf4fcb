"""Pass 04: partial evaluation of a guarded graph by one row of decisions: a straight-line variant.

A reused site becomes graph inputs, a computed one is put back in its place and its values become extra outputs.
Whatever only fed a reused value is not reached from the outputs any more, and is gone. The same makes the variant of
one segment: what another segment computes is an input, and the outputs are what others read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.passes.analysis.graph import aten, attribute
from dit_rewrite.passes.analysis.unbacked import is_contiguous
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.segments import Segments

Row = tuple[bool, ...]  # for each guarded site: True = reused (or inside a reused one)


@dataclass(frozen=True)
class Variant:
    """A straight-line graph for one row of decisions, and how to call it.

    Its inputs are the wires ``inputs``, then what the slots hold, ``cached``; its outputs the wires ``outputs``, then
    the fresh contents of slots, ``fresh``. A wire is a node's position in the captured graph, so that its first wires
    are its inputs; slots are (site, index) pairs.
    """

    gm: fx.GraphModule
    row: Row
    inputs: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    fresh: tuple[tuple[int, int], ...]


def normalise(row: Sequence[bool], parents: Sequence[int | None]) -> Row:
    """The row with every site inside a reused one counted as reused: it is neither computed nor stored."""
    result: list[bool] = list(row)
    for i in range(len(row)):
        around = parents[i]
        while around is not None and not result[i]:
            result[i] = row[around]
            around = parents[around]
    return tuple(result)


def specialise(
    guarded: GuardedGraph,
    row: Sequence[bool],
    segments: Segments,
    segment: int = 0,
    store: Sequence[bool] | None = None,
    dense: bool = True,
) -> Variant:
    """The variant of one of the guarded graph's segments for a row of decisions.

    `store` says for each site whether its fresh values are returned, by default all that were computed. `dense`: what
    goes from one segment to another is laid out anew, without gaps; ops that run as they are would round otherwise.
    """
    piece = _Piece(guarded, _Flat(guarded, normalise(row, guarded.parents)), segments.of, segment, dense=dense)
    return piece.variant(segments.exports[segment], store)


class _Flat:
    """The nodes of a guarded graph with the calls of computed sites inlined and those of reused sites resolved."""

    def __init__(self, guarded: GuardedGraph, row: Row) -> None:
        self.meaning: dict[
            fx.Node, Any
        ] = {}  # a placeholder of a subgraph, or a result of a call, to what it stands for
        self.home: dict[fx.Node, fx.GraphModule] = {}
        inputs = guarded.gm.graph.find_nodes(op="placeholder")[guarded.num_inputs :]
        self.meaning.update(zip(inputs, row, strict=False))
        self.results: dict[fx.Node, list[Any]] = {}
        self.at: dict[int, Any] = {}  # what stands at each position of the captured graph
        self.row = row
        self._walk(guarded.gm)
        self.outputs = [self.resolve(a) for a in guarded.gm.graph.output_node().args[0]]  # type: ignore[union-attr]

    def resolve(self, argument: Any) -> Any:
        """What an argument stands for: a node that stays, or a decision."""
        while isinstance(argument, fx.Node):
            if argument.target is getitem and argument.args[0] in self.results:
                argument = self.results[argument.args[0]][argument.args[1]]  # type: ignore[index]
            elif argument in self.meaning:
                argument = self.meaning[argument]
            else:
                break
        return argument

    def _walk(self, gm: fx.GraphModule) -> list[Any]:
        for node in gm.graph.nodes:
            if node.target is cache_or_compute:
                self.results[node] = self._call(gm, node)
                self.at.update(zip(node.meta["values"], self.results[node], strict=False))
            elif node.op in ("call_function", "get_attr", "placeholder"):
                self.home[node] = gm
                if node.op != "placeholder" and "position" in node.meta and "home" not in node.meta:
                    self.at.setdefault(node.meta["position"], node)
        return [self.resolve(a) for a in gm.graph.output_node().args[0]]  # type: ignore[union-attr]

    def _call(self, gm: fx.GraphModule, node: fx.Node) -> list[Any]:
        reuse, cached, compute, live_ins = node.args
        instead: Any = node.kwargs.get("instead")
        if self.resolve(reuse) and instead is None:
            return [self.resolve(value) for value in cached]  # type: ignore[union-attr]
        body = attribute(gm, instead if self.resolve(reuse) else compute)  # type: ignore[arg-type]
        placeholders = body.graph.find_nodes(op="placeholder")
        self.meaning.update((p, self.resolve(a)) for p, a in zip(placeholders, live_ins, strict=True))  # type: ignore[arg-type]
        return self._walk(body)


class _Piece:
    """One segment of a flattened graph."""

    def __init__(
        self,
        guarded: GuardedGraph,
        flat: _Flat,
        of: Sequence[int | None],
        segment: int,
        dense: bool = True,
    ) -> None:
        self.guarded, self.flat, self.of, self.segment = guarded, flat, of, segment
        self.dense = dense
        self.placeholders = guarded.gm.graph.find_nodes(op="placeholder")
        self.number = {node: i for i, node in enumerate(self.placeholders)}
        results = self.flat.outputs[: guarded.num_outputs]
        self.returned = {self._wire(n) for n in results if isinstance(n, fx.Node) and n.op == "call_function"}

    def variant(self, exports: Sequence[int], store: Sequence[bool] | None) -> Variant:
        wires = tuple(p for p in exports if isinstance(self.flat.at.get(p), fx.Node))
        fresh = self._fresh(store)
        outputs = (*(self.flat.at[p] for p in wires), *fresh.values())
        dense = [i for i, p in enumerate(wires) if self._is_dense(p)]
        gm, inputs, cached = self._straighten(outputs, frozenset(dense))
        return Variant(gm, self.flat.row, inputs, cached, wires, tuple(fresh))

    def _fresh(self, store: Sequence[bool] | None) -> dict[tuple[int, int], fx.Node]:
        """The slots that this segment fills."""
        pairs = [(i, k) for i, count in enumerate(self.guarded.widths) for k in range(count)]
        held = zip(pairs, self.flat.outputs[self.guarded.num_outputs :], strict=True)
        stored = [not reused and (store is None or store[i]) for i, reused in enumerate(self.flat.row)]
        return {pair: node for pair, node in held if stored[pair[0]] and self._is_own(node)}

    def _is_dense(self, wire: int) -> bool:
        """Whether a wire is laid out anew where it goes to another segment; what the call returns is not."""
        return self.dense and wire not in self.returned

    def _is_own(self, node: fx.Node) -> bool:
        return self.of[self._wire(node)] == self.segment if node.op == "call_function" else False

    @staticmethod
    def _wire(node: fx.Node) -> int:
        """The position in the captured graph that a node stands for, or stands beside."""
        return int(node.meta.get("home", node.meta["position"]))

    def _is_input(self, node: fx.Node) -> bool:
        """Whether a node comes from outside: an input, a slot, or what another segment computes."""
        if node.op == "call_function":
            return self.of[self._wire(node)] not in (self.segment, None)
        return node.op == "placeholder"

    def _straighten(
        self, outputs: tuple[fx.Node, ...], dense: frozenset[int]
    ) -> tuple[fx.GraphModule, tuple[int, ...], tuple[tuple[int, int], ...]]:
        """One graph of what the outputs need, in the captured graph's order; the wires and slots that it takes.

        The outputs at `dense` go to other segments.

        The order matters: Inductor's choices follow it, and reuse 0 must make those of the untouched graph.
        """
        needed = self._reached(outputs)
        sizes = [n for n in self.placeholders[: self.guarded.num_inputs] if not hasattr(n.meta.get("val"), "dtype")]
        known = sorted({*sizes, *filter(self.number.__contains__, needed)}, key=self.number.__getitem__)
        first = [node for node in known if self.number[node] < self.guarded.num_inputs]
        handed = sorted((n for n in needed if n not in self.number and self._is_input(n)), key=self._wire)
        slots = known[len(first) :]
        graph = fx.Graph()
        env = {node: graph.node_copy(node) for node in first}
        env.update({node: _placeholder(graph, node, self._is_dense(self._wire(node))) for node in handed})
        env.update({node: _placeholder(graph, node) for node in slots})
        attributes: dict[str, Any] = {}
        for node in sorted((n for n in needed if n not in env), key=lambda n: n.meta["position"]):
            env[node] = graph.node_copy(node, lambda n: env[self.flat.resolve(n)])
            if node.op == "get_attr":
                attributes[str(node.target)] = attribute(self.flat.home[node], node)
        results = enumerate(env[node] for node in outputs)
        graph.output(tuple(_dense(graph, result) if i in dense else result for i, result in results))
        inputs = (*(self.number[node] for node in first), *map(self._wire, handed))
        return fx.GraphModule(attributes, graph), inputs, tuple(map(self._slot, slots))

    def _slot(self, node: fx.Node) -> tuple[int, int]:
        """The site and index of a slot's placeholder."""
        index = self.number[node] - self.guarded.num_inputs - len(self.guarded.sites)
        for i, count in enumerate(self.guarded.taken):
            if index < count:
                return i, index
            index -= count
        raise AssertionError(node)

    def _reached(self, outputs: tuple[fx.Node, ...]) -> set[fx.Node]:
        """The nodes that the outputs, and nodes that run for their effect, are computed from; themselves too."""
        acting = (node for node in self.flat.home if node in self.guarded.acting)
        reached: set[fx.Node] = set()
        stack = [*outputs, *filter(self._is_own, acting)]
        while stack:
            node = stack.pop()
            if node not in reached:
                reached.add(node)
                stack.extend(() if self._is_input(node) else self._operands(node))
        return reached

    def _operands(self, node: fx.Node) -> Iterator[fx.Node]:
        for argument in node.all_input_nodes:
            meaning = self.flat.resolve(argument)
            if isinstance(meaning, fx.Node):
                yield meaning


def _placeholder(graph: fx.Graph, node: fx.Node, dense: bool = False) -> fx.Node:
    """An input in the place of a node that is computed elsewhere, or held."""
    placeholder = graph.placeholder(node.name)
    placeholder.target = placeholder.name
    placeholder.meta = {**node.meta, "val": _without_gaps(node.meta["val"])} if dense else dict(node.meta)
    return placeholder


def _dense(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A value as it goes from one segment to another: without gaps, in the order of its dimensions.

    The strides of the trace may be those of an embedding's transposed output, and would bind a piece's outputs; the
    compiler of the whole graph does not keep to them.
    """
    value = node.meta["val"]
    dense = _without_gaps(value)
    if dense is value:
        return node
    clone = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    clone.meta = {"val": dense}
    return clone


def _without_gaps(value: Any) -> Any:
    if not isinstance(value, Tensor) or is_contiguous(value):
        return value
    return torch.empty_like(value, memory_format=torch.contiguous_format)
