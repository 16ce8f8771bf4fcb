"""Guards: which expressions are accepted, partial evaluation, and evaluation of compiled predicates."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import And, Eq, Mod, Ne, Not, Or, false, true

from dit_rewrite.errors import NotBoolean, PolicyError, UnknownSymbol
from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.symbols import (
    SYMBOLS,
    Predicate,
    age,
    layer,
    num_layers,
    num_steps,
    progress,
    step,
    streak,
)

INTEGERS = (step, num_steps, layer, num_layers, age, streak)


@pytest.mark.parametrize("guard", [step > 2, Ne(Mod(step, 3), 0), (age < 3) & (layer > 1), true, false, Not(step > 2)])
def test_guards(guard: object) -> None:
    """Comparisons, Boolean combinations and constants are accepted unchanged."""
    assert symbols.check(guard) == guard


def test_python_bools() -> None:
    """Python's True and False become sympy's."""
    assert symbols.check(True) is true
    assert symbols.check(False) is false


@pytest.mark.parametrize(
    "guard",
    [0, 1, 2, 0.5, None, step, step + 1, Mod(step, 3), sympy.Symbol("step"), math.nan, [], [True], {}, object()]
    + [step & (age > 1), Not(progress), Or(layer, step > 2)],
)
def test_what_is_no_boolean(guard: object) -> None:
    """Numbers, numeric expressions and objects that sympy cannot read are refused with an example."""
    with pytest.raises(NotBoolean, match=r"is not a Boolean expression.*for instance"):
        symbols.check(guard)


@pytest.mark.parametrize("guard", ["step > 2", "step", "True", "progress < 0.5", ")(", "__import__('os')"])
def test_text_is_no_guard(guard: str) -> None:
    """Text is refused and not evaluated, because its symbols would lack the assumptions of guard symbols."""
    with pytest.raises(NotBoolean):
        symbols.check(guard)


def test_unknown_symbols() -> None:
    """The error names the unknown symbol and lists the known ones."""
    with pytest.raises(UnknownSymbol, match=r"uses sigma, t, which guards do not have.*step, num_steps, progress"):
        symbols.check((sympy.Symbol("sigma") > 1) & (sympy.Symbol("t") < step))


def test_unknown_functions() -> None:
    """An undefined function is reported like an unknown symbol."""
    with pytest.raises(UnknownSymbol, match="uses similarity, "):
        symbols.check(sympy.Function("similarity")(step) > 1)


@pytest.mark.parametrize("name", [*sorted(SYMBOLS), "similarity(self)", "drift(first_block, rescale=(1.5, 0.0))"])
def test_same_name_with_other_assumptions(name: str) -> None:
    """A symbol with the same name but other assumptions is unknown, because nothing would substitute it."""
    with pytest.raises(UnknownSymbol, match=re.escape(f"uses {name}, ")):
        symbols.check(Eq(sympy.Symbol(name), 2))


def test_errors_are_value_errors() -> None:
    """Both errors can be caught as the builtin exceptions that callers expect."""
    assert issubclass(NotBoolean, PolicyError)
    assert issubclass(UnknownSymbol, PolicyError)
    assert issubclass(PolicyError, ValueError)


def test_partial_evaluation_by_layer() -> None:
    """Known layer values decide a part of the guard, or all of it."""
    guard = (layer >= 2) & (layer < num_layers - 1) & Ne(Mod(step, 3), 0)
    known = [symbols.partially_evaluate(guard, {"layer": i, "num_layers": 4}) for i in range(4)]
    assert known == [false, false, Ne(Mod(step, 3), 0), false]
    assert [symbols.unreachable(g) for g in known] == [True, True, False, True]
    assert symbols.partially_evaluate(Or(layer < 2, step > 5), {"layer": 0}) is true
    assert symbols.partially_evaluate(guard, {}) == guard
    assert symbols.partially_evaluate(guard, {"layer": None, "num_layers": None}) == guard


def test_unreachable() -> None:
    """A guard is unreachable if and only if sympy simplifies it to False."""
    assert symbols.unreachable(symbols.check(step < 0))  # no step is negative
    assert symbols.unreachable(And(layer > 3, step > 1).subs({layer: 2}))
    assert not symbols.unreachable(step < 1)
    assert not symbols.unreachable(true)
    assert not symbols.unreachable(Eq(Mod(step, 2), 0) & Eq(Mod(step, 2), 1))  # undecided, so it counts as reachable


def test_mentions() -> None:
    """`mentions` returns the names of a guard's symbols."""
    assert symbols.mentions((step > 1) | (age < 2)) == {"step", "age"}
    assert symbols.mentions(true) == frozenset()


def test_predicate() -> None:
    """A guard holds for the right values of its symbols, and needs no other symbols."""
    predicate = Predicate.of(Ne(Mod(step, 3), 0) & (age < 2))
    assert predicate.needs == ("age", "step")
    holds = [predicate.holds({"step": s, "age": a}) for s in range(4) for a in (1, 2)]
    assert holds == [False, False, True, False, True, False, False, False]


def test_predicate_without_needs() -> None:
    """A guard that is constant after partial evaluation is decided without symbols."""
    assert Predicate.of(true).holds({})
    assert not Predicate.of(false).holds({})
    assert Predicate.of(layer > 1, {"layer": 2}).holds({})
    assert not Predicate.of(layer > 1, {"layer": 1}).holds({"layer": 5})


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "guard",
    [
        progress > 0.5,
        Or(progress > layer + 0.5, progress <= 0.5),
        Or(progress > 0.5, Eq(Mod(step, 2), layer + 1)),
        Not(progress > 0.5),
        Ne(progress, 2),
        Or(progress > 0.5, layer < 3),
    ],
    ids=str,
)
def test_no_proof(guard: object, value: float | None) -> None:
    """A guard does not hold if a symbol is unknown or not finite, even if simplification removes the symbol."""
    predicate = Predicate.of(symbols.check(guard), {"layer": 0})
    assert not predicate.holds({"step": 3, "progress": value})
    assert not predicate.holds({"step": 3})
    assert predicate.holds({"step": 3, "progress": 0.75}) is (guard != Not(progress > 0.5))


def test_simplified_away() -> None:
    """A guard that simplifies to True still needs the symbols that it was written with."""
    for guard in ((layer < 3) | (progress > 0.5), (progress > layer + 0.5) | (progress <= 0.5)):
        predicate = Predicate.of(guard, {"layer": 0})
        assert predicate.guard is true
        assert predicate.needs == ("progress",)
        assert not predicate.holds({})
        assert not predicate.holds({"progress": math.nan})
        assert predicate.holds({"progress": 0.0})


def test_division_by_zero() -> None:
    """A guard that raises when it is evaluated does not hold."""
    for guard in (step / age > 1, Eq(Mod(step, age), 0), Not(Eq(Mod(step, age), 0))):
        predicate = Predicate.of(symbols.check(guard))
        assert not predicate.holds({"step": 4, "age": 0})
    assert Predicate.of(symbols.check(step / age > 1)).holds({"step": 4, "age": 2})


def test_overflow() -> None:
    """A guard does not hold if a power overflows."""
    predicate = Predicate.of(symbols.check(sympy.exp(progress * 10**6) > 1))
    assert not predicate.holds({"progress": 1.0})
    assert predicate.holds({"progress": 1e-6})


@pytest.mark.parametrize("function", [sympy.sin, sympy.sqrt, sympy.floor, sympy.Abs, sympy.exp, sympy.log])
def test_functions_of_sympy(function: sympy.FunctionClass) -> None:
    """Functions of Python's math module are compiled."""
    predicate = Predicate.of(symbols.check(function(progress) > 0.1))
    assert predicate.holds({"progress": 1.5})
    assert not predicate.holds({"progress": 0.0}) or function is sympy.exp


@pytest.mark.parametrize("function", [sympy.sqrt, sympy.log, lambda x: x ** sympy.Rational(1, 3)])
def test_outside_of_a_domain(function: Callable[[sympy.Basic], sympy.Basic]) -> None:
    """If a function has no real value, neither a comparison nor its negation holds."""
    for guard in (function(progress) > 0.1, function(progress) < 0.1):
        assert not Predicate.of(symbols.check(guard)).holds({"progress": -1.0})


def atoms() -> st.SearchStrategy[object]:
    """Draw comparisons of small linear forms and remainders."""
    symbols = st.sampled_from([*INTEGERS, progress])
    numbers = st.integers(0, 4)
    linear = st.builds(lambda a, s, b, t: a * s + b - t, st.integers(1, 3), symbols, numbers, symbols)
    remainder = st.builds(Mod, st.sampled_from(INTEGERS), st.integers(1, 4))
    relations = st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, Eq, Ne])
    return st.builds(lambda relation, left, right: relation(left, right), relations, linear | remainder, numbers)


boolean = st.recursive(
    atoms(),
    lambda inner: st.builds(And, inner, inner) | st.builds(Or, inner, inner) | st.builds(Not, inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(boolean, st.lists(st.integers(0, 6), min_size=6, max_size=6), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_compiled_guards_agree_with_sympy(guard: sympy.Basic, numbers: list[int], part: float) -> None:
    """The compiled guard, partially evaluated or not, agrees with sympy's substitution at every point."""
    point = {**dict(zip(INTEGERS, numbers, strict=True)), progress: part}
    expected = guard.subs(point) == true
    symbols = {symbol.name: value for symbol, value in point.items()}
    assert Predicate.of(guard).holds(symbols) is expected
    for split in ({"layer", "num_layers"}, {"step"}, set(symbols)):
        known = {name: symbols[name] for name in split}
        rest = {name: value for name, value in symbols.items() if name not in split}
        assert Predicate.of(guard, known).holds(rest) is expected


@settings(max_examples=60, deadline=None)
@given(boolean)
def test_random_guards_prove_nothing_without_symbols(guard: sympy.Basic) -> None:
    """The guard does not hold if any symbol that it mentions is missing."""
    known = dict.fromkeys(SYMBOLS, 1)
    predicate = Predicate.of(guard, {"layer": 1})
    for name, bad in itertools.product(symbols.mentions(guard) - {"layer"}, (None, math.nan)):
        assert not predicate.holds({**known, name: bad})
