"""The rules of a policy for one site of a graph, and how they decide at each step."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dit_rewrite.errors import DecisionReason
from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.measurements import ERROR, Measurement, measurement
from dit_rewrite.passes.guards.notation import show
from dit_rewrite.passes.guards.symbols import Predicate, Value, is_known
from dit_rewrite.policy.strategies import (
    COMPARABLE,
    Core,
    Forecast,
    GuidanceDelta,
    ReuseTiles,
    ShareGuidance,
    Strategy,
    Verify,
)
from dit_rewrite.policy.where import Where
from dit_rewrite.runtime.decide import Choice, Choose, Read
from dit_rewrite.runtime.history import Moment

WEIGHING = (Forecast, GuidanceDelta)  # strategies that compute a weighted sum of the tensors in a slot

# a dtype or quantised format of stored values (None: as they are), or a strategy with a format of its own
RuleFormat = str | None | ShareGuidance | GuidanceDelta | ReuseTiles | Core


@dataclass(frozen=True)
class SiteRule:
    """A rule for one site. ``replaces_part``: it replaces this part of the site instead of computing it."""

    predicate: Predicate
    do: Strategy
    replaces_part: bool
    where: Where

    @property
    def measured(self) -> tuple[str, ...]:
        """The measured symbols of the guard and of the forecast's weights."""
        weighed = self.do.measures if self.replaces_part and isinstance(self.do, WEIGHING) else ()
        return (*self.predicate.measured, *weighed)


@dataclass(frozen=True)
class SiteRules:
    """The rules of a policy that can reach one site, in order."""

    rules: tuple[SiteRule, ...]

    @property
    def reachable(self) -> bool:
        """Whether the site may be reused at some step."""
        return any(rule.replaces_part for rule in self.rules)

    def measuring(self, known: Container[str]) -> SiteRules:
        """Return the rules without those that reuse by a measurement not in `known`: they can never be proven."""
        provable = (rule for rule in self.rules if not rule.replaces_part or all(n in known for n in rule.measured))
        return SiteRules(tuple(provable))

    @property
    def slot_formats(self) -> frozenset[RuleFormat]:
        """The slot formats that the rules need: names of stores, or strategies with formats of their own."""
        return frozenset(_slot_format(rule.do) for rule in self.rules if rule.replaces_part)

    @property
    def slot_format(self) -> RuleFormat:
        """The slot format of the rules; None also if no rule reuses the site."""
        return next(iter(self.slot_formats), None)

    @property
    def depth(self) -> int:
        """The number of computed values that the slot keeps."""
        return max(
            (rule.do.depth for rule in self.rules if rule.replaces_part and isinstance(rule.do, WEIGHING)), default=1
        )

    @property
    def foreseen(self) -> bool:
        """Whether the decisions of future steps depend on the step alone."""
        return self.needs <= symbols.FORESEEN

    @property
    def needs(self) -> frozenset[str]:
        """The symbols that a decision needs."""
        return frozenset[str]().union(*((*rule.predicate.needs, *rule.measured) for rule in self.rules))

    @property
    def errors(self) -> tuple[Measurement, ...]:
        """The forecast errors that the guards mention."""
        found = (measurement(name) for name in sorted(self.needs))
        return tuple(each for each in found if each is not None and each.statistic == ERROR)

    @property
    def forecast(self) -> Forecast | None:
        """The first forecast in the rules whose stored values are comparable with computed ones; None if none is."""
        replacing = (rule.do for rule in self.rules if rule.replaces_part)
        return next((do for do in replacing if isinstance(do, Forecast) and do.store in COMPARABLE), None)

    @property
    def verifies(self) -> bool:
        """Whether some rule computes the site to compare it with its forecast."""
        return any(isinstance(rule.do, Verify) for rule in self.rules)

    @property
    def guard(self) -> str:
        """The guards in mathematical notation, in order."""
        return "; ".join(show(rule.predicate.guard) for rule in self.rules)

    @property
    def strategy(self) -> str:
        """The strategies as text, in order."""
        return "; ".join(repr(rule.do) for rule in self.rules)

    def chooser(self) -> Choose:
        """Return the function that decides. It caches its results, and sites with equal rules share it."""
        return _chooser(self)


@lru_cache(maxsize=4096)
def _chooser(site: SiteRules) -> Choose:
    @lru_cache(maxsize=65536)
    def first(moment: Moment, layer: int, age: int | None, streak: int, start: int) -> int | None:
        """Return the index of the first rule from `start` on that applies, or may apply depending on measurements.

        A rule that computes is also returned if a symbol that it needs is unknown, because no later rule may reuse
        the site in its stead.
        """
        symbols = _symbols(moment, layer, age, streak)
        for i, rule in enumerate(site.rules[start:], start):
            proven = rule.predicate.may_hold if rule.predicate.measured else rule.predicate.holds
            unknown = not rule.replaces_part and rule.predicate.missing_inputs(symbols)
            if rule.where.in_stream(moment.stream) and (unknown or proven(symbols)):
                return i
        return None

    def choose(moment: Moment, layer: int, age: int | None, streak: int, read: Read) -> Choice:
        unproven = False
        i = first(moment, layer, age, streak, 0)
        while i is not None:
            rule = site.rules[i]
            measured = {name: read(name) for name in rule.predicate.measured}
            known = {**_symbols(moment, layer, age, streak), **measured}
            if rule.predicate.holds(known):
                weigh = rule.do.weights if isinstance(rule.do, WEIGHING) and rule.replaces_part else None
                if isinstance(rule.do, Verify):
                    return Choice(False, DecisionReason.VERIFIED, weigh)
                return Choice(rule.replaces_part, DecisionReason.RULE, weigh)
            unproven |= None in measured.values()
            if not rule.replaces_part and not all(is_known(name, known.get(name)) for name in rule.predicate.needs):
                break
            i = first(moment, layer, age, streak, i + 1)
        blind = unproven and (moment.sigma, moment.snr) == (None, None) and symbols.reads_noise(site.needs)
        return Choice(False, DecisionReason.NOT_MEASURED if unproven and not blind else _lacking(moment))

    @lru_cache(maxsize=1024)
    def _lacking(moment: Moment) -> DecisionReason:
        if moment.num_steps is None and site.needs & symbols.TOTALS:
            return DecisionReason.TOTAL_UNKNOWN
        blind = moment.snr is None and symbols.reads_noise(site.needs)
        return DecisionReason.NOISE_UNKNOWN if blind else DecisionReason.NO_RULE

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


def _slot_format(do: Strategy) -> RuleFormat:
    if isinstance(do, ShareGuidance | GuidanceDelta | ReuseTiles | Core):
        return do
    return getattr(do, "store", None)


def forced(*_: object, **__: object) -> Choice:
    """The chooser of a forced run (reuse 0): every decision computes."""
    return Choice(False, DecisionReason.FORCED)
