"""Verdicts on guards: hand-written cases, running time, and a check against guards evaluated at every step."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from fractions import Fraction

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sympy import Abs, And, Eq, Float, Max, Min, Mod, Ne, Not, Or, Rational, Xor, ceiling, floor, log, sqrt
from sympy.logic.boolalg import Boolean

from dit_rewrite.passes.guards.satisfiability import Verdict, _bounds_of, _verdict, verdict
from dit_rewrite.passes.guards.symbols import (
    Predicate,
    Value,
    age,
    drift,
    entropy,
    layer,
    num_layers,
    num_steps,
    progress,
    sigma,
    similarity,
    snr,
    step,
    streak,
)

first = similarity("first_block")
FORA = Ne(Mod(step, 3), 0) & (step > 0)
DEPTH = floor(num_layers * (11 * progress / 20 - Rational(11, 50)))
DQAR = (progress >= Rational(2, 5)) & (layer < DEPTH) & (snr > Rational(1, 2))
LONG = And(*(Or(Eq(step, 3 * i), layer < age + i, Mod(step, i + 2) > 1) for i in range(5)))
WIDE = And(*(Or(Eq(step, 3 * i), Eq(layer, 2 * i)) for i in range(12)))
HUGE = Or(*(Eq(step, i) & (layer > i) for i in range(1000)))

NEVER = [
    sympy.false,
    (step > 3) & (step < 4),  # no integer is in between
    (2 * step > 5) & (3 * step < 9),
    Eq(2 * step, 5),
    Eq(2 * step - 4 * layer, 7),  # the left side is even
    step < 1,  # no slot has a value yet
    step >= num_steps,
    num_steps < 2,
    age < 1,
    age > step,
    (step < 4) & (age > 3),
    streak >= age,
    (streak > 5) & (streak < 3),
    (streak >= 4) & (age < 5),
    age + streak > 2 * step,
    progress > 1,
    Eq(progress, 0),
    progress * step > step,
    progress**2 > 1,
    num_steps * progress > step + 1,
    (sigma > 1) & (sigma < 1),
    (sigma > Float("0.5")) & (sigma < Rational(1, 2)),
    snr < 0,
    (snr > first) & (first > drift("self")) & (drift("self") >= snr),
    entropy < 0,
    (layer >= num_layers) & (snr > 1),
    Mod(step, 3) > 2,
    Mod(step, 3) < 0,
    Mod(step + layer, -4) > 0,
    Eq(Mod(step, 4), Rational(3, 2)),
    Eq(Mod(step, 3), 1) & Eq(Mod(step, 3), 2),
    Mod(progress, Rational(1, 3)) >= Rational(1, 3),
    floor(step * Rational(2, 7)) > step,
    ceiling(progress * 7) > 7,
    (layer < DEPTH) & (layer > Rational(2, 5) * num_layers),
    Abs(step - layer) < layer - step,
    Max(step, 3) < 3,
    Min(step, 3) > 3,
    (sqrt(step) > 2) & (age < 1),  # a nonlinear part beside a contradiction
    Xor(step > 1, layer > 1) & (progress > 1),
    Not(Or(age >= 1, layer > 2)),
    Or(age < 1, And(step > 3, Or(step < 4, streak > step))),
]
ALWAYS = [
    sympy.true,
    sigma >= 0,
    first >= 0,
    step >= 1,
    step < num_steps,
    age >= 1,
    age <= step,
    streak < age,
    progress <= 1,
    progress > Float("-0.5"),
    layer < num_layers,
    Mod(step, 3) <= 2,
    Ne(2 * step, 5),
    Or(step > 3, step < 4),
    Or(step > 3, step <= 3, sigma > 2),
    Or(sigma < snr, sigma >= snr),
    floor(progress * 5) <= 5,
    Not((age < 1) & (layer > 2)),
]
UNDECIDED = [
    step > 1,
    Eq(age, 1),
    progress >= 1,
    Eq(streak, 0),
    snr > Rational(1, 2),
    snr > 0,  # it may be 0
    first <= Rational(8, 100),
    (step > 3) & (step < 5),
    (progress > Rational(1, 3)) & (progress < Rational(1, 2)),
    Ne(step, 4),
    Eq(Mod(step, 3), 2),
    FORA,
    DQAR,
    Abs(step - layer) > 3,
    Max(step, layer) > 3,
    Or(age >= 1, log(layer) > 0),  # log(0) has no value
    Or(age >= 1, Mod(step, layer) > 1),
    1 / layer > -1,
    LONG,
]
BEYOND = [  # certain, but not decidable by linear arithmetic
    Eq(Mod(step, 2), 0) & Eq(Mod(step, 4), 1),
    progress * Float("0.5") > 1,
    (progress < 1) & (step >= num_steps - 1),
]


@pytest.mark.parametrize("guard", NEVER, ids=str)
def test_never(guard: Boolean) -> None:
    """No schedule makes these guards true."""
    assert verdict(guard) is Verdict.NEVER


@pytest.mark.parametrize("guard", ALWAYS, ids=str)
def test_always(guard: Boolean) -> None:
    """No schedule makes these guards false."""
    assert verdict(guard) is Verdict.ALWAYS


@pytest.mark.parametrize("guard", [*UNDECIDED, *BEYOND, WIDE, HUGE], ids=lambda guard: str(guard)[:60])
def test_undecided(guard: Boolean) -> None:
    """These guards are true at some steps and false at others, or exceed the limits of the check."""
    assert verdict(guard) is None


@pytest.mark.parametrize(
    ("guard", "known", "expected"),
    [
        ((step >= 48) & (step < num_steps - 2), {"num_steps": 50}, Verdict.NEVER),
        ((step >= 47) & (step < num_steps - 2), {"num_steps": 50}, None),
        ((step > 5) & (progress < Rational(1, 10)), {"num_steps": 50}, Verdict.NEVER),  # 5 / 49 is above 1 / 10
        ((step > 3) & (progress < Rational(1, 10)), {"num_steps": 50}, None),  # 4 / 49 is not
        (age < 10, {"num_steps": 10}, Verdict.ALWAYS),
        (age < 9, {"num_steps": 10}, None),
        (streak > 3, {"age": 4}, Verdict.NEVER),
        (layer < 12, {"num_layers": 12}, Verdict.ALWAYS),
        (layer < 3, {"layer": 5}, Verdict.NEVER),
        (layer < 6, {"layer": 5}, Verdict.ALWAYS),
        (layer < num_layers, {"layer": 5, "num_layers": None}, Verdict.ALWAYS),
        (DQAR, {"layer": 2, "num_layers": 12}, None),  # the floor can reach floor(3.96) = 3 layers
        (DQAR, {"layer": 3, "num_layers": 12}, Verdict.NEVER),
        (snr > 1, {"snr": 0.5}, Verdict.NEVER),
        (snr > 1, {"snr": math.nan}, None),
        ((progress > Rational(1, 2)) & (step > 1), {"progress": Fraction(1, 4)}, Verdict.NEVER),
    ],
)
def test_known(guard: Boolean, known: Mapping[str, Value], expected: Verdict | None) -> None:
    """Known values are used in the guard and in the bounds of other symbols."""
    assert verdict(guard, known) is expected


def test_floats_are_what_the_compiled_guard_says() -> None:
    """Floats are compared with all their digits: 0.1 + 0.2 is above 0.3."""
    guard = Eq(sigma, Float(0.1 + 0.2)) & (sigma <= Float(0.3))
    assert verdict(guard) is Verdict.NEVER
    assert not Predicate.of(guard).holds({"sigma": 0.3})


def test_rounding_is_not_looked_into() -> None:
    """3 * sigma rounds to 1 if sigma is the float below 1/3; exact arithmetic would return NEVER."""
    guard = (sigma < Rational(1, 3)) & (3 * sigma >= 1)
    assert Predicate.of(guard).holds({"sigma": 1 / 3})
    assert verdict(guard) is None


@pytest.mark.parametrize("guard", [FORA, DQAR, LONG, WIDE, HUGE], ids=["FORA", "DQAR", "LONG", "WIDE", "HUGE"])
def test_time(guard: Boolean) -> None:
    """The best of three runs takes less than 0.1 s, a limit that leaves room for a busy machine."""
    took = []
    for _ in range(3):
        _verdict.cache_clear()
        _bounds_of.cache_clear()
        gc.collect()
        began = time.perf_counter()
        verdict(guard)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1


EXACT = (step, num_steps, progress, layer, num_layers, age, streak)
FLOATS = (sigma, snr, first, entropy)
numbers = st.fractions(-2, 6, max_denominator=4).map(lambda q: Rational(q.numerator, q.denominator))
whole = st.integers(1, 5)


def _real(function: Callable[..., sympy.Expr]) -> Callable[[tuple[sympy.Expr, ...]], sympy.Expr]:
    """Return the function of an argument, or 1 if sympy knows that its value is not real."""

    def applied(arguments: tuple[sympy.Expr, ...]) -> sympy.Expr:
        try:
            value = function(*arguments)
        except ValueError:
            return sympy.S.One
        return sympy.S.One if value.is_extended_real is False else value

    return applied


def _functions(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    both = st.tuples(inner, inner)
    return st.one_of(
        both.map(lambda ab: ab[0] + ab[1]),
        both.map(lambda ab: ab[0] - ab[1]),
        both.map(lambda ab: ab[0] * ab[1]),
        both.map(_real(Min)),
        both.map(_real(Max)),
        st.tuples(numbers, inner).map(lambda ab: ab[0] * ab[1]),
        st.tuples(inner, whole, st.sampled_from((1, -1))).map(lambda abc: Mod(abc[0], abc[1] * abc[2])),
        inner.map(floor),
        inner.map(ceiling),
        inner.map(Abs),
        inner.map(lambda a: 1 / (a + Rational(1, 7))),
        inner.map(lambda a: a * Float(0.1)),
        st.tuples(inner).map(_real(sqrt)),
    )


leaves = st.one_of(st.sampled_from(EXACT), st.sampled_from(EXACT), st.sampled_from(FLOATS), numbers)
expressions = st.recursive(leaves, _functions, max_leaves=4)
plain = st.one_of(numbers, numbers.map(Float), st.sampled_from((*EXACT, *FLOATS)))
relations = st.sampled_from((sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, Eq, Ne))


def _compared(parts: tuple[type, sympy.Expr, sympy.Expr]) -> Boolean:
    relation, left, right = parts
    try:
        return relation(left, right)
    except TypeError:  # sympy refuses to compare complex numbers
        return sympy.true


def _combined(inner: st.SearchStrategy[Boolean]) -> st.SearchStrategy[Boolean]:
    several = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(several.map(lambda p: And(*p)), several.map(lambda p: Or(*p)), inner.map(Not))


comparisons = st.tuples(relations, expressions, st.one_of(plain, expressions)).map(_compared)
guards_ = st.recursive(comparisons, _combined, max_leaves=4)


@st.composite
def moments(draw: st.DrawFn) -> dict[str, Value]:
    """Draw states that a guard may see, mostly from small schedules, where the bounds are reached."""
    steps = draw(st.integers(2, 8) | st.integers(2, 60))
    layers = draw(st.integers(1, 8) | st.integers(1, 60))
    at = draw(st.integers(1, steps - 1))
    old = draw(st.integers(1, at))
    level = st.sampled_from((0.0, 0.25, 0.5, 1.0, 1 / 3, 2.0)) | st.floats(0, 1e6)
    return {
        "step": at,
        "num_steps": steps,
        "progress": Fraction(at, steps - 1),
        "layer": draw(st.integers(0, layers - 1)),
        "num_layers": layers,
        "age": old,
        "streak": draw(st.integers(0, old - 1)),
        **{symbol.name: draw(level) for symbol in FLOATS},
    }


@settings(deadline=None, max_examples=200)
@given(guard=guards_, seen=st.lists(moments(), min_size=8, max_size=8), tell=st.sets(st.sampled_from(EXACT)))
def test_no_step_contradicts_a_verdict(guard: Boolean, seen: list[dict[str, Value]], tell: set[sympy.Symbol]) -> None:
    """A guard that is NEVER holds in none of the states, a guard that is ALWAYS in all; also with some values known."""
    assume(guard not in (sympy.true, sympy.false))
    _holds_to_it(guard, {}, seen)
    for moment in seen[:2]:
        _holds_to_it(guard, {symbol.name: moment[symbol.name] for symbol in tell}, [moment])


def _holds_to_it(guard: Boolean, known: dict[str, Value], seen: list[dict[str, Value]]) -> None:
    found = verdict(guard, known)
    if found is not None:
        predicate = Predicate.of(guard, known)
        assert {predicate.holds(moment) for moment in seen} == {found is Verdict.ALWAYS}
