"""Pass 04: partial evaluation of a guarded graph by one row of decisions: a straight-line variant.

A reused site becomes graph inputs, a computed one is put back in its place and its values become extra outputs.
Whatever only fed a reused value is not reached from the outputs any more, and is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import fx

from dit_rewrite.passes.graph import attribute
from dit_rewrite.passes.guard import GuardedGraph, cache_or_compute

Row = tuple[bool, ...]  # for each guarded site: True = reused (or inside a reused one)


@dataclass(frozen=True)
class Variant:
    """A straight-line graph for one row of decisions, and how to call it.

    Its inputs are those of the captured graph at the positions ``inputs``, then the cached values ``cached``; its
    outputs those of the captured graph, then the fresh values ``fresh``. Values are (site, index) pairs.
    """

    gm: fx.GraphModule
    row: Row
    inputs: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
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
    guarded: GuardedGraph, row: Sequence[bool], store: Sequence[bool] | None = None, outputs: bool = True
) -> Variant:
    """The variant of `guarded` for a row of decisions.

    `store` says for each site whether its fresh values are returned, by default all that were computed. Without
    `outputs` they are all that is returned, and nothing else is computed.
    """
    row = normalise(row, guarded.parents)
    stored = [not reused and (store is None or store[i]) for i, reused in enumerate(row)]
    flat = _Flat(guarded, row)
    values = [(i, k) for i, site in enumerate(guarded.sites) for k in range(len(site.values))]
    returned = flat.outputs[: guarded.num_outputs] if outputs else []
    held = dict(zip(values, flat.outputs[guarded.num_outputs :], strict=True))
    fresh = tuple(value for value in values if stored[value[0]])
    gm, kept = _straighten(guarded, flat, (*returned, *(held[value] for value in fresh)), effects=outputs)
    placeholders = guarded.gm.graph.find_nodes(op="placeholder")
    slots = dict(zip(placeholders[guarded.num_inputs + len(guarded.sites) :], values, strict=True))
    inputs = tuple(i for i, node in enumerate(placeholders[: guarded.num_inputs]) if node in kept)
    return Variant(gm, row, inputs, tuple(slots[node] for node in kept if node in slots), fresh)


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
            elif node.op in ("call_function", "get_attr", "placeholder"):
                self.home[node] = gm
        return [self.resolve(a) for a in gm.graph.output_node().args[0]]  # type: ignore[union-attr]

    def _call(self, gm: fx.GraphModule, node: fx.Node) -> list[Any]:
        reuse, cached, compute, live_ins = node.args
        if self.resolve(reuse):
            return [self.resolve(value) for value in cached]  # type: ignore[union-attr]
        body = attribute(gm, compute)  # type: ignore[arg-type]
        placeholders = body.graph.find_nodes(op="placeholder")
        self.meaning.update((p, self.resolve(a)) for p, a in zip(placeholders, live_ins, strict=True))  # type: ignore[arg-type]
        return self._walk(body)


def _straighten(
    guarded: GuardedGraph, flat: _Flat, outputs: tuple[Any, ...], effects: bool
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """One graph of what the outputs need, in the captured graph's order; also the guarded placeholders that it kept.

    The order matters: Inductor's choices follow it, and reuse 0 must make those of the untouched graph.
    """
    needed = _reached(flat, outputs, effects)
    placeholders = guarded.gm.graph.find_nodes(op="placeholder")
    symbolic = {n for n in placeholders[: guarded.num_inputs] if not hasattr(n.meta.get("val"), "dtype")}
    kept = [node for node in placeholders if node in needed or node in symbolic]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {node: graph.node_copy(node) for node in kept}
    attributes: dict[str, Any] = {}
    computed = [node for node in needed if node.op != "placeholder"]
    for node in sorted(computed, key=lambda node: node.meta["position"]):
        env[node] = graph.node_copy(node, lambda n: env[flat.resolve(n)])
        if node.op == "get_attr":
            attributes[str(node.target)] = attribute(flat.home[node], node)
    graph.output(tuple(fx.map_arg(outputs, lambda n: env[n])))
    return fx.GraphModule(attributes, graph), kept


def _reached(flat: _Flat, outputs: tuple[Any, ...], effects: bool) -> set[fx.Node]:
    """What the outputs and, with `effects`, what must run for its effect, are computed from; themselves too."""
    acting = (node for node in flat.home if effects and node.op == "call_function" and node.is_impure())
    reached: set[fx.Node] = set()
    stack = [node for node in (*outputs, *acting) if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(_operands(flat, node))
    return reached


def _operands(flat: _Flat, node: fx.Node) -> Iterator[fx.Node]:
    for argument in node.all_input_nodes:
        meaning = flat.resolve(argument)
        if isinstance(meaning, fx.Node):
            yield meaning
