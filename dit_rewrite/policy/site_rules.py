"""The rules of a policy as one site of a graph sees them, and the decision that they make at each step."""

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
from dit_rewrite.policy.strategies import COMPARABLE, Core, Forecast, GuidanceDelta, ShareGuidance, Strategy, Verify
from dit_rewrite.policy.where import Where
from dit_rewrite.runtime.decide import Choice, Choose, Moment, Read

WEIGHING = (Forecast, GuidanceDelta)  # the strategies that take a weighted sum of what a slot holds


@dataclass(frozen=True)
class SiteRule:
    """A rule as one site sees it. ``replaces_part``: its strategy replaces this part of the place."""

    predicate: Predicate
    do: Strategy
    replaces_part: bool
    where: Where

    @property
    def measured(self) -> tuple[str, ...]:
        """The symbols that must be measured: of its guard, and of the weights of its forecast."""
        weighed = self.do.measures if self.replaces_part and isinstance(self.do, WEIGHING) else ()
        return (*self.predicate.measured, *weighed)


@dataclass(frozen=True)
class SiteRules:
    """What is left of a policy for one site."""

    rules: tuple[SiteRule, ...]

    @property
    def reachable(self) -> bool:
        """Whether some step could do anything but compute."""
        return any(rule.replaces_part for rule in self.rules)

    def measuring(self, known: Container[str]) -> SiteRules:
        """Less the rules for reuse whose measurements are not all `known` to be had: they can never be proven."""
        provable = (rule for rule in self.rules if not rule.replaces_part or all(n in known for n in rule.measured))
        return SiteRules(tuple(provable))

    @property
    def forms(self) -> frozenset[str | None | ShareGuidance | GuidanceDelta | Core]:
        """What its slot is asked to hold, or how else it is done: a store's name, or a strategy."""
        return frozenset(_form(rule.do) for rule in self.rules if rule.replaces_part)

    @property
    def form(self) -> str | None | ShareGuidance | GuidanceDelta | Core:
        return next(iter(self.forms), None)

    @property
    def depth(self) -> int:
        """How many computed values its slot keeps."""
        return max(
            (rule.do.depth for rule in self.rules if rule.replaces_part and isinstance(rule.do, WEIGHING)), default=1
        )

    @property
    def foreseen(self) -> bool:
        """Whether a decision of a step to come is known from the step alone."""
        return self.needs <= symbols.FORESEEN

    @property
    def needs(self) -> frozenset[str]:
        """The symbols that must be known when it is decided."""
        return frozenset[str]().union(*((*rule.predicate.needs, *rule.measured) for rule in self.rules))

    @property
    def errors(self) -> tuple[Measurement, ...]:
        """The errors of forecasts that its guards ask for."""
        asked = (measurement(name) for name in sorted(self.needs))
        return tuple(found for found in asked if found is not None and found.statistic == ERROR)

    @property
    def forecast(self) -> Forecast | None:
        """The first forecast that some rule makes of it, in numbers that can be compared."""
        replacing = (rule.do for rule in self.rules if rule.replaces_part)
        return next((do for do in replacing if isinstance(do, Forecast) and do.store in COMPARABLE), None)

    @property
    def verifies(self) -> bool:
        """Whether some rule has it computed to be compared with its forecast."""
        return any(isinstance(rule.do, Verify) for rule in self.rules)

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


def _form(do: Strategy) -> str | None | ShareGuidance | GuidanceDelta | Core:
    return do if isinstance(do, ShareGuidance | GuidanceDelta | Core) else getattr(do, "store", None)


def forced(*_: object, **__: object) -> Choice:
    """The chooser of reuse 0: every decision computes."""
    return Choice(False, DecisionReason.FORCED)
