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

from torch import Tensor, fx

from dit_rewrite.passes.graph import attribute, needed
from dit_rewrite.passes.site import Site
from dit_rewrite.passes.store import decode, encode, inline, is_packed, width


@dataclass(frozen=True)
class Guarded:
    """A site of the graph with the guard and strategy that its node shows; `site` is an index into the sites found.

    `store` is what its slot holds in the place of its values (store.py).
    """

    site: int
    guard: str
    strategy: str
    store: str | None = None


@dataclass(frozen=True)
class GuardedGraph:
    """The graph of pass 03.

    Its inputs are those of the captured graph, then for each guarded site a decision (True: reuse), then what each of
    its slots holds; its outputs those of the captured graph, then what each slot holds now. ``sites`` are the guarded
    ones in the order of these inputs, ``held`` the number of tensors in each one's slot; ``parents`` index into them.
    Every node that the captured graph has too knows its ``position`` there, in its meta; those that pack and unpack
    slots stand in between.
    """

    gm: fx.GraphModule
    sites: tuple[Site, ...]
    parents: tuple[int | None, ...]
    held: tuple[int, ...]
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


@dataclass(frozen=True)
class _Slot:
    """How one value is held: `first` is where its tensors begin among the site's."""

    value: fx.Node
    base: fx.Node | None
    store: str | None
    first: int

    @property
    def is_plain(self) -> bool:
        """The value is held as it is."""
        return self.base is None and not is_packed(self.value.meta["val"], self.store)

    @property
    def width(self) -> int:
        return width(self.value.meta["val"], self.store)

    def examples(self) -> tuple[Tensor, ...]:
        """The held tensors of the trace, without values."""
        value = self.value.meta["val"]
        base = None if self.base is None else self.base.meta["val"]
        return (value,) if self.is_plain else encode(value, base, self.store)

    def pack(self, graph: fx.Graph, env: dict[Any, fx.Node], position: int) -> list[fx.Node]:
        """Write what makes the held tensors of the value, right behind it."""
        if self.is_plain:
            return [env[self.value]]
        arguments = [env[self.value], *([] if self.base is None else [env[self.base]])]
        return inline(
            graph, lambda v, *b: encode(v, b[0] if b else None, self.store), arguments, position, home=position
        )

    def unpack(self, graph: fx.Graph, held: list[fx.Node], env: dict[Any, fx.Node], position: int) -> fx.Node:
        """Write what makes the value of the held tensors, right before its place."""
        if self.is_plain:
            return held[0]
        count, dtype = self.width, self.value.meta["val"].dtype
        arguments = [*held, *([] if self.base is None else [env[self.base]])]
        (value,) = inline(
            graph,
            lambda *a: (decode(a[:count], a[count] if len(a) > count else None, self.store, dtype),),
            arguments,
            position - 1,
            home=position,
        )
        return value


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
        kept = (self.nodes[name] for site in sites for name in (*site.values, *site.operands))
        self.needed = needed(gm.graph, kept)  # the rest may read what lies in a site and is not there when it is reused
        self.slots = [self._slots(i) for i in range(len(sites))]
        self.held = tuple(sum(slot.width for slot in slots) for slots in self.slots)
        self.owner = self._owners()
        self.inside = [self._inside(i) for i in range(len(sites))]

    def _slots(self, i: int) -> list[_Slot]:
        """How the values of a site are held."""
        slots: list[_Slot] = []
        for k, value in enumerate(self.values[i]):
            base = self.nodes[self.sites[i].bases[k]] if k < len(self.sites[i].bases) else None
            first = slots[-1].first + slots[-1].width if slots else 0
            slots.append(_Slot(value, base, self.labels[i].store, first))
        return slots

    def _owners(self) -> dict[fx.Node, int]:
        """For each node the innermost site whose closure holds it."""
        owner: dict[fx.Node, int] = {}
        for i in sorted(range(len(self.sites)), key=lambda i: (-len(self.sites[i].closure), -i)):
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
        for i, slots in enumerate(self.slots):
            for k, example in enumerate(tensor for slot in slots for tensor in slot.examples()):
                env["cached", i, k] = _input(graph, f"cached_{self.slugs[i]}")
                env["cached", i, k].meta = {"val": example}
        attributes = self._emit(graph, None, env)
        captured: Any = self.gm.graph.output_node().args[0]
        outputs = tuple(fx.map_arg(captured, lambda n: env[n]))
        held = [env["held", i, k] for i in range(len(self.sites)) for k in range(self.held[i])]
        graph.output((*outputs, *held))
        gm = fx.GraphModule(attributes, graph)
        return GuardedGraph(gm, self.sites, self.parents, self.held, len(inputs), len(outputs))

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
            if node in self.needed and node.op not in ("placeholder", "output") and self.owner.get(node) == scope:
                visit(node)
        for i, values in enumerate(self.values):
            for value in values if i == scope or self.parents[i] == scope else ():
                visit(value)
        return attributes

    def _child(self, node: fx.Node, scope: int | None) -> int | None:
        """The site directly within `scope` to which a node belongs, if any."""
        site = self.owner.get(node)
        while site is not None and self.parents[site] != scope:
            site = self.parents[site]
        return None if site == scope else site

    def _live_ins(self, site: int) -> list[fx.Node]:
        """What the site's closure and slots read and do not own, in the order of the graph."""
        closure = self.sites[site].closure
        read = {arg for name in closure for arg in self.nodes[name].all_input_nodes}
        read.update(self.nodes[base] for i in self.inside[site] for base in self.sites[i].bases)
        return sorted((node for node in read if node.name not in closure), key=self.position.__getitem__)

    def _call(self, graph: fx.Graph, site: int, env: dict[Any, fx.Node]) -> fx.GraphModule:
        """Write the cache_or_compute node of a site, and what it holds into `env`; its compute subgraph."""
        inner = self.inside[site][1:]
        keys: list[Any] = [*self._live_ins(site)]
        for i in inner:
            keys += [("reuse", i), *(("cached", i, k) for k in range(self.held[i]))]
        held = [("held", i, k) for i in self._stored(site) for k in range(self.held[i])]
        values = self._unpacked(graph, site, env)
        call = graph.call_function(
            cache_or_compute,
            (
                env["reuse", site],
                (*values, *(env["cached", i, k] for _, i, k in held)),
                graph.get_attr(f"compute_{self.slugs[site]}"),
                tuple(env[key] for key in keys),
            ),
            {"site": self.sites[site].name, "guard": self.labels[site].guard, "strategy": self.labels[site].strategy},
        )
        call.meta["values"] = tuple(self.position[value] for value in self.values[site])
        body = self._body(site, keys, held, env)
        for k, key in enumerate((*self.values[site], *held)):
            example = key if isinstance(key, fx.Node) else env["cached", key[1], key[2]]
            env[key] = graph.call_function(getitem, (call, k))
            env[key].meta = {"val": example.meta["val"], "nn_module_stack": example.meta.get("nn_module_stack")}
        if self._is_plain(site):
            env.update({("held", site, k): env[value] for k, value in enumerate(self.values[site])})
        return body

    def _is_plain(self, site: int) -> bool:
        """The site's slot holds its values as they are."""
        return all(slot.is_plain for slot in self.slots[site])

    def _stored(self, site: int) -> list[int]:
        """The sites whose held tensors are results of a site's node beside its values."""
        return self.inside[site][1:] if self._is_plain(site) else self.inside[site]

    def _unpacked(self, graph: fx.Graph, site: int, env: dict[Any, fx.Node]) -> list[fx.Node]:
        """The cached values of a site, unpacked before the node that takes them."""
        values = []
        for slot in self.slots[site]:
            held = [env["cached", site, slot.first + k] for k in range(slot.width)]
            values.append(slot.unpack(graph, held, env, self.position[slot.value]))
        return values

    def _body(self, site: int, keys: list[Any], held: list[Any], outer: dict[Any, fx.Node]) -> fx.GraphModule:
        """The subgraph that computes a site: its results are the site's values, then what is held."""
        graph = fx.Graph()
        env: dict[Any, fx.Node] = {}
        for key in keys:
            env[key] = graph.placeholder(outer[key].name)
            env[key].meta = dict(outer[key].meta)
        attributes = self._emit(graph, site, env)
        for slot in self.slots[site]:
            packed = slot.pack(graph, env, self.position[slot.value])
            env.update({("held", site, slot.first + k): node for k, node in enumerate(packed)})
        graph.output((*(env[value] for value in self.values[site]), *(env[key] for key in held)))
        return fx.GraphModule(attributes, graph)
