"""Meet of policy and graph: the sites that the rules ask for, what their guards measure, and the rules of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

import dit_rewrite.kernels.attention_entropy  # noqa: F401  # registers the op
from dit_rewrite.errors import Reason
from dit_rewrite.forms import Form, Forms
from dit_rewrite.passes.branches import Refusal
from dit_rewrite.passes.capture import Captured
from dit_rewrite.passes.cores import find_cores, find_shared
from dit_rewrite.passes.guarded import Guarded
from dit_rewrite.passes.guards import ENTROPY, MEASURED, PROBED, Value
from dit_rewrite.passes.parts import Probes, add_entropy, copied, find_keys
from dit_rewrite.passes.site import Found, Part, Site, close
from dit_rewrite.passes.spans import Stream, find_spans
from dit_rewrite.policy import Policy, SiteRules


@dataclass(frozen=True)
class Placed:
    """The graph with what guards measure in it, all its sites, and the rules of each of them.

    ``gm`` is the captured graph itself where the policy asks for nothing but branches. ``forms`` are what slots hold.
    """

    gm: fx.GraphModule
    found: Found
    rules: tuple[SiteRules, ...]
    forms: Mapping[int, Form]

    @property
    def reached(self) -> tuple[int, ...]:
        """The indices of the sites that are guarded."""
        return tuple(i for i, rules in enumerate(self.rules) if rules.reachable)

    @property
    def labels(self) -> list[Guarded]:
        """The guarded sites as pass 03 takes them."""
        return [Guarded(i, self.rules[i].guard, self.rules[i].strategy, *self.forms[i]) for i in self.reached]


def place(captured: Captured, found: Found, policy: Policy, whole: bool, hoist: bool) -> Placed:
    """Find what `policy` asks for in a graph whose branches are `found`; `whole`: it is all of the model.

    Raises LayersOutside, OverlappingSpans, TwoStores.
    """
    spans = policy.spans(found.num_layers, whole) if found.sites else {}
    asked = frozenset[Part]().union(*(rule.parts for rule in policy.rules))
    adds = asked - {Part.BRANCH, Part.SPAN} or any(spans.values()) or policy.mentions & MEASURED
    gm = copied(captured.gm) if adds else captured.gm
    sites, refused = list(found.sites), list(found.refused)
    steady = captured.static | captured.steady if hoist else captured.static
    if Part.KV in asked:
        keys, without = find_keys(gm, found.sites, steady)
        sites, refused = [*sites, *keys], [*refused, *without]
    if Part.CORE in asked:
        inner, without = find_cores(gm, found.sites)
        sites, refused = [*sites, *inner], [*refused, *without]
    if Part.GUIDANCE in asked:
        sites += find_shared(found.sites)
    if any(spans.values()):
        wanted = {span for each in spans.values() for span in each}
        lengthened, without = find_spans(Stream(gm.graph, found), wanted)
        sites, refused = [*sites, *lengthened], [*refused, *without]
    if not whole:
        partial = [w for w in dict.fromkeys(rule.where for rule in policy.rules) if w.span and w not in spans]
        refused += [Refusal("", f"{where.span} of layers", Reason.SPAN_IN_PART) for where in partial]
    rules = [policy.for_site(site, known(found, site.layer, whole), spans) for site in sites]
    measuring = _Measuring(gm, found, captured.static, policy.lag)
    sites, rules, without = measuring.add(sites, rules)
    if gm is not captured.gm:
        closed = close(gm.graph, [*sites, *([found.hoisted] if found.hoisted is not None else [])])
        sites, moved = list(closed[: len(sites)]), closed[len(sites) :]
        found = replace(found, hoisted=moved[0] if moved else None)
    for i in _early(sites, gm) if not policy.lag else ():
        if rules[i].reachable:
            without.append(Refusal(sites[i].values[0], sites[i].name, Reason.PROBE_WITHIN))
            rules[i] = SiteRules(())
    for i, site in enumerate(sites):
        if site.part is Part.HELD:  # it goes with its core, which stands before it
            rules[i] = rules[i - 1]
    forms = {}
    known_forms = Forms(captured, measuring.probes, steady)
    for i, site in enumerate(sites):
        form = known_forms.of(site, rules[i]) if rules[i].reachable else Reason.UNREACHED
        if not isinstance(form, Reason):
            forms[i] = form
        elif rules[i].reachable:
            rules[i] = SiteRules(())
            without += [Refusal(site.values[0], site.name, form)] if site.part is not Part.HELD else []
    found = replace(found, sites=tuple(sites), refused=(*refused, *without))
    return Placed(gm, found, tuple(rules), forms)


def known(found: Found, layer: int, whole: bool) -> dict[str, Value]:
    """What is known of a site at rewrite time. In a part of a model its layer is not: blocks may share the graph."""
    return {"layer": layer, "num_layers": found.num_layers} if whole else {}


class _Measuring:
    """Puts what guards measure into the graph, and takes away the rules that nothing could prove."""

    def __init__(self, gm: fx.GraphModule, found: Found, static: frozenset[int], lag: int) -> None:
        self.gm, self.lag = gm, lag
        self.probes = Probes(gm, found, static)

    def add(
        self, sites: Sequence[Site], rules: Sequence[SiteRules]
    ) -> tuple[list[Site], list[SiteRules], list[Refusal]]:
        refused: list[Refusal] = []
        measuring: list[Site] = []
        for site, site_rules in zip(sites, rules, strict=True):
            if site_rules.reachable and site.part is not Part.HELD:
                site, reasons = self._measure(site, site_rules)
                refused += [Refusal(site.values[0], site.name, reason) for reason in reasons]
            measuring.append(site)
        if not self.lag:
            position = {node.name: i for i, node in enumerate(self.gm.graph.nodes)}
            measuring = [_before(site, position, refused) for site in measuring]
        had = [{name for name, _ in site.probes} | ({ENTROPY} if site.entropy else set()) for site in measuring]
        return measuring, [r.measuring(h) for r, h in zip(rules, had, strict=True)], refused

    def _measure(self, site: Site, rules: SiteRules) -> tuple[Site, list[Reason]]:
        """The site with the nodes that its guards measure, under the names of their symbols."""
        found = {name: self.probes.of(PROBED[name][1], site) for name in sorted(rules.needs & PROBED.keys())}
        site = replace(site, probes=tuple((name, node) for name, node in found.items() if node is not None))
        reasons = [Reason.NO_PROBE] if None in found.values() else []
        if ENTROPY in rules.needs:
            site = add_entropy(self.gm, site, torch.ops.dit_rewrite.attention_entropy.default)
            reasons += [Reason.NO_KEYS] if site.entropy is None else []
        return site, reasons


def _before(site: Site, position: Mapping[str, int], refused: list[Refusal]) -> Site:
    """The site with those of its probes that the graph computes before it."""
    begin = min(position[value] for value in site.values)
    probes = tuple((name, probe) for name, probe in site.probes if position[probe] < begin)
    if probes != site.probes:
        refused.append(Refusal(site.values[0], site.name, Reason.PROBE_WITHIN))
    return replace(site, probes=probes)


def _early(sites: Sequence[Site], gm: fx.GraphModule) -> set[int]:
    """The sites that run before a probe by which a site around them is decided."""
    position = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    early = set()
    for i, site in enumerate(sites):
        begin = min(position[value] for value in site.values)
        around = site.parent
        while around is not None:
            if any(position[probe] > begin for _, probe in sites[around].probes):
                early.add(i)
            around = sites[around].parent
    return early
