"""Bind a policy to a captured graph: find the sites that its rules select, add the probes of their guards, and choose
their slot formats."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

import dit_rewrite.kernels.attention_entropy  # noqa: F401  # registers the op
from dit_rewrite.compiler.attention_codecs import Blockwise
from dit_rewrite.compiler.request import Request
from dit_rewrite.compiler.slot_formats import SlotFormat, SlotFormats
from dit_rewrite.compiler.state_memory import require_room
from dit_rewrite.errors import Reason, RefusalReason
from dit_rewrite.passes.analysis.attention_sites import find_cores, find_shared, find_tiled
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.graph import copied
from dit_rewrite.passes.analysis.output_sites import find_delta, find_output
from dit_rewrite.passes.analysis.probes import Probes, add_entropy, find_keys
from dit_rewrite.passes.analysis.site import Found, Part, Probe, Site, close
from dit_rewrite.passes.analysis.spans import Stream, find_spans
from dit_rewrite.passes.analysis.stacks import Stacks
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.guards.measurements import ERROR, Measurement, measurement
from dit_rewrite.passes.guards.symbols import ENTROPY, Value, measured
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.passes.rewrite.guarded_graph import Guarded
from dit_rewrite.passes.rewrite.tiles import TileCodec
from dit_rewrite.policy.rules import Policy, Spans
from dit_rewrite.policy.site_rules import SiteRules
from dit_rewrite.policy.where import Where


@dataclass(frozen=True)
class Bound:
    """A graph with the probes of guards, its sites, and the rules of each site.

    ``gm`` is the captured graph itself if the policy needs only branches. ``formats`` has the slot format of each
    reachable site.
    """

    gm: fx.GraphModule
    found: Found
    rules: tuple[SiteRules, ...]
    formats: Mapping[int, SlotFormat]

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """The candidates that are not sites, with the reasons."""
        return self.found.refused

    def after(self, gm: fx.GraphModule) -> Bound:
        """Return a copy with the closures and costs of the sites in `gm`, a graph with fewer nodes."""
        return replace(self, found=replace(self.found, sites=close(gm.graph, self.found.sites)))

    def without(self, sites: Collection[int]) -> Bound:
        """Return a copy in which these sites are not guarded, because their values exceed the memory budget."""
        rules = tuple(SiteRules(()) if i in sites else each for i, each in enumerate(self.rules))
        found = [self.found.sites[i] for i in sorted(sites)]
        left = [
            Refusal(site.values[0], site.name, RefusalReason.OVER_BUDGET)
            for site in found
            if site.part is not Part.CORE_STATE
        ]
        formats = {i: each for i, each in self.formats.items() if i not in sites}
        return replace(
            self, rules=rules, formats=formats, found=replace(self.found, refused=(*self.found.refused, *left))
        )

    @property
    def reached(self) -> tuple[int, ...]:
        """The indices of the guarded sites."""
        return tuple(i for i, rules in enumerate(self.rules) if rules.reachable)

    @property
    def labels(self) -> list[Guarded]:
        """The sites to guard, as `insert_guards` takes them."""
        return [
            Guarded(i, self.rules[i].guard, self.rules[i].strategy, *self.formats[i], self.rules[i].depth)
            for i in self.reached
        ]


def run(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    """The pass: put a Bound into the context, and return the graph with probes."""
    bound = bind(ctx[Captured], ctx[Found], ctx[Policy], ctx[Request].whole, ctx[Request].hoist)
    ctx.put(bound)
    return bound.gm


def bind(captured: Captured, found: Found, policy: Policy, whole: bool, hoist: bool) -> Bound:
    """Find the sites that `policy` selects in a graph whose branches are `found`.

    `whole`: the graph is the whole model. `hoist`: trajectory-invariant values are computed once per trajectory.

    Raises LayersOutside, OverlappingSpans, TwoStores.
    """
    stacks = Stacks(Stream(captured.gm.graph, found))
    spans = policy.spans(found.num_layers, lambda name: stacks.find(name).layers, whole) if found.sites else {}
    asked = frozenset[Part]().union(*(rule.parts for rule in policy.rules))
    adds = asked - {Part.BRANCH, Part.SPAN} or any(spans.values()) or measured(policy.mentions)
    gm = copied(captured.gm) if adds else captured.gm
    steady = captured.static | captured.conditioning if hoist else captured.static
    wheres = [rule.where for rule in policy.rules if Part.OUTPUT in rule.parts]
    sites, refused = _asked(gm, found, asked, spans, steady, {where.minus for where in wheres})
    rules = [policy.for_site(site, known(found, site.layer, whole), spans) for site in sites]
    measuring = _Measuring(gm, found, captured, whole, policy.lag)
    sites, rules, unmeasured = measuring.add(sites, rules)
    if gm is not captured.gm:
        sites = list(close(gm.graph, sites))
    early = _refuse_early(sites, rules, gm) if not policy.lag else []
    _follow_cores(sites, rules)
    slot_formats = SlotFormats(captured, measuring.probes)
    formats, unformatted = _formats(sites, rules, slot_formats)
    unformatted += _refuse_within_halves(sites, rules, formats)
    for i, chosen in formats.items():
        sites[i] = replace(sites[i], conditioned=slot_formats.is_conditioned(sites[i], chosen))
    outside = _outside(policy, spans, stacks, whole) if found.sites else []
    refused = [*found.refused, *refused, *outside, *unmeasured, *early, *unformatted]
    return Bound(gm, replace(found, sites=tuple(sites), refused=tuple(refused)), tuple(rules), formats)


def _asked(
    gm: fx.GraphModule,
    found: Found,
    asked: frozenset[Part],
    spans: Mapping[Where, Spans],
    steady: frozenset[int],
    outputs: Collection[str | None],
) -> tuple[list[Site], list[Refusal]]:
    """Find the sites of all parts that some rule replaces: the branches, parts of branches, spans and outputs."""
    sites, refused = list(found.sites), list[Refusal]()
    wanted = {span: blocks for each in spans.values() for span, blocks in each.items()}
    finders: tuple[tuple[bool, Callable[[], tuple[Sequence[Site], Sequence[Refusal]]]], ...] = (
        (Part.KV in asked, lambda: find_keys(gm, found.sites, steady)),
        (Part.CORE in asked, lambda: find_cores(gm, found.sites)),
        (Part.CFG_SHARED in asked, lambda: (find_shared(found.sites), [])),
        (Part.TILES in asked, lambda: (find_tiled(found.sites), [])),
        (bool(wanted), lambda: find_spans(Stream(gm.graph, found), wanted)),
        (Part.DELTA in asked, lambda: find_delta(gm)),
        (None in outputs, lambda: find_output(gm, steady, less_latent=False)),
        ("latent" in outputs, lambda: find_output(gm, steady, less_latent=True)),
    )
    for is_asked, find in finders:
        if is_asked:
            more, without = find()
            sites, refused = [*sites, *more], [*refused, *without]
    return sites, refused


def _outside(policy: Policy, spans: Mapping[Where, Spans], stacks: Stacks, whole: bool) -> list[Refusal]:
    """Return the places that rules for spans leave out: blocks of other stacks, and spans that are undefined in a part
    of a model."""
    refused: dict[Refusal, None] = {}
    for where in dict.fromkeys(rule.where for rule in policy.rules if rule.where.part is Part.SPAN):
        selected = spans.get(where)
        if selected is None:
            refused[Refusal("", f"{where.span} of layers", RefusalReason.SPAN_IN_PART)] = None
            continue
        refused.update(dict.fromkeys(stacks.find(where.stack).refused))
        if not selected and stacks.find(where.stack).layers:
            refused[Refusal("", f"{where.span} of layers", RefusalReason.NO_BLOCKS)] = None
        elif selected and not whole:
            refused[Refusal("", f"{where.span} of layers", RefusalReason.SPAN_PER_GRAPH)] = None
    return list(refused)


def _refuse_early(sites: Sequence[Site], rules: list[SiteRules], gm: fx.GraphModule) -> list[Refusal]:
    """Remove the rules of sites that run before the probe that decides an enclosing site."""
    refused = []
    for i in sorted(_early(sites, gm)):
        if rules[i].reachable:
            refused.append(Refusal(sites[i].values[0], sites[i].name, RefusalReason.PROBE_WITHIN))
            rules[i] = SiteRules(())
    return refused


def _follow_cores(sites: Sequence[Site], rules: list[SiteRules]) -> None:
    """Give the stored state of each attention core the rules of the core, which is the site before it."""
    for i, site in enumerate(sites):
        if site.part is Part.CORE_STATE:
            rules[i] = rules[i - 1]


def _formats(
    sites: Sequence[Site], rules: list[SiteRules], known: SlotFormats
) -> tuple[dict[int, SlotFormat], list[Refusal]]:
    """Return the slot format of each reachable site. The rules of a site that cannot have one are removed."""
    formats, refused = dict[int, SlotFormat](), list[Refusal]()
    for i, site in enumerate(sites):
        if not rules[i].reachable:
            continue
        chosen = known.of(site, rules[i])
        if not isinstance(chosen, RefusalReason):
            formats[i] = chosen
        else:
            rules[i] = SiteRules(())
            refused += [Refusal(site.values[0], site.name, chosen)] if site.part is not Part.CORE_STATE else []
    codecs = ((chosen[0], sites[i]) for i, chosen in formats.items() if sites[i].part is Part.CORE)
    require_room([(codec, known.nodes[site.values[0]]) for codec, site in codecs if isinstance(codec, Blockwise)])
    return formats, refused


def _refuse_within_halves(
    sites: Sequence[Site], rules: list[SiteRules], formats: dict[int, SlotFormat]
) -> list[Refusal]:
    """Remove the rules of sites whose state cannot be halved, within a site of which half of a batch is computed."""
    refused = []
    halved = {i for i, (_, guidance) in formats.items() if guidance is not None}
    for i in [i for i, (codec, _) in formats.items() if isinstance(codec, Blockwise | TileCodec)]:
        if halved.isdisjoint(_around(sites, i)):
            continue
        del formats[i]
        rules[i] = SiteRules(())
        if sites[i].part is not Part.CORE_STATE:
            refused.append(Refusal(sites[i].values[0], sites[i].name, RefusalReason.WITHIN_HALF))
    return refused


def _around(sites: Sequence[Site], i: int) -> Iterator[int]:
    """Yield the sites that enclose site `i`."""
    while (parent := sites[i].parent) is not None:
        yield parent
        i = parent


def known(found: Found, layer: int, whole: bool) -> dict[str, Value]:
    """Return the guard symbols that are known at rewrite time. In a part of a model the layer is unknown, because
    several blocks may share the graph."""
    return {"layer": layer, "num_layers": found.num_layers} if whole else {}


class _Measuring:
    """Adds the probes of guards to the graph, and removes rules whose measurements are not available."""

    def __init__(self, gm: fx.GraphModule, found: Found, captured: Captured, whole: bool, lag: int) -> None:
        self.gm, self.lag = gm, lag
        self.probes = Probes(gm, found, captured.static, captured.conditioning, whole)

    def add(
        self, sites: Sequence[Site], rules: Sequence[SiteRules]
    ) -> tuple[list[Site], list[SiteRules], list[Refusal]]:
        refused: list[Refusal] = []
        measuring: list[Site] = []
        self._verifies = any(site_rules.verifies for site_rules in rules)
        for site, site_rules in zip(sites, rules, strict=True):
            if site_rules.reachable and site.part is not Part.CORE_STATE:
                site, reasons = self._measure(site, site_rules)
                refused += [Refusal(site.values[0], site.name, reason) for reason in reasons]
            measuring.append(site)
        if not self.lag:
            position = {node.name: i for i, node in enumerate(self.gm.graph.nodes)}
            measuring = [_before(site, position, refused) for site in measuring]
        had = [{probe.symbol for probe in site.probes} | ({ENTROPY} if site.entropy else set()) for site in measuring]
        for known, site_rules in zip(had, rules, strict=True):
            known |= {e.name for e in site_rules.errors if self._lacks(e, site_rules) is None}
        return measuring, [r.measuring(h) for r, h in zip(rules, had, strict=True)], refused

    def _measure(self, site: Site, rules: SiteRules) -> tuple[Site, list[RefusalReason]]:
        """Return the site with the probes of its guards, and the reasons why probes are missing."""
        asked = [found for name in sorted(rules.needs) if (found := measurement(name)) is not None]
        probes: list[Probe | Reason | None] = [
            self._lacks(each, rules) if each.statistic == ERROR else self.probes.measured(each, site) for each in asked
        ]
        site = replace(site, probes=tuple(probe for probe in probes if isinstance(probe, Probe)))
        reasons = list(dict.fromkeys(probe for probe in probes if isinstance(probe, RefusalReason)))
        if ENTROPY in rules.needs:
            site = add_entropy(self.gm, site, torch.ops.dit_rewrite.attention_entropy.default)
            reasons += [RefusalReason.NO_KEYS] if site.entropy is None else []
        return site, reasons

    def _lacks(self, error: Measurement, rules: SiteRules) -> Reason | None:
        """Return why a forecast error in the guard of a site is not available, or None if it is."""
        if error.probe == "self":
            return RefusalReason.NO_FORECAST if rules.forecast is None else None
        if not self.probes.whole:
            return RefusalReason.PROBE_IN_PART
        return None if self._verifies else RefusalReason.NOT_VERIFIED


def _before(site: Site, position: Mapping[str, int], refused: list[Refusal]) -> Site:
    """Return the site with only those probes that the graph computes before it."""
    begin = min(position[value] for value in site.values)
    probes = tuple(probe for probe in site.probes if not probe.waits or position[probe.node] < begin)
    if probes != site.probes:
        refused.append(Refusal(site.values[0], site.name, RefusalReason.PROBE_WITHIN))
    return replace(site, probes=probes)


def _early(sites: Sequence[Site], gm: fx.GraphModule) -> set[int]:
    """Return the sites that run before the probe that decides an enclosing site."""
    position = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    early = set()
    for i, site in enumerate(sites):
        begin = min(position[value] for value in site.values)
        around = site.parent
        while around is not None:
            if any(position[probe] > begin for probe in sites[around].awaited):
                early.add(i)
            around = sites[around].parent
    return early
