"""The decision machine under any policy and any measurement."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Eq, Mod, Ne, Rational
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import (
    DecisionReason,
    MissReason,
)
from dit_rewrite.guards import drift, progress, similarity
from dit_rewrite.passes.analysis.site import Kind, Part, Site
from dit_rewrite.passes.guards import symbols
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import (
    Compute,
    Reuse,
    ReuseKV,
)
from dit_rewrite.policy.where import Where
from dit_rewrite.runtime.decide import Decider, Decisions, SiteSpec
from dit_rewrite.runtime.history import Computed, Moment, Past
from tests.policy.test_rules import site, unknown

WHOLE = ["step", "num_steps", "layer", "num_layers", "age", "streak"]
MEASURED = frozenset(
    {"entropy", *(s(probe).name for s in (similarity, drift) for probe in ("first_block", "modulated_input", "self"))}
)
REAL = ["progress", "sigma", "snr", *sorted(MEASURED)]
RELATIONS: dict[str, tuple[Any, Callable[[Any, Any], bool]]] = {
    "<": (sympy.Lt, operator.lt),
    "<=": (sympy.Le, operator.le),
    ">": (sympy.Gt, operator.gt),
    ">=": (sympy.Ge, operator.ge),
    "==": (Eq, operator.eq),
    "!=": (Ne, operator.ne),
}
Point = Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """One guard in two forms: a sympy expression, and a function of plain numbers."""

    guard: Boolean
    holds: Callable[[Point], bool]

    def __repr__(self) -> str:
        return str(self.guard)


@st.composite
def atoms(draw: st.DrawFn) -> Written:
    name = draw(st.sampled_from(WHOLE + REAL))
    relation, python = RELATIONS[draw(st.sampled_from(sorted(RELATIONS)))]
    symbol = symbols.symbol(name)
    if name in WHOLE and draw(st.booleans()):
        by, rest = draw(st.integers(2, 4)), draw(st.integers(0, 3))
        return Written(relation(Mod(symbol, by), rest), lambda p: python(p[name] % by, rest))
    number = Fraction(draw(st.integers(0, 24)), draw(st.sampled_from([1, 2, 8])))  # exact in floating point too
    limit = Rational(number.numerator, number.denominator)
    return Written(relation(symbol, limit), lambda p: python(p[name], number))


def joined(inner: st.SearchStrategy[Written]) -> st.SearchStrategy[Written]:
    pairs = st.tuples(inner, inner)
    return (
        pairs.map(lambda ab: Written(ab[0].guard & ab[1].guard, lambda p: ab[0].holds(p) and ab[1].holds(p)))
        | pairs.map(lambda ab: Written(ab[0].guard | ab[1].guard, lambda p: ab[0].holds(p) or ab[1].holds(p)))
        | inner.map(lambda a: Written(~a.guard, lambda p: not a.holds(p)))
    )


@dataclass(frozen=True)
class Law:
    """One rule in two forms: the package's, and its guard as a function."""

    rule: Rule
    written: Written
    max_streak: int | None


@st.composite
def laws(draw: st.DrawFn) -> Law:
    written = draw(st.recursive(atoms(), joined, max_leaves=4))
    do = draw(st.sampled_from([Reuse(), Reuse(), Reuse(), ReuseKV(), Compute()]))
    max_streak = draw(st.none() | st.integers(1, 3))
    where = Where(
        draw(st.sampled_from([("self",), ("mlp",), ("self", "mlp")])),
        layers=draw(st.sampled_from([None, (0, 2), (1, None)])),
        streams=draw(st.sampled_from([None, None, ("cond",)])),
    )
    return Law(Rule(written.guard, do, where, max_streak=max_streak), written, max_streak)


MEASUREMENTS = (
    st.none() | st.sampled_from([math.nan, math.inf, -math.inf, -0.5, 0.0]) | st.integers(0, 24).map(lambda n: n / 8)
)


@dataclass(frozen=True)
class Machine:
    """A forest of sites, each with its layer and kind, and the laws of a policy."""

    laws: tuple[Law, ...]
    sites: tuple[Site, ...]
    parents: tuple[int | None, ...]
    lag: int

    @property
    def specs(self) -> list[SiteSpec]:
        policy = Policy(tuple(law.rule for law in self.laws), lag=self.lag)
        known = [{"layer": each.layer, "num_layers": 4} for each in self.sites]
        choosers = [policy.for_site(each, k).chooser() for each, k in zip(self.sites, known, strict=True)]
        return [
            SiteSpec(each.name, each.kind, each.layer, parent, choose)
            for each, parent, choose in zip(self.sites, self.parents, choosers, strict=True)
        ]


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    count = draw(st.integers(1, 5))
    order = draw(st.permutations(range(count)))
    parents: dict[int, int | None] = {node: draw(st.sampled_from([None, *order[:i]])) for i, node in enumerate(order)}
    kinds = [draw(st.sampled_from([Kind.SELF, Kind.MLP])) for _ in range(count)]
    sites = tuple(
        Site(
            f"site{i}",
            kinds[i],
            ("v",),
            ("s",),
            "",
            draw(st.integers(0, 3)),
            part=draw(st.sampled_from([Part.BRANCH, Part.KV])),
        )
        for i in range(count)
    )
    found = tuple(draw(st.lists(laws(), max_size=3)))
    return Machine(found, sites, tuple(parents[i] for i in range(count)), draw(st.integers(0, 1)))


def expected(
    machine: Machine, i: int, moment: Moment, holds: bool, computed_at: int, run: int, read: Callable[[str], Any]
) -> bool:
    """Whether the rules want site `i` reused, derived from the laws one by one."""
    each = machine.sites[i]
    point: dict[str, Any] = {
        "step": moment.step,
        "num_steps": moment.num_steps,
        "progress": None if moment.num_steps is None else Fraction(moment.step, max(moment.num_steps - 1, 1)),
        "layer": each.layer,
        "num_layers": 4,
        "sigma": moment.sigma,
        "snr": moment.snr,
        "age": moment.step - computed_at if holds else None,
        "streak": run,
        **{name: read(name) for name in MEASURED},
    }
    proof = {n: v is not None and math.isfinite(v) and not (n in MEASURED and v < 0) for n, v in point.items()}
    usable = {name: value if proof[name] else Fraction(1) for name, value in point.items()}
    for law in machine.laws:
        where, needed = law.rule.where, symbols.mentions(law.rule.when)
        families = {Kind.SELF: "self", Kind.MLP: "mlp"}
        meant = families[each.kind] in where.kinds and where.in_stream(moment.stream)
        meant = meant and (
            where.layers is None or (each.layer >= where.layers[0] and each.layer < (where.layers[1] or 9))
        )
        within = law.max_streak is None or run < law.max_streak
        mine = each.part in law.rule.parts
        if meant and not mine and not all(proof[name] for name in needed):
            conditions = sympy.And.make_args(law.rule.when)
            plain = [c for c in conditions if not symbols.mentions(c) & MEASURED]
            unknown = any(not proof[name] for name in needed - MEASURED)
            if unknown or all(symbols.Predicate.of(c).holds(point) for c in plain):
                return False  # it may apply, and would make the site compute
        elif meant and all(proof[name] for name in needed) and within and law.written.holds(usable):
            return mine
    return False


def test_an_unknown_rule_to_compute_keeps_later_ones_from_reusing() -> None:
    """`progress` is unknown without the number of steps: any step may be one of the early ones."""
    early = Rule(symbols.progress < 0.5, do=Compute())
    rules = Policy((early, Rule(sympy.true))).for_site(site(), {})
    choose = rules.chooser()
    assert choose(Moment(3, None), 0, 1, 0, lambda _: None)[0] is False
    assert [choose(Moment(now, 9), 0, 1, 0, lambda _: None)[0] for now in (3, 4, 5)] == [False, True, True]


@settings(max_examples=150, deadline=None)
@given(machines(), st.data())
def test_any_policy_under_any_measurement(machine: Machine, data: st.DataObject) -> None:
    """A trajectory of random measurements: no reuse without proof and a valid value, covered sites are covered, no
    streak is too long, and the order in which sites are settled does not matter."""
    specs, count = machine.specs, len(machine.sites)
    computed_at, run, filled = [0] * count, [0] * count, [False] * count
    of = data.draw(st.none() | st.integers(1, 6))
    noise = data.draw(st.none() | st.just(0))
    for now in range(5):
        level = None if noise is None else now / 4
        moment = Moment(now, of, 0, 4, level, level, data.draw(st.sampled_from([None, "cond"])))
        numbers = {(i, name): data.draw(MEASUREMENTS) for i in range(count) for name in needed_by(machine)}
        lost = data.draw(st.integers(0, 5)) == 0
        holds = [full and not lost for full in filled]

        def read(i: int, name: str, numbers: dict[Any, Any] = numbers) -> float | None:
            return numbers.get((i, name))

        past = [Past((Computed(step),)) for step in computed_at]
        given = (specs, moment, past, run, holds, MissReason.CHANGED_INPUT if lost else None, read)
        found, shuffled = Decider(*given).decisions(), Decider(*given)
        for i in random.Random(now).sample(range(count), count):
            shuffled.settle(i)
        assert same_decisions(shuffled.decisions(), found)
        for i in range(count):
            around = machine.parents[i]
            while around is not None and not found.row[around]:
                around = machine.parents[around]
            wanted = expected(machine, i, moment, holds[i], computed_at[i], run[i], lambda n, i=i: read(i, n))  # type: ignore[misc]
            if around is not None:
                assert (found.row[i], found.reasons[i]) == (True, DecisionReason.COVERED)
            else:
                may = holds[i] and not (of is not None and now >= of)
                assert found.row[i] is (wanted and may)
                assert found.reasons[i] is not DecisionReason.COVERED
                assert not found.row[i] or found.reasons[i] is DecisionReason.RULE
        for i, (reused, reason) in enumerate(zip(found.row, found.reasons, strict=True)):
            if not reused:
                computed_at[i], run[i], filled[i] = now, 0, True
            elif reason is not DecisionReason.COVERED:
                run[i] += 1
        limits = [law.max_streak for law in machine.laws if not isinstance(law.rule.do, Compute)]
        if None not in limits:
            assert max(run) <= max((limit for limit in limits if limit is not None), default=0)


def needed_by(machine: Machine) -> list[str]:
    mentioned = frozenset[str]().union(*(symbols.mentions(law.rule.when) for law in machine.laws))
    return sorted(mentioned & MEASURED)


def same_decisions(a: Decisions, b: Decisions) -> bool:
    """Equal except for the order in which misses occurred."""
    return (a.row, a.reasons, sorted(a.misses)) == (b.row, b.reasons, sorted(b.misses))


@settings(max_examples=60, deadline=None)
@given(laws(), st.sampled_from([None, math.nan, math.inf, -1.0]))
def test_without_a_measurement_that_is_one_nothing_is_proven(law: Law, value: float | None) -> None:
    """If a measurement is not a number, a guard that mentions it is not proven, whatever its other parts say."""
    measured = symbols.mentions(law.rule.when) & MEASURED
    policy = Policy((replace(law.rule, do=Reuse(), where=Where()),))
    choose = policy.for_site(site(), {"layer": 0, "num_layers": 4}).chooser()
    reuse = choose(Moment(3, 9, sigma=0.5, snr=0.5), 0, 1, 0, lambda name: value).reuse
    assert not (reuse and measured)


def test_progress_is_exact() -> None:
    """A share of the steps is a fraction: 3 of 10 intervals is 3/10, and not the nearest float."""
    policy = Policy((Rule(sympy.Ge(progress, Rational(3, 10))),))
    choose = policy.for_site(site(), {}).chooser()
    assert [choose(Moment(s, 11), 0, 1, 0, unknown)[0] for s in (2, 3, 4)] == [False, True, True]
