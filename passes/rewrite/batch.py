"""What of a graph's values belongs to which sample of the batch: an analysis by one rule for each op (batch_rules.py).

Only proof counts: a node's label follows from those of its operands by the rule for its op, and an op without a rule
proves nothing.
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
    """What of the batch a value holds; a tuple has the label of its members.

    SAME: it does not depend on which sample (weights, tables). LEADING: dim 0 is a multiple of the batch, and of its
    `batch` equal parts the i-th depends on that of sample i in other LEADING values, and on SAME ones, alone. EQUAL:
    both, the parts being equal (a table expanded over the batch). MIXED: anything else, or not proven.
    """

    SAME = "same"
    EQUAL = "equal"
    LEADING = "leading"
    MIXED = "mixed"


def batch_labels(graph: fx.Graph, batch: int, static: Iterable[int] = ()) -> dict[fx.Node, Batch]:
    """The label of every node of a captured graph, whose nodes carry values without data in ``meta["val"]``.

    Placeholders at the positions `static` are weights. Any other tensor whose dim 0 is `batch` is taken to hold one
    sample in each row: of the inputs only the caller can know. Raises BadArgument for a batch below 1.
    """
    if batch < 1:
        raise BadArgument("batch_labels", "batch", batch, "an integer from 1 on")
    weights = set(static)
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    given = [Batch.LEADING if i not in weights and rows_of(node) == batch else Batch.SAME for i, node in inputs]
    return Flow(graph, given, batch).labels


class Flow:
    """The labels of a graph's nodes, `given` those of its placeholders.

    ``results`` has those of each cache_or_compute node's results (guarded_graph.py), ``inner`` the flow through each
    subgraph that it refers to, ``halved`` for each LEADING node the operands that are LEADING to
    it: an EQUAL one may be.
    """

    def __init__(self, graph: fx.Graph, given: Sequence[Batch], batch: int) -> None:
        self.batch = batch
        self.labels: dict[fx.Node, Batch] = {}
        self.results: dict[fx.Node, tuple[Batch, ...]] = {}
        self.inner: dict[fx.Node, Flow] = {}
        self.halved: dict[fx.Node, frozenset[fx.Node]] = {}
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
        """The label of a node's argument; of what is no node, SAME."""
        return self.labels[argument] if isinstance(argument, fx.Node) else Batch.SAME

    def through(self, body: fx.Node) -> tuple[Batch, ...]:
        """The labels of what a subgraph returns."""
        graph = attribute(body.graph.owning_module, body).graph  # type: ignore[arg-type]
        return tuple(map(self.inner[body].of, graph.output_node().args[0]))

    def _proven(self, node: fx.Node, label: Batch) -> Batch:
        """What is said of an input, as far as its shape allows."""
        if tensor(node) is None:
            return Batch.SAME
        rows = rows_of(node)
        divides = rows is not None and rows % self.batch == 0
        return label if divides or label is Batch.SAME else Batch.MIXED

    def _label(self, node: fx.Node) -> Batch:
        held = {self.labels[operand] for operand in node.all_input_nodes}
        if Batch.MIXED in held:
            return Batch.MIXED
        certain = frozenset(n for n in node.all_input_nodes if self.labels[n] is Batch.LEADING)
        either = frozenset(n for n in node.all_input_nodes if self.labels[n] is Batch.EQUAL)
        for leading in (certain | either, certain):
            if leading and rule_of(node)(Call(node, leading, self.batch)):
                self.halved[node] = leading
                return Batch.LEADING if certain else Batch.EQUAL
        if certain:
            return Batch.MIXED
        return Batch.EQUAL if repeats(node, self.batch) else Batch.SAME

    def _call(self, node: fx.Node) -> Batch:
        """Labels the results of a site's node: what is reused and what is computed have to agree."""
        _, cached, compute, live_ins = cast("tuple[Any, ...]", node.args)
        instead: Any = node.kwargs.get("instead")
        given = [self.of(argument) for argument in live_ins]
        for body in filter(None, (compute, instead)):
            self.inner[body] = Flow(attribute(node.graph.owning_module, body).graph, given, self.batch)  # type: ignore[arg-type]
        reused = map(self.of, cached) if instead is None else self.through(instead)
        self.results[node] = tuple(_join({a, b}) for a, b in zip(self.through(compute), reused, strict=True))
        tuples = any(label is Batch.LEADING and not _is_tensor(a) for a, label in zip(live_ins, given, strict=True))
        mixed = Batch.MIXED in {*self.results[node], *map(self.of, node.all_input_nodes)}
        return Batch.MIXED if mixed or tuples else Batch.SAME  # a tuple could not be handed in as half


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _join(labels: set[Batch]) -> Batch:
    """The label of a value that may be one or the other."""
    if len(labels) == 1:
        return next(iter(labels))
    if Batch.MIXED in labels or labels == {Batch.SAME, Batch.LEADING}:
        return Batch.MIXED
    return Batch.LEADING if Batch.LEADING in labels else Batch.SAME
