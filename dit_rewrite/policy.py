"""Policies: ordered rules (where: which sites, when: guard, do: strategy). The first that applies wins.

Where none applies the site computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter, Reason
from dit_rewrite.passes import guards
from dit_rewrite.passes.guards import Predicate, Value
from dit_rewrite.passes.sites import Kind, Site
from dit_rewrite.runtime.decide import Choose

FAMILIES = {
    "attention": frozenset({Kind.SELF, Kind.CROSS, Kind.JOINT}),
    "mlp": frozenset({Kind.MLP}),
    **{kind.value: frozenset({kind}) for kind in Kind},
}


class Strategy(str, Enum):
    """What a site does at a step where its rule applies."""

    COMPUTE = "compute"
    REUSE = "reuse"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Where:
    """Selects sites by kind: "self", "cross", "joint", "parallel", "mlp", or "attention" for the first three.

    A parallel site is attention and MLP at once, so it is selected where both are.
    """

    kinds: tuple[str, ...] = tuple(kind.value for kind in Kind)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in FAMILIES:
                raise BadParameter("Where", "kinds", self.kinds, f"names among {', '.join(FAMILIES)}")

    def selects(self, site: Site) -> bool:
        """Whether a rule of this place speaks of the site."""
        kinds = frozenset[Kind]().union(*(FAMILIES[kind] for kind in self.kinds))
        both = bool(kinds & FAMILIES["attention"]) and Kind.MLP in kinds
        return site.kind in kinds or (site.kind is Kind.PARALLEL and both)


@dataclass(frozen=True)
class Rule:
    """Where `when` is proven, the sites of `where` do `do`. `when` is a Boolean over the symbols of `guards`.

    Raises UnknownSymbol or NotBoolean for a guard that has no meaning.
    """

    when: Boolean
    do: Strategy = Strategy.REUSE
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        object.__setattr__(self, "when", guards.check(self.when))
        object.__setattr__(self, "do", Strategy(self.do))


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules, and a name for reports."""

    rules: tuple[Rule, ...] = ()
    name: str = "policy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))

    def __str__(self) -> str:
        return self.name

    @property
    def mentions(self) -> frozenset[str]:
        """The symbols that its guards mention."""
        return frozenset[str]().union(*(guards.mentions(rule.when) for rule in self.rules))

    def for_site(self, site: Site, known: dict[str, Value]) -> SiteRules:
        """The rules that can reach a site, partially evaluated by what is `known` of it at rewrite time."""
        reaching = []
        for rule in self.rules:
            if not rule.where.selects(site):
                continue
            predicate = Predicate.of(rule.when, known)
            if not guards.unreachable(predicate.guard):
                reaching.append((predicate, rule.do))
            if predicate.guard == sympy.true and not predicate.needs:
                break
        return SiteRules(tuple(reaching))


@dataclass(frozen=True)
class SiteRules:
    """What is left of a policy for one site."""

    rules: tuple[tuple[Predicate, Strategy], ...]

    @property
    def reachable(self) -> bool:
        """Whether some step could do anything but compute."""
        return any(strategy is Strategy.REUSE for _, strategy in self.rules)

    @property
    def guard(self) -> str:
        """The guards as text, in order."""
        return "; ".join(str(predicate.guard) for predicate, _ in self.rules)

    @property
    def strategy(self) -> str:
        """The strategies as text, in order."""
        return "; ".join(str(strategy) for _, strategy in self.rules)

    def chooser(self) -> Choose:
        """The decision as a function of the step. Its results are kept: sites with the same rules share it."""
        return _chooser(self)


@lru_cache(maxsize=4096)
def _chooser(rules: SiteRules) -> Choose:
    @lru_cache(maxsize=65536)
    def choose(
        step: int,
        num_steps: int | None,
        layer: int,
        num_layers: int | None,
        age: int | None,
        streak: int,
        sigma: float | None,
        snr: float | None,
    ) -> tuple[bool, Reason]:
        progress = None if num_steps is None else step / max(num_steps - 1, 1)
        symbols: dict[str, Value] = {
            "step": step,
            "num_steps": num_steps,
            "progress": progress,
            "layer": layer,
            "num_layers": num_layers,
            "age": age,
            "streak": streak,
            "sigma": sigma,
            "snr": snr,
        }
        for predicate, strategy in rules.rules:
            if predicate.holds(symbols):
                return strategy is Strategy.REUSE, Reason.RULE
        needs = frozenset[str]().union(*(predicate.needs for predicate, _ in rules.rules))
        if num_steps is None and needs & guards.TOTALS:
            return False, Reason.TOTAL_UNKNOWN
        return False, Reason.NOISE_UNKNOWN if snr is None and needs & guards.NOISE else Reason.NO_RULE

    return choose


def forced(*_: Any, **__: Any) -> tuple[bool, Reason]:
    """The chooser of reuse 0: every decision computes."""
    return False, Reason.FORCED
