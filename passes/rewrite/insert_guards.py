"""Insert guards: replace each site that a rule can reach by a `cache_or_compute` node.

The guarded graph is executable, with the decisions as inputs, and is the only input of the later passes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from dit_rewrite.passes.analysis.graph import attribute, needed
from dit_rewrite.passes.analysis.site import Part, Site
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute
from dit_rewrite.passes.rewrite.guarded_graph import Guarded, GuardedGraph, parent_of
from dit_rewrite.passes.rewrite.half_batch import Batch, halve
from dit_rewrite.passes.rewrite.slot import Slot
from dit_rewrite.passes.rewrite.subgraph import add_input
from dit_rewrite.passes.rewrite.tiles import TileCodec, write_tiles


def insert_guards(gm: fx.GraphModule, sites: Sequence[Site], guarded: Sequence[Guarded]) -> GuardedGraph:
    """Return a copy of `gm` whose `guarded` sites, in the order of `sites` (inner ones first), are guarded."""
    chosen = tuple(sites[g.site] for g in guarded)
    around = tuple(parent_of(sites, guarded, g.site) for g in guarded)
    return _Rewriter(gm, chosen, around, tuple(guarded)).run()


_KEYS = {"reuse": Batch.SAME, "cached": Batch.LEADING, "weights": Batch.SAME}  # batch labels of slot inputs


class _Rewriter:
    """Moves the closure of each site into a subgraph.

    A scope is the graph itself (None) or a site, whose subgraph contains the sites inside it. `around` is the scope of
    each site. The dicts called `env` map to nodes of the new graph. Their keys are nodes of the captured graph, or
    tuples: ("reuse", i) is the decision of site i, ("cached", i, k) and ("weights", i) are inputs of its slot, and
    ("stored", i, k) is the k-th new tensor of its slot.
    """

    def __init__(
        self, gm: fx.GraphModule, sites: tuple[Site, ...], around: tuple[int | None, ...], labels: tuple[Guarded, ...]
    ) -> None:
        self.gm, self.sites, self.around, self.labels = gm, sites, around, labels
        self.slugs = [re.sub(r"\W", "_", site.name) for site in sites]
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.has_nodes = [site.part is not Part.CORE_STATE for site in sites]
        self.values = [
            [self.nodes[n] for n in site.values] if self.has_nodes[i] else [] for i, site in enumerate(sites)
        ]
        kept = (self.nodes[name] for site in sites for name in (*site.values, *site.operands))
        self.needed = needed(gm.graph, kept)  # a dead node may read a node in a closure, which a reused site lacks
        self.slots = [self._slots(i) for i in range(len(sites))]
        self.widths = tuple(sum(slot.width for slot in slots) for slots in self.slots)
        self.depths = tuple(max((slot.depth for slot in slots), default=1) for slots in self.slots)
        self.owner = self._owners()
        self.inside = [self._inside(i) for i in range(len(sites))]

    def _slots(self, i: int) -> list[Slot]:
        """Return the slots of a site's values. A CORE (whose CORE_STATE has one) and a CFG_SHARED site have none."""
        site, slots = self.sites[i], list[Slot]()
        holds = site.part is Part.DELTA or (site.part is not Part.CORE and self.labels[i].guidance is None)
        for k, name in enumerate(site.values if holds else ()):
            read = (*site.bases[k : k + 1], *site.inputs)
            first = slots[-1].first + slots[-1].width if slots else 0
            nodes, label = tuple(self.nodes[r] for r in read), self.labels[i]
            slots.append(Slot(self.nodes[name], nodes, label.codec, first, label.depth))
        return slots

    def _owners(self) -> dict[fx.Node, int]:
        """Return for each node the innermost site whose closure contains it."""
        owner: dict[fx.Node, int] = {}
        inward = [(-len(site.closure), -site.nesting, -i) for i, site in enumerate(self.sites)]
        for i in sorted(range(len(self.sites)), key=inward.__getitem__):
            owner.update(dict.fromkeys((self.nodes[name] for name in self.sites[i].closure), i))
        return owner

    def _inside(self, scope: int) -> list[int]:
        """Return the site and all sites inside it, in the order of the results of its node."""
        children = [i for i, around in enumerate(self.around) if around == scope]
        return [scope, *(inner for child in children for inner in self._inside(child))]

    def run(self) -> GuardedGraph:
        graph = fx.Graph()
        inputs = self.gm.graph.find_nodes(op="placeholder")
        env: dict[Any, fx.Node] = {}
        for node in inputs:
            env[node] = graph.node_copy(node)
        for i in range(len(self.sites)):
            env["reuse", i] = add_input(graph, f"reuse_{self.slugs[i]}")
            self.slugs[i] = env["reuse", i].name.removeprefix("reuse_")  # unique even if site names differ only in dots
        for i in range(len(self.sites)):
            self._add_slot(graph, i, env)
        attributes = self._emit(graph, None, env)
        captured: Any = self.gm.graph.output_node().args[0]
        outputs = tuple(fx.map_arg(captured, lambda n: env[n]))
        stored = [env["stored", i, k] for i in range(len(self.sites)) for k in range(self.widths[i])]
        graph.output((*outputs, *stored))
        gm = fx.GraphModule(attributes, graph)
        parents = tuple(map(self._covering, range(len(self.sites))))
        return GuardedGraph(gm, self.sites, parents, self.widths, self.depths, len(inputs), len(outputs), self.gm)

    def _add_slot(self, graph: fx.Graph, i: int, env: dict[Any, fx.Node]) -> None:
        """Add the inputs for the slot of a site: the tensors of each computed value, and the weights."""
        examples = [tensor for slot in self.slots[i] for tensor in slot.examples]
        # older values are new tensors, because tracing needs distinct ones
        older = [torch.empty_like(example) for _ in range(1, self.depths[i]) for example in examples]
        for k, example in enumerate((*examples, *older)):
            env["cached", i, k] = add_input(graph, f"cached_{self.slugs[i]}")
            env["cached", i, k].meta = {"val": example}
        if self.depths[i] > 1:
            env["weights", i] = add_input(graph, f"weights_{self.slugs[i]}")
            env["weights", i].meta = {"val": examples[0].new_empty(self.depths[i], dtype=torch.float32)}

    def _slot_keys(self, i: int) -> list[Any]:
        """Return the keys of the inputs for the slot of a site, in order."""
        stored = [("cached", i, k) for k in range(self.widths[i] * self.depths[i])]
        return [*stored, ("weights", i)] if self.depths[i] > 1 else stored

    def _covering(self, i: int) -> int | None:
        """Return the nearest enclosing site whose reuse skips this one. Reuse of half of a batch does not skip it."""
        around = self.around[i]
        while around is not None and self.labels[around].guidance is not None:
            around = self.around[around]
        return around

    def _emit(self, graph: fx.Graph, scope: int | None, env: dict[Any, fx.Node]) -> dict[str, Any]:
        """Write the nodes of `scope` and a cache_or_compute node for each site directly inside it.

        A site is written before the first reader of its values. Returns the attributes that the new graph refers to.
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
                self._call(graph, site, env, attributes)

        for node in self.gm.graph.nodes:
            if node in self.needed and node.op not in ("placeholder", "output") and self.owner.get(node) == scope:
                visit(node)
        for i, values in enumerate(self.values):
            for value in values if i == scope or self.around[i] == scope else ():
                visit(value)
            if not self.has_nodes[i] and self.around[i] == scope:
                self._call(graph, i, env, attributes)
        return attributes

    def _child(self, node: fx.Node, scope: int | None) -> int | None:
        """Return the site directly inside `scope` that contains `node`, or None."""
        site = self.owner.get(node)
        while site is not None and self.around[site] != scope:
            site = self.around[site]
        return None if site == scope else site

    def _live_ins(self, site: int) -> list[fx.Node]:
        """Return the nodes outside of the site's closure that its closure and slots read, in graph order."""
        closure = self.sites[site].closure
        read = {arg for name in closure for arg in self.nodes[name].all_input_nodes}
        slots = [slot for i in self.inside[site] for slot in self.slots[i]]
        read.update(node for slot in slots for node in (slot.read if slot.is_plain else (slot.value, *slot.read)))
        return sorted((node for node in read if node.name not in closure), key=self.position.__getitem__)

    def _call(self, graph: fx.Graph, site: int, env: dict[Any, fx.Node], attributes: dict[str, Any]) -> None:
        """Write the cache_or_compute node of a site. Adds its results to `env` and its subgraphs to `attributes`."""
        inner = self.inside[site][1:]
        keys: list[Any] = [*self._live_ins(site)]
        for i in inner:
            keys += [("reuse", i), *self._slot_keys(i)]
        keys += self._slot_keys(site) if self._is_read_inside(site) else []
        stored = [("stored", i, k) for i in self._stored_with(site) for k in range(self.widths[i])]
        body = attributes[f"compute_{self.slugs[site]}"] = self._body(site, keys, stored, env)
        instead = self._instead(site, keys, stored, body, env)
        if instead is not None:
            attributes[f"instead_{self.slugs[site]}"] = instead
        values = self._decoded(graph, site, env)
        label = self.labels[site]
        call = graph.call_function(
            cache_or_compute,
            (
                env["reuse", site],
                (*values, *(env["cached", i, k] for _, i, k in stored)),
                graph.get_attr(f"compute_{self.slugs[site]}"),
                tuple(env[key] for key in keys),
            ),
            {} if instead is None else {"instead": graph.get_attr(f"instead_{self.slugs[site]}")},
        )
        call.kwargs = {**call.kwargs, "site": self.sites[site].name, "guard": label.guard, "strategy": label.strategy}
        call.meta["values"] = tuple(self.position[value] for value in self.values[site])
        for k, key in enumerate((*self.values[site], *stored)):
            example = key if isinstance(key, fx.Node) else env["cached", key[1], key[2]]
            env[key] = graph.call_function(getitem, (call, k))
            env[key].meta = {"val": example.meta["val"], "nn_module_stack": example.meta.get("nn_module_stack")}
        if self._is_plain(site):
            env.update({("stored", site, k): env[slot.value] for k, slot in enumerate(self.slots[site])})

    def _instead(
        self, site: int, keys: list[Any], stored: list[Any], body: fx.GraphModule, outer: dict[Any, fx.Node]
    ) -> fx.GraphModule | None:
        """Return the subgraph that a reusing step runs for a core or for half of a batch, or None."""
        if self.sites[site].part is Part.CORE:
            return self._replaced(site, keys, stored, outer)
        if self.sites[site].part is Part.TILES:
            return self._tiled(site, keys, stored, outer)
        guidance = self.labels[site].guidance
        if guidance is None:
            return None
        own = set(self._slot_keys(site))
        labels = [
            guidance.labels[k.name] if isinstance(k, fx.Node) else Batch.SAME if k in own else _KEYS[k[0]] for k in keys
        ]
        if own:
            body = self._body(site, keys, [key for key in stored if key[1] != site], outer, encode=False)
        halved = halve(body, labels, guidance.batch, guidance.half)
        assert halved is not None, f"{self.sites[site].name} mixes samples and should have been refused"
        return self._added(site, keys, halved) if own else halved

    def _is_added(self, site: int) -> bool:
        """Return whether the slot's difference is added to the computed half of a batch."""
        return self.labels[site].guidance is not None and bool(self.slots[site])

    def _is_read_inside(self, site: int) -> bool:
        """Return whether the subgraph that a reusing step runs reads the site's own slot."""
        return self._is_added(site) or self.sites[site].part is Part.TILES

    def _added(self, site: int, keys: list[Any], gm: fx.GraphModule) -> fx.GraphModule:
        """Return the subgraph for half of a batch, with the slot's difference added to give the other half."""
        graph, output = gm.graph, gm.graph.output_node()
        env: dict[Any, fx.Node] = dict(zip(keys, graph.find_nodes(op="placeholder"), strict=True))
        results: Any = list(output.args[0])  # type: ignore[arg-type]
        with graph.inserting_before(output):
            for k, slot in enumerate(self.slots[site]):
                stored, place = self._slot_nodes(site, slot, env), self.position[slot.value]
                results[k] = slot.decode(graph, stored, env, place, base=results[k])
        own = [env["cached", site, k] for k in range(self.widths[site])]
        count = len(self.values[site])
        output.args = ((*results[:count], *own, *results[count:]),)
        return fx.GraphModule(gm, graph)

    def _slot_nodes(self, site: int, slot: Slot, env: dict[Any, fx.Node]) -> list[fx.Node]:
        """Return the inputs for the slot of one value: tensors of all computed values, and their weights."""
        first = (slot.first + age * self.widths[site] for age in range(slot.depth))
        stored = [env["cached", site, f + k] for f in first for k in range(slot.width)]
        return [*stored, env["weights", site]] if slot.depth > 1 else stored

    @staticmethod
    def _inputs(keys: list[Any], outer: dict[Any, fx.Node]) -> tuple[fx.Graph, dict[Any, fx.Node]]:
        """Return a new subgraph with an input for each key, and its `env`."""
        graph = fx.Graph()
        env: dict[Any, fx.Node] = {}
        for key in keys:
            env[key] = graph.placeholder(outer[key].name)
            env[key].meta = dict(outer[key].meta)
        return graph, env

    def _is_plain(self, site: int) -> bool:
        """Return whether the slots of a site store its values unchanged."""
        return all(slot.is_plain for slot in self.slots[site])

    def _stored_with(self, site: int) -> list[int]:
        """Return the sites whose slot tensors are results of the node of `site` in addition to its values."""
        return self.inside[site][1:] if self._is_plain(site) else self.inside[site]

    def _decoded(self, graph: fx.Graph, site: int, env: dict[Any, fx.Node]) -> list[fx.Node]:
        """Decode the slots of a site, before the node that takes the values."""
        values = []
        for slot in self.slots[site] if self.has_nodes[site] and not self._is_read_inside(site) else ():
            values.append(slot.decode(graph, self._slot_nodes(site, slot, env), env, self.position[slot.value]))
        return values

    def _replaced(self, site: int, keys: list[Any], stored: list[Any], outer: dict[Any, fx.Node]) -> fx.GraphModule:
        """Return the subgraph that computes a core's value from the slot of its CORE_STATE and the core's inputs."""
        graph, env = self._inputs(keys, outer)
        source = self.inside[site][-1]
        (slot,) = self.slots[source]
        tensors = [env["cached", source, k] for k in range(slot.width)]
        value = slot.decode(graph, tensors, env, self.position[slot.value])
        graph.output((value, *(env["cached", i, k] for _, i, k in stored)))
        return fx.GraphModule({}, graph)

    def _tiled(self, site: int, keys: list[Any], stored: list[Any], outer: dict[Any, fx.Node]) -> fx.GraphModule:
        """Return the subgraph that computes some tiles of a value and writes them into its slot."""
        graph, env = self._inputs(keys, outer)
        (slot,) = self.slots[site]
        assert isinstance(slot.codec, TileCodec)
        own, inside = [env["cached", site, k] for k in range(slot.width)], self.sites[site].closure
        copied = sum(slot.value in values for values in self.values) > 1
        value = write_tiles(graph, slot.codec, slot.value, inside, own, env, self.position, copied)
        graph.output((value, *(env["cached", i, k] for _, i, k in stored)))
        return fx.GraphModule({}, graph)

    def _body(
        self, site: int, keys: list[Any], stored: list[Any], outer: dict[Any, fx.Node], encode: bool = True
    ) -> fx.GraphModule:
        """Return the subgraph that computes a site. Its results are the values and the `stored` slot tensors.

        With `encode` False, it does not encode the site's own values.
        """
        graph, env = self._inputs(keys, outer)
        attributes = self._emit(graph, site, env)
        for slot in self.slots[site] if encode else ():
            encoded = slot.encode(graph, env, self.position[slot.value])
            env.update({("stored", site, slot.first + k): node for k, node in enumerate(encoded)})
        graph.output((*(env[value] for value in self.values[site]), *(env[key] for key in stored)))
        return fx.GraphModule(attributes, graph)
