"""Specialise a guarded graph for one row of decisions: partial evaluation to a straight-line variant.

The values of a reused site become graph inputs. A computed site is inlined, and its values become additional outputs.
Nodes that only a reused value depends on are no longer reachable from the outputs and are dropped. A variant of one
segment takes the values of other segments as inputs and returns the values that other segments read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.passes.analysis.graph import aten, attribute, is_view, returns_view
from dit_rewrite.passes.analysis.unbacked import asserted_tensors, is_contiguous
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.half_batch import half_of
from dit_rewrite.passes.rewrite.segments import Segments
from dit_rewrite.passes.rewrite.step_tables import StepTables


@dataclass(frozen=True)
class Variant:
    """A straight-line graph for one row of decisions, with its calling convention.

    Inputs: the wires ``inputs``, the slot tensors ``cached``, the values of the step table in ``columns``. Outputs: the
    wires ``outputs``, then the new slot tensors ``fresh``. A wire is the position of a node in the captured graph, so
    the first wires are its inputs. A slot tensor is a (site, index) pair.
    """

    gm: fx.GraphModule
    row: DecisionRow
    inputs: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    fresh: tuple[tuple[int, int], ...]
    columns: tuple[str, ...] = ()


def normalise(row: Sequence[bool], parents: Sequence[int | None]) -> DecisionRow:
    """Return the row with each site inside a reused site marked as reused: it is neither computed nor stored."""
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
    stored: Sequence[bool] | None = None,
    dense: bool = True,
    tables: StepTables | None = None,
) -> Variant:
    """Return the variant of a segment of the guarded graph for a row of decisions.

    `stored`: for each site, whether its new slot tensors are returned; by default those of all computed sites. With
    `dense`, values that cross a cut are made contiguous. Pass False if the variant is not compiled, because an eager op
    may round differently for another memory layout. `tables`: the step table, which the variant reads if
    `StepTables.reads` says so.
    """
    flat = _Flat(guarded, normalise(row, guarded.parents))
    table = None if tables is None or not tables.reads(flat.row) else tables
    return _Segment(guarded, flat, segments.of, segment, dense, table).variant(segments.exports[segment], stored)


class _Flat:
    """The nodes of a guarded graph, with computed sites inlined and reused sites replaced by their slot inputs.

    ``meaning`` maps a placeholder of a subgraph, or a decision, to its argument. ``results`` has the results of each
    cache_or_compute node. ``at`` maps a position of the captured graph to the node with its value. ``home`` maps each
    node to its graph module.
    """

    def __init__(self, guarded: GuardedGraph, row: DecisionRow) -> None:
        self.meaning: dict[fx.Node, Any] = {}
        self.home: dict[fx.Node, fx.GraphModule] = {}
        inputs = guarded.gm.graph.find_nodes(op="placeholder")[guarded.num_inputs :]
        self.meaning.update(zip(inputs, row, strict=False))
        self.results: dict[fx.Node, list[Any]] = {}
        self.at: dict[int, Any] = {}
        self.row = row
        self._walk(guarded.gm)
        self.outputs = [self.resolve(a) for a in guarded.gm.graph.output_node().args[0]]  # type: ignore[union-attr]

    def resolve(self, argument: Any) -> Any:
        """Return the node of the straight-line graph, or the decision, that an argument refers to."""
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


class _Segment:
    """Builds the variant of one segment of a flattened graph."""

    def __init__(
        self,
        guarded: GuardedGraph,
        flat: _Flat,
        of: Sequence[int | None],
        segment: int,
        dense: bool = True,
        tables: StepTables | None = None,
    ) -> None:
        self.guarded, self.flat, self.of, self.segment = guarded, flat, of, segment
        self.dense, self.tables = dense, tables
        self.source = list(guarded.source.graph.nodes)
        self.placeholders = guarded.gm.graph.find_nodes(op="placeholder")
        self.number = {node: i for i, node in enumerate(self.placeholders)}
        results = [n for n in self.flat.outputs[: guarded.num_outputs] if isinstance(n, fx.Node)]
        self.returned = {self._wire(n) for n in results if n.op == "call_function"}
        self.exposed = {viewed for node in results for viewed in self._viewed(node)}

    def variant(self, exports: Sequence[int], stored: Sequence[bool] | None) -> Variant:
        wires = tuple(p for p in exports if isinstance(self.flat.at.get(p), fx.Node))
        fresh = self._fresh(stored)
        outputs = (*(self.flat.at[p] for p in wires), *fresh.values())
        dense = [i for i, p in enumerate(wires) if self._is_dense(p)]
        needed, table = self._needed(outputs)
        gm, inputs, cached = self._straighten(outputs, needed, table, frozenset(dense))
        return Variant(gm, self.flat.row, inputs, cached, wires, tuple(fresh), tuple(table.values()))

    def _needed(self, outputs: tuple[fx.Node, ...]) -> tuple[set[fx.Node], dict[fx.Node, str]]:
        """Return the nodes of the variant, and the column of each node that it reads from the step table.

        Of a column and a part of it, only the column is read.
        """
        needed = self._reached(outputs, {})
        if self.tables is None:
            return needed, {}
        columns = {node: column for node in needed if (column := self._column(node)) is not None}
        read = self._reached(outputs, columns) & columns.keys()
        named = {columns[node] for node in read}
        whole = {node: column for node, column in columns.items() if not self.tables.within[column] & named}
        needed = self._reached(outputs, whole)
        ordered = sorted((node for node in whole if node in needed), key=lambda node: node.meta["position"])
        return needed, {node: whole[node] for node in ordered}

    def _column(self, node: fx.Node) -> str | None:
        """Return the column of the step table that holds the value of a node of this segment, or None.

        A value that the call returns, or returns a view of, is not read from the table: the caller may modify it.
        """
        if node.op != "call_function" or "home" in node.meta or self._is_input(node) or self.tables is None:
            return None
        if node in self.exposed:
            return None
        return self.tables.columns.get(self.source[node.meta["position"]].name)

    def _viewed(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield a node, and the nodes whose memory it may be a view of."""
        yield node
        while is_view(node) or node.target is getitem or returns_view(node):
            node = next(self._operands(node))
            yield node

    def _fresh(self, stored: Sequence[bool] | None) -> dict[tuple[int, int], fx.Node]:
        """Return the new slot tensors that this segment computes."""
        pairs = [(i, k) for i, count in enumerate(self.guarded.widths) for k in range(count)]
        tensors = zip(pairs, self.flat.outputs[self.guarded.num_outputs :], strict=True)
        returned = [not reused and (stored is None or stored[i]) for i, reused in enumerate(self.flat.row)]
        return {pair: node for pair, node in tensors if returned[pair[0]] and self._is_own(node)}

    def _is_dense(self, wire: int) -> bool:
        """Return whether a wire is made contiguous for other segments. An output of the call keeps its layout."""
        return self.dense and wire not in self.returned

    def _is_own(self, node: fx.Node) -> bool:
        return self.of[self._wire(node)] == self.segment if node.op == "call_function" else False

    @staticmethod
    def _wire(node: fx.Node) -> int:
        """Return the position in the captured graph of a node, or of the node that it was added for."""
        return int(node.meta.get("home", node.meta["position"]))

    def _is_input(self, node: fx.Node) -> bool:
        """Return whether a node is an input of this segment: a placeholder, or a node of another segment."""
        if node.op == "call_function":
            return self.of[self._wire(node)] not in (self.segment, None)
        return node.op == "placeholder"

    def _straighten(
        self, outputs: tuple[fx.Node, ...], needed: set[fx.Node], table: Iterable[fx.Node], dense: frozenset[int]
    ) -> tuple[fx.GraphModule, tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Return a graph of the `needed` nodes that computes `outputs`, with the wires and slot tensors that it takes.

        The outputs at the indices `dense` are made contiguous. Nodes keep the order of the captured graph, because
        Inductor's decisions depend on it, and at reuse 0 they must be those for the captured graph.
        """
        sizes = [n for n in self.placeholders[: self.guarded.num_inputs] if not hasattr(n.meta.get("val"), "dtype")]
        known = sorted({*sizes, *filter(self.number.__contains__, needed)}, key=self.number.__getitem__)
        first = [node for node in known if self.number[node] < self.guarded.num_inputs]
        handed = sorted((n for n in needed if n not in self.number and self._is_input(n)), key=self._wire)
        slots = known[len(first) :]
        graph = fx.Graph()
        env = {node: graph.node_copy(node) for node in first}
        env.update({node: _placeholder(graph, node, self._is_dense(self._wire(node))) for node in handed})
        env.update({node: _placeholder(graph, node) for node in slots})
        read = {node: _placeholder(graph, self.source[node.meta["position"]], dense=True) for node in table}
        env.update(
            (node, half_of(graph, r, node.meta["half"]) if "half" in node.meta else r) for node, r in read.items()
        )
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
        """Return the site and the index of a placeholder for a slot tensor."""
        index = self.number[node] - self.guarded.num_inputs - len(self.guarded.sites)
        for i, count in enumerate(self.guarded.num_slot_inputs):
            if index < count:
                return i, index
            index -= count
        raise AssertionError(node)

    def _reached(self, outputs: tuple[fx.Node, ...], given: Collection[fx.Node]) -> set[fx.Node]:
        """Return the outputs and impure nodes of this segment, and the nodes that they depend on, down to `given`.

        In a step that reuses, an assertion about the size of a tensor that nothing else reads is left out, because it
        would keep the computation of the tensor alive. Data-dependent sizes in a slot follow from the conditioning, so
        the step that filled the slot has made the same assertion.
        """
        acting = [node for node in self.flat.home if node in self.guarded.acting and self._is_own(node)]
        sized = {node: asserted_tensors(node, self._operands) for node in acting if any(self.flat.row)}
        reached = self._closed([*outputs, *(node for node in acting if sized.get(node) is None)], given)
        kept = [node for node, tensors in sized.items() if tensors is not None and tensors <= reached]
        return reached | self._closed(kept, given)

    def _closed(self, nodes: Iterable[fx.Node], given: Collection[fx.Node]) -> set[fx.Node]:
        reached: set[fx.Node] = set()
        stack = [*nodes]
        while stack:
            node = stack.pop()
            if node not in reached:
                reached.add(node)
                stack.extend(() if self._is_input(node) or node in given else self._operands(node))
        return reached

    def _operands(self, node: fx.Node) -> Iterator[fx.Node]:
        for argument in node.all_input_nodes:
            meaning = self.flat.resolve(argument)
            if isinstance(meaning, fx.Node):
                yield meaning


def _placeholder(graph: fx.Graph, node: fx.Node, dense: bool = False) -> fx.Node:
    """Add an input for a node that another segment computes, or for a slot tensor."""
    placeholder = graph.placeholder(node.name)
    placeholder.target = placeholder.name
    placeholder.meta = {**node.meta, "val": _without_gaps(node.meta["val"])} if dense else dict(node.meta)
    return placeholder


def _dense(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return the contiguous form of a value that crosses a cut.

    The traced strides, for example those of an embedding's transposed output, would constrain the layout of a segment's
    outputs. Compilation of the whole graph does not have this constraint.
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
