"""Random guards, policies, texts and JSON: what is written comes back equal, and the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sympy import ITE, And, Eq, Max, Min, Mod, Ne, Not, Or, Rational, Xor, ceiling, floor
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadGuardText, PolicyError
from dit_rewrite.guards import age, layer, num_layers, num_steps, progress, step, streak
from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.symbols import Predicate
from dit_rewrite.policy.guard_text import parse_guard
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.serialise import from_json, to_json
from dit_rewrite.policy.strategies import Compute, Reuse, ReuseKV, Strategy
from dit_rewrite.policy.where import FAMILIES, Where

NUMBERS = st.one_of(
    st.integers(-20, 20).map(sympy.Integer),
    st.fractions(-3, 3, max_denominator=7).map(lambda f: Rational(f.numerator, f.denominator)),
    st.floats(1e-6, 1e6).map(sympy.Float),
)
SYMBOLS = st.sampled_from([step, num_steps, progress, layer, num_layers, age, streak])


def _made(build: Callable[..., Any], *parts: Any) -> Any:
    """The expression that sympy builds of the parts, unless it divides by zero."""
    assume(build is not _divided or not parts[1].is_zero)
    value = build(*parts)
    assume(not value.has(sympy.nan, sympy.zoo, sympy.oo))
    return value


def _divided(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return a / b


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.tuples(inner, inner)
    several = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(
        st.tuples(st.sampled_from([sympy.Add, sympy.Mul, Min, Max]), several).map(lambda p: _made(p[0], *p[1])),
        pairs.map(lambda pair: pair[0] - pair[1]),
        pairs.map(lambda pair: _made(_divided, *pair)),
        st.tuples(inner, st.integers(1, 9)).map(lambda pair: Mod(*pair)),
        st.tuples(inner, st.sampled_from([2, 3])).map(lambda pair: pair[0] ** pair[1]),
        st.tuples(st.sampled_from([sympy.Abs, floor, ceiling]), inner).map(lambda pair: pair[0](pair[1])),
    )


TERMS = st.recursive(NUMBERS | SYMBOLS, _larger, max_leaves=5)


COMPARISONS = st.tuples(st.sampled_from([sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le, Eq, Ne]), TERMS, TERMS).map(
    lambda parts: parts[0](*parts[1:])
)


def _joined(inner: st.SearchStrategy[Boolean]) -> st.SearchStrategy[Boolean]:
    several = st.lists(inner, min_size=2, max_size=3)
    joins = st.sampled_from([And, Or, Xor])
    return st.one_of(
        st.tuples(joins, several).map(lambda pair: pair[0](*pair[1])),
        inner.map(Not),
        st.tuples(inner, inner, inner).map(lambda parts: ITE(*parts)),
    )


GUARDS = st.recursive(COMPARISONS, _joined, max_leaves=5)


@settings(deadline=None, max_examples=150)
@given(GUARDS, st.data())
def test_any_guard(guard: Boolean, data: st.DataObject) -> None:
    """A guard comes back equal, and is true for the same values."""
    policy = Policy((Rule(when=guard),), "any")
    again = from_json(to_json(policy))
    assert again == policy
    values: dict[str, float] = {name: data.draw(st.integers(0, 30)) for name in symbols.SYMBOLS}
    values["progress"] = data.draw(st.floats(0, 1))
    before, after = Predicate.of(guard), Predicate.of(again.rules[0].when)
    assert before.needs == after.needs
    assert before.holds(values) == after.holds(values)


STORES = st.sampled_from([None, "bf16", "fp8", "int8"])
STRATEGIES = st.just(Compute()) | st.builds(Reuse, STORES) | st.builds(ReuseKV, STORES)
PLACES = st.builds(
    Where,
    st.sets(st.sampled_from(sorted(FAMILIES))).map(tuple),
    layers=st.none() | st.integers(0, 5).flatmap(lambda n: st.tuples(st.just(n), st.none() | st.integers(n + 1, 9))),
    fraction=st.none() | st.floats(0, 0.5).map(lambda share: (share, share + 0.5)),
    names=st.none() | st.text(max_size=5),
    span=st.sampled_from([None, "block", "stack"]),
    streams=st.none() | st.lists(st.text(max_size=3), max_size=2).map(tuple),
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(COMPARISONS, STRATEGIES, PLACES), max_size=4),
    st.integers(0, 1),
)
def test_any_policy(rules: list[tuple[Boolean, Strategy, Where]], lag: int) -> None:
    """Rules come back in their order, each with its place and strategy."""
    fitting = [rule for rule in rules if not (isinstance(rule[1], ReuseKV) and rule[2].span)]
    policy = Policy(tuple(Rule(*rule) for rule in fitting), "any", lag=lag)
    assert from_json(to_json(policy)) == policy


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="step age01.9*/+-%<>=!&|^~() ,'[]_", max_size=30) | st.text(max_size=20))
def test_any_text(text: str) -> None:
    """Any text gives a guard of known symbols or raises BadGuardText."""
    try:
        guard = parse_guard(text)
    except BadGuardText:
        return
    assert symbols.check(guard) == guard


FIELDS = ["version", "name", "rules", "when", "do", "where", "kinds", "lag", "strategy", "layers"]


@settings(deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(FIELDS), inner),
))  # fmt: skip
def test_any_json(value: Any) -> None:
    """Any JSON gives a policy or raises PolicyError."""
    if isinstance(value, dict):
        value |= {"version": 1}
    try:
        policy = from_json(json.dumps(value))
    except PolicyError:
        return
    assert from_json(to_json(policy)) == policy
