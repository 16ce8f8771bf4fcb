"""Batch labels: an analysis of how the values of a graph depend on the samples of the batch.

The label of a node follows from the labels of its operands by the rule for its op (batch_rules.py). A value whose op
has no rule is MIXED.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from operator import getitem
from typing import Any, cast

from torch import Tensor, fx

from dit_rewrite.errors import BadArgument
from dit_rewrite.passes.analysis.graph import attribute
from dit_rewrite.passes.rewrite.batch_rules import Call, repeats, rows_of, rule_of, tensor
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute


class Batch(Enum):
    """How a value depends on the samples of the batch. The label of a tuple is that of its members.

    SAME: the value is the same for all samples (weights, tables). LEADING: the size of dim 0 is a multiple of the batch
    size; of its `batch` equal parts, part i depends only on part i of other LEADING values, and on SAME values. EQUAL:
    LEADING with equal parts (a table expanded over the batch). MIXED: anything else, or not proven.
    """

    SAME = "same"
    EQUAL = "equal"
    LEADING = "leading"
    MIXED = "mixed"


def batch_labels(graph: fx.Graph, batch: int, static: Iterable[int] = ()) -> dict[fx.Node, Batch]:
    """Return the label of every node of a captured graph, whose nodes have fake values in ``meta["val"]``.

    Placeholders at the positions `static` are weights. Any other input whose dim 0 has size `batch` is assumed to have
    one row per sample; the caller must ensure this. Raises BadArgument if `batch` is below 1.
    """
    if batch < 1:
        raise BadArgument("batch_labels", "batch", batch, "an integer from 1 on")
    weights = set(static)
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    given = [Batch.LEADING if i not in weights and rows_of(node) == batch else Batch.SAME for i, node in inputs]
    return Flow(graph, given, batch).labels


class Flow:
    """Computes the labels of a graph's nodes from the labels `given` for its placeholders.

    ``results``: the labels of the results of each cache_or_compute node. ``inner``: the flow of each subgraph of such
    a node. ``leading_operands``: for each LEADING node, the operands that its rule takes as LEADING. An EQUAL operand
    may be taken as LEADING or as SAME.
    """

    def __init__(self, graph: fx.Graph, given: Sequence[Batch], batch: int) -> None:
        self.batch = batch
        self.labels: dict[fx.Node, Batch] = {}
        self.results: dict[fx.Node, tuple[Batch, ...]] = {}
        self.inner: dict[fx.Node, Flow] = {}
        self.leading_operands: dict[fx.Node, frozenset[fx.Node]] = {}
        for node, label in zip(graph.find_nodes(op="placeholder"), given, strict=True):
            self.labels[node] = self._proven(node, label)
        for node in graph.nodes:
            if node.target is cache_or_compute:
                self.labels[node] = self._call(node)
            elif node.target is getitem and node.args[0] in self.results:
                self.labels[node] = self.results[node.args[0]][node.args[1]]
            elif node.op not in ("placeholder", "output"):
                self.labels[node] = self._label(node)

    def of(self, argument: Any) -> Batch:
        """Return the label of a node's argument; SAME if the argument is not a node."""
        return self.labels[argument] if isinstance(argument, fx.Node) else Batch.SAME

    def through(self, body: fx.Node) -> tuple[Batch, ...]:
        """Return the labels of the results of the subgraph that `body` refers to."""
        graph = attribute(body.graph.owning_module, body).graph  # type: ignore[arg-type]
        return tuple(map(self.inner[body].of, graph.output_node().args[0]))

    def _proven(self, node: fx.Node, label: Batch) -> Batch:
        """Return `label`, or MIXED if the shape of the input contradicts it."""
        if tensor(node) is None:
            return Batch.SAME
        rows = rows_of(node)
        divides = rows is not None and rows % self.batch == 0
        return label if divides or label is Batch.SAME else Batch.MIXED

    def _label(self, node: fx.Node) -> Batch:
        labels = {self.labels[operand] for operand in node.all_input_nodes}
        if Batch.MIXED in labels:
            return Batch.MIXED
        certain = frozenset(n for n in node.all_input_nodes if self.labels[n] is Batch.LEADING)
        either = frozenset(n for n in node.all_input_nodes if self.labels[n] is Batch.EQUAL)
        for leading in (certain | either, certain):
            if leading and rule_of(node)(Call(node, leading, self.batch)):
                self.leading_operands[node] = leading
                return Batch.LEADING if certain else Batch.EQUAL
        if certain:
            return Batch.MIXED
        return Batch.EQUAL if repeats(node, self.batch) else Batch.SAME

    def _call(self, node: fx.Node) -> Batch:
        """Label the results of a cache_or_compute node, which may be the reused or the computed values."""
        _, cached, compute, live_ins = cast("tuple[Any, ...]", node.args)
        instead: Any = node.kwargs.get("instead")
        given = [self.of(argument) for argument in live_ins]
        for body in filter(None, (compute, instead)):
            self.inner[body] = Flow(attribute(node.graph.owning_module, body).graph, given, self.batch)  # type: ignore[arg-type]
        reused = map(self.of, cached) if instead is None else self.through(instead)
        self.results[node] = tuple(_join({a, b}) for a, b in zip(self.through(compute), reused, strict=True))
        tuples = any(label is Batch.LEADING and not _is_tensor(a) for a, label in zip(live_ins, given, strict=True))
        mixed = Batch.MIXED in {*self.results[node], *map(self.of, node.all_input_nodes)}
        return Batch.MIXED if mixed or tuples else Batch.SAME  # half of a tuple cannot be passed in


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _join(labels: set[Batch]) -> Batch:
    """Return the label of a value that may have any of `labels`."""
    if len(labels) == 1:
        return next(iter(labels))
    if Batch.MIXED in labels or labels == {Batch.SAME, Batch.LEADING}:
        return Batch.MIXED
    return Batch.LEADING if Batch.LEADING in labels else Batch.SAME
