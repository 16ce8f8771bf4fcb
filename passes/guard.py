"""Pass 03: every site that some rule can reach becomes a `cache_or_compute` node.

The node carries its guard, its strategy and, as a subgraph, what computes its values. The guarded graph runs as it is
(decisions are inputs), and is the only input of what follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import fx

from dit_rewrite.passes.graph import attribute
from dit_rewrite.passes.sites import Site


@dataclass(frozen=True)
class Guarded:
    """A site of the graph with the guard and strategy that its node shows; `site` is an index into the sites found."""

    site: int
    guard: str
    strategy: str


@dataclass(frozen=True)
class GuardedGraph:
    """The graph of pass 03.

    Its inputs are those of the captured graph, then for each guarded site a decision (True: reuse), then each of its
    cached values; its outputs those of the captured graph, then the values that each site now holds. ``sites`` are
    the guarded ones in the order of these inputs; ``parents`` index into them.
    """

    gm: fx.GraphModule
    sites: tuple[Site, ...]
    parents: tuple[int | None, ...]
    num_inputs: int
    num_outputs: int


def cache_or_compute(
    reuse: bool,
    cached: Sequence[Any],
    compute: Callable[..., Sequence[Any]],
    live_ins: Sequence[Any],
    *,
    site: str,
    guard: str,
    strategy: str,
) -> Sequence[Any]:
    """The values of a site and of the sites inside it: the `cached` ones, or those that `compute` makes of `live_ins`.

    `site`, `guard` and `strategy` are what a reader of the graph sees; they change nothing here.
    """
    return cached if reuse else compute(*live_ins)


def guard(gm: fx.GraphModule, sites: Sequence[Site], guarded: Sequence[Guarded]) -> GuardedGraph:
    """Rewrite the captured graph `gm`, which stays as it is, so that the `guarded` sites are cache_or_compute nodes."""
    chosen = tuple(sites[g.site] for g in guarded)
    parents = tuple(_parent(sites, guarded, g.site) for g in guarded)
    return _Rewriter(gm, chosen, parents, tuple(guarded)).run()


def _parent(sites: Sequence[Site], guarded: Sequence[Guarded], index: int) -> int | None:
    """The nearest enclosing site that is guarded too, as an index into `guarded`."""
    around = sites[index].parent
    positions = {g.site: i for i, g in enumerate(guarded)}
    while around is not None and around not in positions:
        around = sites[around].parent
    return None if around is None else positions[around]


def _input(graph: fx.Graph, name: str) -> fx.Node:
    """A new input; numbered where the name is taken."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


class _Rewriter:
    """Moves each site's closure into a subgraph, innermost scope by innermost scope."""

    def __init__(
        self, gm: fx.GraphModule, sites: tuple[Site, ...], parents: tuple[int | None, ...], labels: tuple[Guarded, ...]
    ) -> None:
        self.gm, self.sites, self.parents, self.labels = gm, sites, parents, labels
        self.slugs = [re.sub(r"\W", "_", site.name) for site in sites]
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.values = [[self.nodes[name] for name in site.values] for site in sites]
        self.owner = self._owners()
        self.inside = [self._inside(i) for i in range(len(sites))]

    def _owners(self) -> dict[fx.Node, int]:
        """For each node the innermost site whose closure holds it."""
        owner: dict[fx.Node, int] = {}
        for i in sorted(range(len(self.sites)), key=lambda i: -len(self.sites[i].closure)):
            owner.update(dict.fromkeys((self.nodes[name] for name in self.sites[i].closure), i))
        return owner

    def _inside(self, scope: int) -> list[int]:
        """The site itself, then all sites within it: the order of its node's results."""
        children = [i for i, parent in enumerate(self.parents) if parent == scope]
        return [scope, *(inner for child in children for inner in self._inside(child))]

    def run(self) -> GuardedGraph:
        graph = fx.Graph()
        inputs = self.gm.graph.find_nodes(op="placeholder")
        env: dict[Any, fx.Node] = {}
        for node in inputs:
            env[node] = graph.node_copy(node)
        for i in range(len(self.sites)):
            env["reuse", i] = _input(graph, f"reuse_{self.slugs[i]}")
            self.slugs[i] = env["reuse", i].name.removeprefix("reuse_")  # two sites' names may differ in a dot alone
        for i, values in enumerate(self.values):
            for value in values:
                env["cached", i, value] = _input(graph, f"cached_{self.slugs[i]}")
                env["cached", i, value].meta = {"val": value.meta["val"]}
        attributes = self._emit(graph, None, env)
        captured: Any = self.gm.graph.output_node().args[0]
        outputs = tuple(fx.map_arg(captured, lambda n: env[n]))
        held = [env["held", i, value] for i, values in enumerate(self.values) for value in values]
        graph.output((*outputs, *held))
        gm = fx.GraphModule(attributes, graph)
        return GuardedGraph(gm, self.sites, self.parents, len(inputs), len(outputs))

    def _emit(self, graph: fx.Graph, scope: int | None, env: dict[Any, fx.Node]) -> dict[str, Any]:
        """Write the nodes that `scope` owns and a cache_or_compute node for each site directly within it.

        A site is written where its first value is needed. Returns the attributes that the new graph refers to.
        """
        attributes: dict[str, Any] = {}

        def visit(node: fx.Node) -> None:
            if node in env:
                return
            site = self._child(node, scope)
            for argument in node.all_input_nodes if site is None else self._live_ins(site):
                visit(argument)
            if site is None:
                env[node] = graph.node_copy(node, lambda n: env[n])
                env[node].meta["position"] = self.position[node]
                if node.op == "get_attr":
                    attributes[str(node.target)] = attribute(self.gm, node)
            else:
                attributes[f"compute_{self.slugs[site]}"] = self._call(graph, site, env)

        for node in self.gm.graph.nodes:
            if node.op not in ("placeholder", "output") and self.owner.get(node) == scope:
                visit(node)
        return attributes

    def _child(self, node: fx.Node, scope: int | None) -> int | None:
        """The site directly within `scope` to which a node belongs, if any."""
        site = self.owner.get(node)
        while site is not None and self.parents[site] != scope:
            site = self.parents[site]
        return None if site == scope else site

    def _live_ins(self, site: int) -> list[fx.Node]:
        """What the site's closure reads and does not own, in the order of the graph."""
        closure = self.sites[site].closure
        read = {arg for name in closure for arg in self.nodes[name].all_input_nodes if arg.name not in closure}
        return sorted(read, key=self.position.__getitem__)

    def _call(self, graph: fx.Graph, site: int, env: dict[Any, fx.Node]) -> fx.GraphModule:
        """Write the cache_or_compute node of a site, and what it holds into `env`; its compute subgraph."""
        keys: list[Any] = [*self._live_ins(site)]
        for inner in self.inside[site][1:]:
            keys += [("reuse", inner), *(("cached", inner, value) for value in self.values[inner])]
        results = [(i, value) for i in self.inside[site] for value in self.values[i]]
        call = graph.call_function(
            cache_or_compute,
            (
                env["reuse", site],
                tuple(env["cached", i, value] for i, value in results),
                graph.get_attr(f"compute_{self.slugs[site]}"),
                tuple(env[key] for key in keys),
            ),
            {"site": self.sites[site].name, "guard": self.labels[site].guard, "strategy": self.labels[site].strategy},
        )
        for k, (i, value) in enumerate(results):
            held = graph.call_function(getitem, (call, k))
            held.meta = {"val": value.meta["val"], "nn_module_stack": value.meta.get("nn_module_stack")}
            env["held", i, value] = env[value] = held
        return self._body(site, keys, env)

    def _body(self, site: int, keys: list[Any], outer: dict[Any, fx.Node]) -> fx.GraphModule:
        """The subgraph that computes a site: its results are the site's values, then those of the sites inside."""
        graph = fx.Graph()
        env: dict[Any, fx.Node] = {}
        for key in keys:
            env[key] = graph.placeholder(outer[key].name)
            env[key].meta = dict(outer[key].meta)
        attributes = self._emit(graph, site, env)
        own = [env[value] for value in self.values[site]]
        graph.output((*own, *(env["held", i, v] for i in self.inside[site][1:] for v in self.values[i])))
        return fx.GraphModule(attributes, graph)
