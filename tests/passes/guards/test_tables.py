"""Tables in guards: lookup, and guards that do not hold outside of a table."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_rewrite.errors import BadGuardText, BadParameter
from dit_rewrite.guards import accumulated_error, age, drift, layer, progress, step, streak, table
from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.notation import show
from dit_rewrite.passes.guards.satisfiability import verdict
from dit_rewrite.passes.guards.symbols import Predicate
from dit_rewrite.policy.guard_text import guard_text, parse_guard
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.serialise import from_json, to_json

FLOATS = st.floats(-1e6, 1e6) | st.integers(-3, 3)
VALUES = st.lists(FLOATS, min_size=1, max_size=6)
ROWS = st.lists(st.lists(FLOATS, max_size=4), min_size=1, max_size=4).filter(any)
FEW = table((0.1, 0.2, 0.3), step)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.integers(0, 8), st.floats(-2, 2))
def test_values(values: list[float], place: int, limit: float) -> None:
    """A table gives its element, and the guard does not hold out of range: compiled, partially evaluated or parsed."""
    guard = symbols.check(table(values, step) <= limit)
    expected = place < len(values) and values[place] <= limit
    for written in (guard, parse_guard(guard_text(guard))):
        assert written == guard
        assert Predicate.of(written).holds({"step": place}) is expected
        assert Predicate.of(written, {"step": place}).holds({}) is expected
        assert not Predicate.of(written).holds({"step": None})


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 5), st.integers(0, 5))
def test_rows(rows: list[list[float]], s: int, a: int) -> None:
    """Rows may have different lengths, or be empty; either index may become known first."""
    guard = table(rows, step, age - 1) > 0
    assert parse_guard(guard_text(guard)) == guard
    expected = s < len(rows) and 0 <= a - 1 < len(rows[s]) and rows[s][a - 1] > 0
    assert Predicate.of(guard).holds({"step": s, "age": a}) is expected
    assert Predicate.of(guard, {"step": s}).holds({"age": a}) is expected
    assert Predicate.of(guard, {"age": a}).holds({"step": s}) is expected


@pytest.mark.parametrize(
    "guard",
    [
        FEW < 1,
        ~(FEW > 1),
        (FEW < 1) | (step > 1),
        (step > 2) | (layer > FEW) | (FEW >= 1),
        sympy.Ne(FEW, 7),
        sympy.Max(FEW, 2) > 1,
    ],
    ids=str,
)
def test_outside_nothing_is_proven(guard: Any) -> None:
    """A guard does not hold out of range, even if it is negated, simplified away or skipped by Python's `or`."""
    symbols.check(guard)
    predicate = Predicate.of(guard, {"layer": 1})
    assert [predicate.holds({"step": s}) for s in (0, 2, 3, 30)] == [True, True, False, False]
    assert not Predicate.of(guard, {"layer": 1, "step": 3}).holds({})


def test_of_layers() -> None:
    """A table indexed by layer becomes a number once the layer is known, and the guard is decided."""
    guard = (table((0.1, 0.9), layer) > 0.5) & (step > 1)
    assert Predicate.of(guard, {"layer": 1}).guard == (step > 1)
    assert symbols.unreachable(Predicate.of(guard, {"layer": 0}).guard)
    assert not Predicate.of(guard, {"layer": 2}).holds({"step": 3})


def test_beside_measurements() -> None:
    """A threshold per step: the measurement is read only if the rest of the guard may hold."""
    predicate = Predicate.of((drift("self") < FEW) & (streak < 2))
    assert predicate.measured == ("drift(self)",)
    point = {"step": 1, "streak": 0, "drift(self)": 0.15}
    assert predicate.may_hold(point)
    assert [predicate.holds({**point, "step": s}) for s in (0, 1, 2, 3)] == [False, True, True, False]
    assert not predicate.holds({**point, "drift(self)": math.nan})


def test_indices_are_whole_numbers() -> None:
    for index in (progress, step / 2, 0.5, "step", step > 1):
        with pytest.raises(BadParameter, match="indices"):
            table((0.1, 0.2), index)
    for index in (step, age - 1, sympy.Mod(step, 2), sympy.floor(progress * 4), 1):
        table((0.1, 0.2), index)
    with pytest.raises(BadParameter, match="indices"):
        table((0.1, 0.2))


@pytest.mark.parametrize("values", [(), 0.1, "ab", (math.nan,), (math.inf,), (True,), ((0.1,),), (10**400,), (None,)])
def test_values_are_finite_numbers(values: Any) -> None:
    with pytest.raises(BadParameter, match="values"):
        table(values, step)


def test_size() -> None:
    """A table of maximum size is parsed in time; one with more values or more rows is refused."""
    large = table([i / 7 for i in range(4096)], step) < 100
    assert parse_guard(guard_text(large)) == large
    assert [Predicate.of(large).holds({"step": s}) for s in (0, 699, 700, 4096)] == [True, True, False, False]
    for rows, indices in (([0.1] * 4097, (step,)), ([[]] * 9000 + [[0.1]], (step, age))):
        with pytest.raises(BadParameter, match="at most 4096"):
            table(rows, *indices)


@pytest.mark.parametrize(
    "text",
    [
        "table((0.1, x), step) < 1",
        "table((0.1, 1j), step) < 1",
        "table(__import__('os').times(), step) < 1",
        "table((0.1,), step, values=3) < 1",
        "table() < 1",
        "table((0.1,), progress) < 1",
        "table((0.1,), step > 1) < 1",
        "table(((0.1,),), step) < 1",
        "table((0.1,), step)",
        "table(" + "(" * 90 + ")" * 90 + ", step) < 1",
    ],
)
def test_no_table(text: str) -> None:
    with pytest.raises(BadGuardText):
        parse_guard(text)


def test_long_text_is_no_table() -> None:
    """Only the values of a table may make the text of a guard long."""
    with pytest.raises(BadGuardText, match="20000 are allowed"):
        parse_guard(" | ".join(["(step > 1)"] * 2000))


def test_json_and_copies() -> None:
    policy = Policy((Rule((table((1.5, 2), step) > age) | (table(((), (3,)), step, streak) < 4)),))
    assert from_json(to_json(policy)) == policy
    assert (
        copy.deepcopy(policy) == pickle.loads(pickle.dumps(policy.rules[0].when, 4)) or copy.deepcopy(policy) == policy
    )
    assert policy.mentions == {"step", "age", "streak"}


def test_notation() -> None:
    """Short tables are printed in full, long ones with their size."""
    assert show(FEW < 1) == "table(0.1, 0.2, 0.3)[step] < 1"
    assert show(table([0.5] * 50, step + 1) >= 1) == "table(… 50 values)[step + 1] ≥ 1"


def test_no_verdict() -> None:
    """Linear arithmetic ignores a table and still uses the other parts of the guard."""
    assert verdict(FEW < 1) is None
    assert verdict((FEW < 1) & (step < 0)) is not None


# --- MagCache ---------------------------------------------------------------------------------------------------------

RATIOS = (1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047)


def magcache(ratios: tuple[float, ...], retention: int, threshold: float, most: int) -> list[bool]:
    """Return which steps reuse, with the state that MagCache updates at each step."""
    product, error, steps, reused = 1.0, 0.0, 0, []
    for i, ratio in enumerate(ratios):
        skip = False
        if i >= retention:
            product *= ratio
            steps += 1
            error += abs(1.0 - product)
            skip = i > 0 and error <= threshold and steps <= most
            if not skip:
                product, error, steps = 1.0, 0.0, 0
        reused.append(skip)
    return reused


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.5, 1.5), min_size=2, max_size=14) | st.just(list(RATIOS)),
    st.integers(0, 5),
    st.floats(0, 0.6),
    st.integers(1, 5),
)
def test_magcache(ratios: list[float], retention: int, threshold: float, most: int) -> None:
    """The error depends only on the step and the last computed step; the decisions equal those of MagCache."""
    predicate = Predicate.of((step >= retention) & (accumulated_error(ratios, most) <= threshold))
    computed, found = 0, []
    for i in range(len(ratios)):
        found.append(i > 0 and predicate.holds({"step": i, "age": i - computed}))
        computed = computed if found[-1] else i
    assert found == magcache(tuple(ratios), retention, threshold, most)


def test_magcache_by_hand() -> None:
    """Two steps after the last computed one, the error is |1 - 1.1| + |1 - 1.1 * 0.8|."""
    error = accumulated_error((1.0, 9.0, 1.1, 0.8), 2)
    assert error.subs({step: 3, age: 2}) == pytest.approx(0.1 + 0.12)
    assert error.subs({step: 3, age: 1}) == pytest.approx(0.2)
    for s, a in ((3, 3), (1, 2), (4, 1), (3, 0)):
        assert not Predicate.of(error < 100).holds({"step": s, "age": a})
    for reach in (0, 1.5, True):
        with pytest.raises(BadParameter, match="reach"):
            accumulated_error((1.0, 1.0), reach)  # type: ignore[arg-type]
