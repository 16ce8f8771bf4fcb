"""Policies: ordered rules (where: which sites, when: guard, do: strategy). The first that applies wins.

Where none applies the site computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType

import sympy
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter, OverlappingSpans, Reason, TwoStores
from dit_rewrite.passes import guards
from dit_rewrite.passes.guards import Predicate, Value, is_known
from dit_rewrite.passes.notation import show
from dit_rewrite.passes.sites import Part, Site
from dit_rewrite.passes.spans import Span
from dit_rewrite.passes.verdict import Verdict, verdict
from dit_rewrite.runtime.decide import Choice, Choose, Moment, Read
from dit_rewrite.strategy import PLACES, Compute, Core, Forecast, GuidanceDelta, Reuse, ShareGuidance, Strategy, parts
from dit_rewrite.where import Where

WEIGHING = (Forecast, GuidanceDelta)  # the strategies that take a weighted sum of what a slot holds
Spans = Mapping[Span, frozenset[int]]  # and the blocks of each


@dataclass(frozen=True)
class Rule:
    """Where `when` is proven, the sites of `where` do `do`. `when` is a Boolean over the symbols of `guards`.

    `do` may be two strategies for two parts of a place: (WindowResidual(), ShareGuidance("first")).
    `max_streak` is short for ``& (streak < max_streak)``: so many reuses in a row, then one step computes.
    Raises UnknownSymbol or NotBoolean for a guard that has no meaning, BadParameter for a strategy that does not fit.
    """

    when: Boolean
    do: Strategy | tuple[Strategy, ...] = field(default_factory=Reuse)
    where: Where = field(default_factory=Where)
    max_streak: InitVar[int | None] = None

    def __post_init__(self, max_streak: int | None) -> None:
        when = guards.check(self.when)
        if not isinstance(self.where, Where):
            raise BadParameter("Rule", "where", self.where, 'a place, such as Where(kinds=("self",))')
        if max_streak is not None:
            _whole("Rule", "max_streak", max_streak, 1)
            when &= guards.streak < max_streak
        known = all(isinstance(do, Strategy) for do in self.strategies)
        if not known or sum(len(parts(do)) for do in self.strategies) != len(self.parts):
            raise BadParameter("Rule", "do", self.do, "a strategy of dit_rewrite.strategy, or two for different parts")
        spanning = (Compute, Reuse, Forecast, *((GuidanceDelta,) if self.where.is_all else ()))
        if self.where.span is not None and not all(isinstance(do, spanning) for do in self.strategies):
            allowed = "Reuse() or Forecast() where the place is a span: it is no attention"
            raise BadParameter("Rule", "do", self.do, allowed)
        if not self.where.is_all and any(isinstance(do, GuidanceDelta) for do in self.strategies):
            raise BadParameter("Rule", "where", self.where, 'Where(span="output") for GuidanceDelta')
        object.__setattr__(self, "when", when)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        return self.do if isinstance(self.do, tuple) else (self.do,)

    @property
    def parts(self) -> frozenset[Part]:
        """The parts of a place that it replaces; none: it computes."""
        return frozenset[Part]().union(*(parts(do, self.where.part) for do in self.strategies))

    def strategy(self, part: Part) -> Strategy:
        """What it does to a part of a place."""
        return next((do for do in self.strategies if part in parts(do, self.where.part)), Compute())


def _whole(where: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadParameter(where, name, value, f"a whole number >= {least}")


@dataclass(frozen=True)
class MadeFor:
    """What a policy that was searched is good for: a model, by `plan.fingerprint`, and a number of steps."""

    model: str
    steps: int


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules, and a name for reports.

    `lag`: 0 reads a measurement of this very call, which waits for the device and needs the graph in segments; 1 reads
    the last call's. `warmup` and `cooldown` are steps at the start and at the end that compute, short for
    ``& (step >= warmup)`` and ``& (step < num_steps - cooldown)`` in every rule. `made_for`: it is refused elsewhere.
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
        if isinstance(self.lag, bool) or self.lag not in (0, 1):
            raise BadParameter("Policy", "lag", self.lag, "0 or 1")
        if not isinstance(self.rules, tuple | list) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise BadParameter("Policy", "rules", self.rules, "a tuple of rules: Policy((rule,))")
        between = (guards.step >= warmup) & ((guards.step < guards.num_steps - cooldown) if cooldown else sympy.true)
        rules = (replace(r, when=r.when & between) if r.parts else r for r in self.rules)
        object.__setattr__(self, "rules", tuple(rules))

    def __str__(self) -> str:
        return self.name

    @property
    def mentions(self) -> frozenset[str]:
        """The symbols that its guards mention."""
        return frozenset[str]().union(*(guards.mentions(rule.when) for rule in self.rules))

    @property
    def reads(self) -> frozenset[str]:
        """The symbols that must be known: of its guards, and of the places that its forecasts ask for."""
        done = (getattr(do, "do", do) for rule in self.rules for do in rule.strategies)
        return self.mentions | {PLACES[do.over] for do in done if isinstance(do, Forecast)}

    @property
    def streams(self) -> frozenset[str]:
        """The streams that its rules name."""
        guided = (do for r in self.rules for do in r.strategies if isinstance(do, ShareGuidance | GuidanceDelta))
        shared = {do.stream for do in guided if do.stream}
        return frozenset(name for rule in self.rules for name in rule.where.streams or ()) | shared

    def spans(self, count: int, stack: Callable[[str | None], Sequence[int]], whole: bool) -> dict[Where, Spans]:
        """The spans that each place means in a graph of `count` blocks, and the blocks of each.

        `stack` gives the blocks of a stack by its name. Which of these are meant is known where the graph is the
        `whole` model; in a part of one, a place without an end means those of this part.
        Raises LayersOutside, and OverlappingSpans for two that are neither apart nor within one another.
        """
        spans: dict[Where, Spans] = {}
        for where in dict.fromkeys(rule.where for rule in self.rules):
            if whole:
                where.check(count)
            if where.part is Part.SPAN and (whole or where.is_open):
                blocks = stack(where.stack)
                meant = where.spans(blocks)
                spans[where] = {(first, end): frozenset(b for b in blocks if first <= b < end) for first, end in meant}
        held = {span: blocks for found in spans.values() for span, blocks in found.items()}
        for (a, mine), (b, other) in itertools.combinations(sorted(held.items(), key=lambda item: item[0]), 2):
            if mine & other and not (mine <= other or other <= mine):
                raise OverlappingSpans(a, b)
        return spans

    def for_site(
        self,
        site: Site,
        known: Mapping[str, Value],
        spans: Mapping[Where, Collection[Span]] = MappingProxyType({}),
    ) -> SiteRules:
        """The rules that can reach a site, partially evaluated by what is `known` of it at rewrite time.

        `spans` are those that each place means. Raises TwoStores where a slot would have to hold two kinds of values.
        """
        reaching = []
        for rule in self.rules:
            if not rule.where.selects(site, spans.get(rule.where, ())):
                continue
            made_for_it = site.part in (Part.SPAN, Part.DELTA, Part.OUTPUT)  # a span was made for its layers
            placed = sympy.true if made_for_it else rule.where.guard
            predicate = Predicate.of(rule.when & placed, known)
            do = rule.strategy(site.part)
            if not guards.unreachable(predicate.guard) and not (
                _reads_earlier(do) and verdict(rule.when & placed, known) is Verdict.NEVER
            ):
                reaching.append(SiteRule(predicate, do, site.part in rule.parts, rule.where))
            if predicate.guard == sympy.true and not predicate.needs and rule.where.streams is None:
                break
        rules = SiteRules(tuple(reaching))
        if len(rules.forms) > 1:
            raise TwoStores(site.name, rules.forms)
        return rules


def _reads_earlier(do: Strategy) -> bool:
    """Whether a strategy needs what an earlier step computed, which is what verdicts speak of."""
    return not isinstance(do, (Compute, ShareGuidance))  # a difference is one of earlier steps


@dataclass(frozen=True)
class SiteRule:
    """A rule as one site sees it; ``mine``: it replaces this very part of the place, and does not compute it."""

    predicate: Predicate
    do: Strategy
    mine: bool
    where: Where


@dataclass(frozen=True)
class SiteRules:
    """What is left of a policy for one site."""

    rules: tuple[SiteRule, ...]

    @property
    def reachable(self) -> bool:
        """Whether some step could do anything but compute."""
        return any(rule.mine for rule in self.rules)

    def measuring(self, known: Container[str]) -> SiteRules:
        """Less the rules for reuse whose measurements are not all `known` to be had: they can never be proven."""
        provable = (rule for rule in self.rules if not rule.mine or all(n in known for n in rule.predicate.measured))
        return SiteRules(tuple(provable))

    @property
    def forms(self) -> frozenset[str | None | ShareGuidance | GuidanceDelta | Core]:
        """What its slot is asked to hold, or how else it is done: a store's name, or a strategy."""
        return frozenset(_form(rule.do) for rule in self.rules if rule.mine)

    @property
    def form(self) -> str | None | ShareGuidance | GuidanceDelta | Core:
        return next(iter(self.forms), None)

    @property
    def depth(self) -> int:
        """How many computed values its slot keeps."""
        return max((rule.do.depth for rule in self.rules if rule.mine and isinstance(rule.do, WEIGHING)), default=1)

    @property
    def foreseen(self) -> bool:
        """Whether a decision of a step to come is known from the step alone."""
        return self.needs <= guards.FORESEEN

    @property
    def needs(self) -> frozenset[str]:
        """The symbols that must be known when it is decided."""
        return frozenset[str]().union(*(rule.predicate.needs for rule in self.rules))

    @property
    def guard(self) -> str:
        """The guards as mathematics, in order."""
        return "; ".join(show(rule.predicate.guard) for rule in self.rules)

    @property
    def strategy(self) -> str:
        """The strategies as text, in order."""
        return "; ".join(repr(rule.do) for rule in self.rules)

    def chooser(self) -> Choose:
        """The decision as a function of the step. Its results are kept: sites with the same rules share it."""
        return _chooser(self)


@lru_cache(maxsize=4096)
def _chooser(site: SiteRules) -> Choose:
    @lru_cache(maxsize=65536)
    def first(moment: Moment, layer: int, age: int | None, streak: int, start: int) -> int | None:
        """The first rule from `start` on that holds, or would if its measurements did.

        One that would have the site compute also counts where what it needs is not known: a later rule that reuses
        must not take its place.
        """
        symbols = _symbols(moment, layer, age, streak)
        for i, rule in enumerate(site.rules[start:], start):
            proven = rule.predicate.may_hold if rule.predicate.measured else rule.predicate.holds
            unknown = not rule.mine and rule.predicate.lacks(symbols)
            if rule.where.in_stream(moment.stream) and (unknown or proven(symbols)):
                return i
        return None

    def choose(moment: Moment, layer: int, age: int | None, streak: int, read: Read) -> Choice:
        unproven = False
        i = first(moment, layer, age, streak, 0)
        while i is not None:
            rule = site.rules[i]
            measured = {name: read(name) for name in rule.predicate.measured}
            symbols = {**_symbols(moment, layer, age, streak), **measured}
            if rule.predicate.holds(symbols):
                weigh = rule.do.weights if isinstance(rule.do, WEIGHING) and rule.mine else None
                return Choice(rule.mine, Reason.RULE, weigh)
            unproven |= None in measured.values()
            if not rule.mine and not all(is_known(name, symbols.get(name)) for name in rule.predicate.needs):
                break
            i = first(moment, layer, age, streak, i + 1)
        blind = unproven and (moment.sigma, moment.snr) == (None, None) and guards.reads_noise(site.needs)
        return Choice(False, Reason.NOT_MEASURED if unproven and not blind else _lacking(moment))

    @lru_cache(maxsize=1024)
    def _lacking(moment: Moment) -> Reason:
        if moment.num_steps is None and site.needs & guards.TOTALS:
            return Reason.TOTAL_UNKNOWN
        return Reason.NOISE_UNKNOWN if moment.snr is None and guards.reads_noise(site.needs) else Reason.NO_RULE

    return choose


def _symbols(moment: Moment, layer: int, age: int | None, streak: int) -> dict[str, Value]:
    progress = None if moment.num_steps is None else Fraction(moment.step, max(moment.num_steps - 1, 1))
    return {
        "step": moment.step,
        "num_steps": moment.num_steps,
        "progress": progress,
        "layer": layer,
        "num_layers": moment.num_layers,
        "age": age,
        "streak": streak,
        "sigma": moment.sigma,
        "snr": moment.snr,
    }


def _form(do: Strategy) -> str | None | ShareGuidance | GuidanceDelta | Core:
    return do if isinstance(do, ShareGuidance | GuidanceDelta | Core) else getattr(do, "store", None)


def forced(*_: object, **__: object) -> Choice:
    """The chooser of reuse 0: every decision computes."""
    return Choice(False, Reason.FORCED)
