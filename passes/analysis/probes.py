"""Sites for keys and values, and the probes and entropies that guards measure.

All are found by structure, like branches. Nodes that the model does not have (the change across the first block, the
entropy of an attention) are added to a copy of the graph, which is otherwise unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.attention_sites import arguments, cores
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.graph import Dependence, aten, is_contraction, is_copy, is_view, operands
from dit_rewrite.passes.analysis.grid import find_patch
from dit_rewrite.passes.analysis.output_sites import find_latent
from dit_rewrite.passes.analysis.site import Found, Kind, Part, Probe, Site
from dit_rewrite.passes.analysis.spans import Stream
from dit_rewrite.passes.analysis.stacks import Stacks
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_nodes
from dit_rewrite.passes.guards.measurements import Measurement, blocks


def find_keys(gm: fx.GraphModule, sites: Sequence[Site], invariant: frozenset[int]) -> tuple[list[Site], list[Refusal]]:
    """Return a site for the keys and values of each attention among `sites`, and the refusals.

    `invariant` are the positions of trajectory-invariant inputs. Keys and values that depend on these inputs alone are
    left out.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    not_moving = invariant_nodes(gm.graph, invariant)
    found, refused = [], []
    for site in sites:
        if site.kind is Kind.MLP:
            continue
        pairs = [operands(core)[1:] for core in cores(nodes, site)]
        values = dict.fromkeys(node for pair in pairs for node in pair if node not in not_moving)
        if values:
            named = tuple(node.name for node in values)
            found.append(replace(site, name=f"{site.name}.kv", values=named, part=Part.KV))
        else:
            reason = RefusalReason.TRAJECTORY_INVARIANT if pairs else RefusalReason.NO_KEYS
            refused.append(Refusal(site.values[0], site.name, reason))
    return found, refused


def add_entropy(gm: fx.GraphModule, site: Site, op: Any) -> Site:
    """Return `site` with the mean row entropy of its attention as an additional value.

    Adds a call of `op` (query, key, mask, scale, is_causal, enable_gqa) to the graph for each attention of the site.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    inside = sorted(cores(nodes, site), key=list(gm.graph.nodes).index)
    if not inside:
        return site
    measured = [_after(gm.graph, core, op, *_entropy_arguments(core)) for core in inside]
    node = measured[0]
    for other in measured[1:]:
        node = _after(gm.graph, other, aten.add.Tensor, node, other)
    if len(measured) > 1:
        node = _after(gm.graph, node, aten.div.Tensor, node, len(measured))
    return replace(site, values=(*site.values, node.name), entropy=len(site.values))


def _entropy_arguments(core: fx.Node) -> tuple[Any, ...]:
    """Return query, key, mask, scale, is_causal and enable_gqa of an attention op."""
    given = arguments(core)
    return tuple(given[name] for name in ("query", "key", "attn_mask", "scale", "is_causal", "enable_gqa"))


def _after(graph: fx.Graph, place: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """Insert a node right after `place`."""
    with graph.inserting_after(place):
        node = graph.call_function(target, arguments)
    values = fx.node.map_arg(arguments, lambda n: n.meta["val"])
    node.meta = {"val": target(*values), "nn_module_stack": place.meta.get("nn_module_stack")}
    return node


class Probes:
    """Finds the nodes that guards measure, and adds them to `gm` if the model does not have them."""

    def __init__(
        self,
        gm: fx.GraphModule,
        found: Found,
        static: frozenset[int],
        conditioning: frozenset[int] = frozenset(),
        whole: bool = True,
    ) -> None:
        """`static` and `conditioning` are positions of inputs. `whole`: the graph contains all of the model."""
        self.gm, self.found, self.whole = gm, found, whole
        self.static, self.conditioning = static, conditioning
        self.stream = Stream(gm.graph, found)
        self._known: dict[str, str | None] = {}

    def measured(self, asked: Measurement, site: Site) -> Probe | RefusalReason:
        """Return the probe for the measurement `asked` at `site`, or the reason why there is none."""
        if not self.whole and (asked.reads_output or asked.probe == "latent" or asked.filter is not None):
            return RefusalReason.PROBE_IN_PART
        found, output = self.of(asked.probe, site), self.of("output", site) if asked.reads_output else None
        if found is None or (asked.reads_output and output is None):
            return RefusalReason.NO_PROBE
        inputs = {node.name for node in self.gm.graph.find_nodes(op="placeholder")}
        probe = Probe(asked.name, found, found != output and found not in inputs, output)
        return probe if asked.filter is None else self._on_grid(probe)

    def _on_grid(self, probe: Probe) -> Probe | RefusalReason:
        """Return `probe` with the latent and the patch that each token covers, or the reason why they are unknown."""
        nodes = {node.name: node for node in self.gm.graph.nodes}
        latent = find_latent(self.gm.graph, self.static | self.conditioning)
        patch = None if latent is None else find_patch(self.gm.graph, latent, nodes[probe.node])
        if latent is None or patch is None:
            return RefusalReason.NO_GRID
        return probe._replace(latent=latent.name, patch=patch)

    def of(self, probe: str, site: Site) -> str | None:
        """Return the name of the node that the probe called `probe` measures for `site`, or None."""
        found = self._own(site) if probe == "self" else self._shared(probe)
        nodes = {node.name: node for node in self.gm.graph.nodes}
        return found if found is not None and measurable(nodes[found].meta["val"]) else None

    def _shared(self, probe: str) -> str | None:
        """Return the node of a probe that all sites share, or None. Finds or inserts the node once."""
        if probe not in self._known:
            find = {
                "modulated_input": self._modulated_input,
                "latent": lambda: find_latent(self.gm.graph, self.static | self.conditioning),
                "output": lambda: _largest(self.gm.graph.output_node().all_input_nodes),
            }
            first = blocks(probe)
            node = find[probe]() if first is None else self._first_blocks(*first)
            self._known[probe] = None if node is None else node.name
        return self._known[probe]

    def _own(self, site: Site) -> str | None:
        """Return the largest stream that the site reads."""
        sizes = {name: self.stream.nodes[name].meta["val"].numel() for name in site.streams}
        return max(sizes, key=lambda name: int(sizes[name]), default=None)

    def image_tokens(self) -> int | None:
        """Return the number of tokens of the stream that the model's output is computed from, or None if unknown."""
        pair = self._main
        return None if pair is None or pair[1].meta["val"].ndim != 3 else cost.shape(pair[1].meta["val"])[1]

    @cached_property
    def _main(self) -> tuple[fx.Node, fx.Node] | None:
        return self._across(1)

    def _across(self, count: int) -> tuple[fx.Node, fx.Node] | None:
        """Return the stream after and before the first `count` blocks of the main stack, or None.

        Of several streams, takes the one that the model's output is computed from.
        """
        stack = Stacks(self.stream).find().layers
        pairs = self.stream.pairs(stack[0], stack[count - 1] + 1, stack) if len(stack) >= count else None
        if not pairs:
            return None
        bases = {base: (value, base) for value, base in pairs}
        ways = (self.stream.walk(node, bases.__contains__) for node in self.stream.behind(stack))
        return next((bases[way[-1]] for way in ways if way is not None), pairs[0])

    def _first_blocks(self, count: int, behind: bool) -> fx.Node | None:
        pair = self._across(count)
        if pair is None or behind:
            return None if pair is None else pair[0]
        return _after(self.gm.graph, pair[0], aten.sub.Tensor, *pair)

    def _modulated_input(self) -> fx.Node | None:
        """Return the operand of the first contraction of the first attention branch, without views and casts."""
        dependence = Dependence(self.gm.graph, self.static)
        attention = (s for s in self.found.sites if s.kind in (Kind.SELF, Kind.JOINT, Kind.PARALLEL))
        site = next(attention, None)
        pair = self._main
        if site is None or pair is None:
            return None
        streams = [self.stream.nodes[name] for name in site.streams]
        stream = next((s for s in streams if s is pair[1]), streams[0])
        for node in self.gm.graph.nodes:
            if node is not stream and is_contraction(node) and dependence.depends(node, stream):
                read = next((o for o in operands(node) if dependence.depends(o, stream)), None)
                return None if read is None else _base(read)
        return None


def _largest(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """Return the largest floating-point tensor among `nodes` that has at least one dimension, or None."""
    tensors = [node for node in nodes if measurable(node.meta.get("val")) and node.meta["val"].ndim]
    return max(tensors, key=lambda node: math.prod(cost.shape(node.meta["val"])), default=None)


def _base(node: fx.Node) -> fx.Node:
    while is_view(node) or is_copy(node):
        node = node.all_input_nodes[0]
    return node


def measurable(value: object) -> bool:
    """Return whether `value` can be measured: it must be a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()
