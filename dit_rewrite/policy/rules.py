"""Policies: ordered rules (where: which sites, when: guard, do: strategy). The first rule that applies wins.

If no rule applies, the site computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from types import MappingProxyType

import sympy
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter, OverlappingSpans, TwoStores
from dit_rewrite.passes.analysis.sites import Part, Site
from dit_rewrite.passes.analysis.spans import Span
from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.satisfiability import Verdict, verdict
from dit_rewrite.passes.guards.symbols import Predicate, Value
from dit_rewrite.policy.site_rules import WEIGHING, SiteRule, SiteRules
from dit_rewrite.policy.strategies import (
    PLACES,
    Compute,
    Forecast,
    GuidanceDelta,
    Reuse,
    ShareGuidance,
    Strategy,
    parts,
)
from dit_rewrite.policy.where import Where

Spans = Mapping[Span, frozenset[int]]  # the blocks of each span


@dataclass(frozen=True)
class Rule:
    """Applies the strategy `do` to the sites that `where` selects, at steps where the guard `when` is proven.

    `when` is a Boolean expression over the symbols of `dit_rewrite.guards`. `do` may be two strategies that replace
    different parts of a site: (WindowResidual(), ShareGuidance("first")). `max_streak` is short for
    ``& (streak < max_streak)``: the site computes after that many consecutive reuses.

    Raises UnknownSymbol or NotBoolean for an invalid guard, and BadParameter for an invalid strategy or place.
    """

    when: Boolean
    do: Strategy | tuple[Strategy, ...] = field(default_factory=Reuse)
    where: Where = field(default_factory=Where)
    max_streak: InitVar[int | None] = None

    def __post_init__(self, max_streak: int | None) -> None:
        when = symbols.check(self.when)
        if not isinstance(self.where, Where):
            raise BadParameter("Rule", "where", self.where, 'a Where, such as Where(kinds=("self",))')
        if max_streak is not None:
            _whole("Rule", "max_streak", max_streak, 1)
            when &= symbols.streak < max_streak
        known = all(isinstance(do, Strategy) for do in self.strategies)
        if not known or sum(len(parts(do)) for do in self.strategies) != len(self.parts):
            raise BadParameter("Rule", "do", self.do, "a strategy of dit_rewrite.strategy, or two for different parts")
        spanning = (Compute, Reuse, Forecast, *((GuidanceDelta,) if self.where.is_all else ()))
        if self.where.span is not None and not all(isinstance(do, spanning) for do in self.strategies):
            allowed = "Reuse() or Forecast() for a span: other strategies need attention"
            raise BadParameter("Rule", "do", self.do, allowed)
        if not self.where.is_all and any(isinstance(do, GuidanceDelta) for do in self.strategies):
            raise BadParameter("Rule", "where", self.where, 'Where(span="output") for GuidanceDelta')
        object.__setattr__(self, "when", when)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        return self.do if isinstance(self.do, tuple) else (self.do,)

    @property
    def parts(self) -> frozenset[Part]:
        """The parts of a site that the rule replaces; empty if it computes."""
        return frozenset[Part]().union(*(parts(do, self.where.part) for do in self.strategies))

    def strategy(self, part: Part) -> Strategy:
        """Return the strategy for a part of a site."""
        return next((do for do in self.strategies if part in parts(do, self.where.part)), Compute())


def _whole(where: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadParameter(where, name, value, f"a whole number >= {least}")


@dataclass(frozen=True)
class MadeFor:
    """The model (by `plan.fingerprint`), the number of steps, and the scheduler (by `plan.describe_scheduler`, None if
    it is unknown) that a policy was searched for."""

    model: str
    steps: int
    scheduler: str | None = None


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules, and a name for reports.

    `lag`: with 0, guards read measurements of the current call, which waits for the device and needs a graph that is
    lowered as segments; with 1, they read those of the previous call. `warmup` and `cooldown` are the numbers of steps
    at the start and at the end that compute, short for ``& (step >= warmup)`` and ``& (step < num_steps - cooldown)``
    in every rule. `made_for`: if given, other models and numbers of steps are refused. Raises BadParameter.
    """

    rules: tuple[Rule, ...] = ()
    name: str = "policy"
    lag: int = 0
    made_for: MadeFor | None = None
    warmup: InitVar[int] = 0
    cooldown: InitVar[int] = 0

    def __post_init__(self, warmup: int, cooldown: int) -> None:
        _whole("Policy", "warmup", warmup, 0)
        _whole("Policy", "cooldown", cooldown, 0)
        if type(self.lag) is not int or self.lag not in (0, 1):
            raise BadParameter("Policy", "lag", self.lag, "0 or 1")
        if not isinstance(self.rules, tuple | list) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise BadParameter("Policy", "rules", self.rules, "a tuple of rules: Policy((rule,))")
        between = (symbols.step >= warmup) & ((symbols.step < symbols.num_steps - cooldown) if cooldown else sympy.true)
        rules = (replace(r, when=r.when & between) if r.parts else r for r in self.rules)
        object.__setattr__(self, "rules", tuple(rules))

    def __str__(self) -> str:
        return self.name

    @property
    def mentions(self) -> frozenset[str]:
        """The symbols that the guards mention, and the measurements that the forecasts need."""
        weighed = (do.measures for rule in self.rules for do in rule.strategies if isinstance(do, WEIGHING))
        return frozenset[str]().union(*(symbols.mentions(rule.when) for rule in self.rules), *weighed)

    @property
    def reads(self) -> frozenset[str]:
        """`mentions`, and the symbols that the places of the forecasts are computed from."""
        done = (getattr(do, "do", do) for rule in self.rules for do in rule.strategies)
        return self.mentions | {PLACES[do.over] for do in done if isinstance(do, Forecast)}

    @property
    def streams(self) -> frozenset[str]:
        """The names of the streams in the rules."""
        guided = (do for r in self.rules for do in r.strategies if isinstance(do, ShareGuidance | GuidanceDelta))
        shared = {do.stream for do in guided if do.stream}
        return frozenset(name for rule in self.rules for name in rule.where.streams or ()) | shared

    def spans(self, count: int, stack: Callable[[str | None], Sequence[int]], whole: bool) -> dict[Where, Spans]:
        """Return the spans that each `Where` selects in a graph of `count` blocks, with the blocks of each span.

        `stack` returns the blocks of a stack, given its name. `whole` says whether the graph is the whole model. In a
        part of the model, only a `Where` without an end selects spans: those of this part.

        Raises LayersOutside, or OverlappingSpans for two spans that overlap without one containing the other.
        """
        spans: dict[Where, Spans] = {}
        for where in dict.fromkeys(rule.where for rule in self.rules):
            if whole:
                where.check(count)
            if where.part is Part.SPAN and (whole or where.is_open):
                blocks = stack(where.stack)
                bounds = where.spans(blocks)
                spans[where] = {(first, end): frozenset(b for b in blocks if first <= b < end) for first, end in bounds}
        distinct = {span: blocks for found in spans.values() for span, blocks in found.items()}
        for (a, one), (b, other) in itertools.combinations(sorted(distinct.items(), key=lambda item: item[0]), 2):
            if one & other and not (one <= other or other <= one):
                raise OverlappingSpans(a, b)
        return spans

    def for_site(
        self,
        site: Site,
        known: Mapping[str, Value],
        spans: Mapping[Where, Collection[Span]] = MappingProxyType({}),
    ) -> SiteRules:
        """Return the rules that can reach a site, partially evaluated with the symbols `known` at rewrite time.

        `spans` maps each `Where` to the spans that it selects. Raises TwoStores if the rules need different slot
        formats.
        """
        reaching = []
        for rule in self.rules:
            if not rule.where.selects(site, spans.get(rule.where, ())):
                continue
            is_span = site.part in (Part.SPAN, Part.DELTA, Part.OUTPUT)  # `where` has chosen its layers already
            layers = sympy.true if is_span else rule.where.guard
            predicate = Predicate.of(rule.when & layers, known)
            do = rule.strategy(site.part)
            if not symbols.unreachable(predicate.guard) and not (
                _reads_earlier(do) and verdict(rule.when & layers, known) is Verdict.NEVER
            ):
                reaching.append(SiteRule(predicate, do, site.part in rule.parts, rule.where))
            if predicate.guard == sympy.true and not predicate.needs and rule.where.streams is None:
                break
        rules = SiteRules(tuple(reaching))
        if len(rules.slot_formats) > 1:
            raise TwoStores(site.name, rules.slot_formats)
        return rules


def _reads_earlier(do: Strategy) -> bool:
    """Return whether a strategy reads values of an earlier step. `verdict` assumes that reuse does."""
    return not isinstance(do, (Compute, ShareGuidance))
