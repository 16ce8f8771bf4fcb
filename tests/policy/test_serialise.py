"""Policies as JSON and guards as text: they come back equal, and input outside the format is refused by name."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sympy
from sympy import ITE, And, Eq, Max, Min, Mod, Ne, Or, Rational, Xor, ceiling, floor
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import (
    BadGuardText,
    BadParameter,
    BadPolicyText,
    ForeignName,
    PolicyError,
    UnknownVersion,
    UnwritableGuard,
    UnwritableStrategy,
)
from dit_rewrite.guards import age, layer, num_layers, num_steps, progress, step, streak
from dit_rewrite.passes.guards import symbols
from dit_rewrite.policies import DQAR, FORA, CachedAttention, FirstBlockCache, Never, SpeCa
from dit_rewrite.policy import serialise
from dit_rewrite.policy.guard_text import guard_text, parse_guard
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.serialise import from_json, to_json
from dit_rewrite.policy.strategies import Compute, Reuse, ReuseKV
from dit_rewrite.policy.where import FAMILIES, Where

WRITTEN: list[tuple[str, Boolean]] = [
    ("(step > 0) & Ne(Mod(step, 3), 0)", (step > 0) & Ne(Mod(step, 3), 0)),
    ("step % 3 != 0", Ne(Mod(step, 3), 0)),
    ("step == 3", Eq(step, 3)),
    ("0 < step < 5 <= age", And(sympy.Lt(0, step), step < 5, sympy.Le(5, age))),
    ("3 < step", sympy.Lt(3, step, evaluate=False)),
    ("not step > 3 and (age < 2 or layer >= 4)", And(step <= 3, Or(age < 2, layer >= 4))),
    ("~(step > 3) | (age < 2) ^ (streak > 1)", Or(step <= 3, Xor(age < 2, streak > 1))),
    ("Or(And(step > 1, age > 2), Not(Eq(layer, 0)))", Or(And(step > 1, age > 2), Ne(layer, 0))),
    ("ITE(progress > 0.5, age < 3, age < 2)", ITE(progress > 0.5, age < 3, age < 2)),
    ("progress > 1/3", progress > Rational(1, 3)),
    ("progress < 0.30000000000000004", progress < 0.1 + 0.2),
    ("1e-05 < Abs(progress - 0.5)", sympy.Lt(1e-5, sympy.Abs(progress - 0.5))),
    ("2*(step + 1)/num_steps > progress", sympy.Mul(2, step + 1, 1 / num_steps) > progress),
    ("-(step + 1)*layer > -9", sympy.Mul(-1, step + 1, layer) > -9),
    ("+step - age - 2 > -(-3)", step - age - 2 > 3),
    ("Min(step, 3)**2 > sqrt(Max(age, layer))", Min(step, 3) ** 2 > sympy.sqrt(Max(age, layer))),
    ("log(num_layers) - 1 > 0", sympy.log(num_layers) - 1 > 0),
    ("1/(2*(age + 1/2)) < 1", sympy.Mul(Rational(1, 2), 1 / (age + Rational(1, 2))) < 1),
    ("floor(step/2) <= ceiling(age**-0.5)", floor(step / 2) <= ceiling(age**-0.5)),
    ("(0.3**(step/num_steps))**2 < 0.5**-age", (0.3 ** (step / num_steps)) ** 2 < 0.5**-age),
    ("true", sympy.true),
    ("False", sympy.false),
]  # fmt: skip


@pytest.mark.parametrize(("text", "guard"), WRITTEN, ids=[text for text, _ in WRITTEN])
def test_parse(text: str, guard: Boolean) -> None:
    """Text is read as the expression that sympy builds from it."""
    assert parse_guard(text) == guard
    assert parse_guard(guard_text(guard)) == guard


FOREIGN = {
    "__import__('os')": "'__import__' is not a function",
    "eval('1')": "'eval' is not a function",
    "exp(step) > 1": "'exp' is not a function",
    "snr(step) > 1": "'snr' is not a function",
    "step > foo": "'foo' is not a symbol",
    "__builtins__": "'__builtins__' is not a symbol",
    "Mod > 1": "'Mod' is not a symbol",
}


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_name(text: str) -> None:
    """The error names the unknown name, and the names that are allowed."""
    with pytest.raises(ForeignName, match=FOREIGN[text]) as caught:
        parse_guard(text)
    assert "num_steps" in str(caught.value) and "Mod" in str(caught.value)


REFUSED = {
    "not allowed": [
        "step.real > 1", "step[0] > 1", "().__class__.__bases__", "(lambda: 1)()", "step.bit_length() > 1",
        "[step > 0]", "step > 0 if age else 1", "(x := 3) > step", "f'{step}' > 1", "step in (1, 2)",
        "Mod(*[1, 2]) > 1", "step @ 3 > 1", "step // 3 > 1", "step << 3 > 1",
    ],
    "has a comparison other than": ["step is 3", "step is not 3"],
    "has a keyword argument, or more than 16 arguments": ["Mod(step, b=3) > 1", f"Max({'step, ' * 17}) > 1"],
    "argument": ["Mod(step) > 1"],
    "not a finite number": ["'a' > step", "1j > step", "None", "1e999 > step", "... > step", "b'1' > step"],
    "number where a condition is needed": ["step", "3", "step > 1 & age > 2", "step & (age > 3)", "~step", "not 1"],
    "condition where a number is needed": ["step > True", "(step > 0) < (age > 0)", "(step > 0) + 1 > 0"],
    "zero": ["step / 0 > 1", "1 / (2*(step - step)) > 1", "Mod(step, 0) > 1", "step % 0 > 1"],
    "not a real number": ["log(0) > step", "Eq(sqrt(-1), step)", "Max() > step", "0**-1 > step"],
    "invalid syntax": ["", "step >", "step > 0; age > 1", "import os"],
    "null bytes": ["step > 0\0"],
    "could grow too large": [
        "10**10**10 > step", "(step**64)**64 > 3", "((step**8 + 1)**8 + 1)**8 > 1", "2**step > 3",
        "(-0.5)**step > 1", "(0.5*age)**step > 1", "0.0**step > 1",
    ],
    "too large|Exceeds the limit": ["9" * 400 + " > step", "9" * 5000 + " > step"],
    "nested|recursion": ["(" * 3000 + "step > 0" + ")" * 3000, "~" * 60 + "(step > 0)", "-" * 3000 + "step > 0"],
    "characters": ["step > " + "+".join(["age"] * 9000)],
    "does not depend on step: it says `True`": ["step >= 0"],
    "does not depend on age": ["(age > 0.5) | (age <= 0.5)", "(layer > 3) & Eq(0*age, 0)"],
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_refused(problem: str) -> None:
    """Invalid guards are refused with the reason, before they cost time."""
    for text in REFUSED[problem]:
        begin = time.perf_counter()
        with pytest.raises(BadGuardText, match=problem):
            parse_guard(text)
        assert time.perf_counter() - begin < 2


def test_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Python nor sympy ever evaluates the text."""
    for module, name in (("builtins", "eval"), ("builtins", "exec"), ("sympy.core.sympify", "parse_expr")):
        monkeypatch.setattr(f"{module}.{name}", lambda *_: pytest.fail("text was evaluated"), raising=False)
    assert parse_guard("(step > 0) & (age < 4)") == (step > 0) & (age < 4)


def test_measured_symbols() -> None:
    """The name of a measured symbol looks like a call and is read as the symbol; unknown probes are refused."""
    rescaled = symbols.drift("self", rescale=(498.6, -3.8, 0.26)), symbols.similarity("self", rescale=(2,))
    for symbol in (symbols.similarity("first_block"), symbols.drift("self"), *rescaled, symbols.entropy):
        assert parse_guard(f"{symbol} < 0.1") == (symbol < 0.1)
        assert guard_text(symbol < 0.1) == f"{symbol} < 0.1"
        assert parse_guard(f"(step > 2) & ({symbol} < 0.1)") == (step > 2) & (symbol < 0.1)
    for text in ("similarity(first) < 0.1", "similarity < 0.1", "drift() < 1", "entropy(self) < 1"):
        with pytest.raises(ForeignName):
            parse_guard(text)
    for options in (
        "rescale=2.0",
        "rescale=()",
        "rescale=(x,)",
        "rescale=(2.0, 1j)",
        "rescale=(1e999,)",
        "scale=(2.0,)",
    ):
        with pytest.raises(ForeignName, match="'drift' is not a function"):
            parse_guard(f"drift(self, {options}) < 1")


def test_another_spelling_of_a_measured_symbol() -> None:
    """Text may spell a measurement in another way than its name; the symbol is the same."""
    assert parse_guard("drift(self,rescale=[2,-0.0]) < 1") == (symbols.drift("self", rescale=(2.0, 0.0)) < 1)


def test_later_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    """A symbol that is added to the language is read without further changes."""
    later = sympy.Symbol("temperature", real=True)
    monkeypatch.setitem(symbols.SYMBOLS, later.name, later)
    guard = (later < 0.1) & (step > 2)
    assert parse_guard(guard_text(guard)) == guard
    with pytest.raises(ForeignName, match="'similarity' is not a function"):
        parse_guard("similarity(other) < 0.1")


def test_unwritable() -> None:
    """A guard that text would change is not saved: one outside the language, or one that is not evaluated."""
    for guard in (
        sympy.exp(progress) > 2,
        Eq(step, step, evaluate=False) & (age > 3),
        progress > sympy.Float("0.1", 40),
    ):
        with pytest.raises(UnwritableGuard, match="cannot be saved"):
            to_json(Policy((Rule(when=guard),)))


EVERYWHERE = {
    "kinds": list(FAMILIES),
    **dict.fromkeys(("layers", "fraction", "names", "span", "streams", "stack", "minus")),
}
SIMPLE = {
    "version": 1,
    "name": "three rules",
    "lag": 1,
    "rules": [
        {"when": "step < 2", "do": {"strategy": "compute"}, "where": EVERYWHERE | {"kinds": ["mlp"]}},
        {
            "when": "(progress > 0.25) & (age < 4)",
            "do": {"strategy": "reuse_kv", "store": "int8"},
            "where": EVERYWHERE | {"kinds": ["self", "cross"], "layers": [1, None], "names": "blocks.*"},
        },
        {
            "when": "similarity(first_block) < 0.1",
            "do": {"strategy": "reuse", "store": None},
            "where": EVERYWHERE | {"fraction": [0, 0.5], "span": "stack", "streams": ["cond"]},
        },
    ],
}


def test_json() -> None:
    """The format, written out."""
    similar = symbols.similarity("first_block")
    rules = (
        Rule(step < 2, Compute(), Where(("mlp",))),
        Rule(
            (age < 4) & (progress > 0.25), ReuseKV("int8"), Where(("self", "cross"), layers=(1, None), names="blocks.*")
        ),
        Rule(similar < 0.1, Reuse(), Where(fraction=(0, 0.5), span="stack", streams=("cond",))),
    )
    policy = Policy(rules, "three rules", lag=1)
    assert from_json(json.dumps(SIMPLE)) == policy
    assert json.loads(to_json(policy)) == SIMPLE


@pytest.mark.parametrize(
    "policy",
    [
        *(Never(), FORA(1), FORA(3), FORA(4, ("self", "mlp"), anchor="paper"), Policy((), "ä \"'")),
        *(DQAR(), DQAR(0.25, 1.0, None, "linear_reverse", 1.5), FirstBlockCache(), FirstBlockCache(0.1, 2, 3, lag=1)),
        Policy((Rule(step > 1, max_streak=3),), "short forms", warmup=2, cooldown=1),
    ],
    ids=str,
)
def test_policies(policy: Policy) -> None:
    """A policy comes back equal, its name included."""
    assert from_json(to_json(policy)) == policy


def test_numbers_of_other_types() -> None:
    """A number of numpy in a guard becomes a float. A strategy, whose numbers are stored as they are, refuses it."""
    for number in (np.float32(0.1), np.float64(0.1), Fraction(1, 3)):
        policy = FirstBlockCache(number)  # type: ignore[arg-type]
        assert from_json(to_json(policy)) == policy
    assert SpeCa(Fraction(1, 3)).rules == SpeCa(1 / 3).rules  # type: ignore[arg-type]
    for number in (np.float32(0.1), Fraction(1, 3)):
        with pytest.raises(BadParameter, match="threshold="):
            CachedAttention(number)  # type: ignore[arg-type]


class Halved(Reuse):
    """A strategy of a user, without a name in JSON."""


def test_strategy_without_a_name() -> None:
    with pytest.raises(UnwritableStrategy, match="Halved"):
        to_json(Policy((Rule(step > 0, Halved()),)))


def test_missing_place() -> None:
    """A missing field of a place has its default value: a field added later does not invalidate saved files."""
    value = SIMPLE | {"rules": [{"when": "step > 1", "do": {"strategy": "reuse"}, "where": {}}]}
    del value["lag"]
    assert from_json(json.dumps(value)) == Policy((Rule(step > 1),), "three rules")


def rule(**changes: Any) -> dict[str, Any]:
    return SIMPLE | {"rules": [SIMPLE["rules"][0] | changes]}  # type: ignore[index]


BAD: list[tuple[Any, type[PolicyError], str]] = [
    ([], BadPolicyText, r"the text is \[\], but must be a dict"),
    ({}, BadPolicyText, "the policy lacks name, rules"),
    ({"version": 1, "rules": []}, BadPolicyText, "the policy lacks name"),
    (SIMPLE | {"version": 2}, UnknownVersion, "is 2, and this dit_rewrite reads version 1"),
    (SIMPLE | {"version": True}, UnknownVersion, "is True"),
    (SIMPLE | {"version": "1"}, UnknownVersion, "is '1'"),
    (SIMPLE | {"name": 3}, BadPolicyText, "name is 3, but must be a str"),
    (SIMPLE | {"rules": {}}, BadPolicyText, "rules is {}, but must be a list"),
    (SIMPLE | {"rules": ["step > 1"]}, BadPolicyText, r"rules\[0\] is \"step > 1\", but must be a dict"),
    (SIMPLE | {"extra": 1}, BadPolicyText, "the policy has extra"),
    (SIMPLE | {"rules": [{"when": "step > 1"}]}, BadPolicyText, r"rules\[0\] lacks do, where"),
    (rule(then=1), BadPolicyText, r"rules\[0\] has then, and its fields are when, do, where"),
    (rule(when=True), BadPolicyText, r"rules\[0\].when is true, but must be a str"),
    (rule(when="snrr > 1"), ForeignName, "'snrr'"),
    (SIMPLE | {"lag": 2}, BadParameter, "lag=2 is out of range"),
    (SIMPLE | {"lag": True}, BadPolicyText, "lag is true, but must be a int"),
    (rule(do="reuse"), BadPolicyText, r"rules\[0\].do is \"reuse\", but must be a dict"),
    (
        rule(do={}),
        BadPolicyText,
        r"rules\[0\].do has the strategy None, which is not one of compute, reuse, forecast, reuse_kv",
    ),
    (rule(do={"strategy": "forget"}), BadPolicyText, r"rules\[0\].do has the strategy 'forget'"),
    (rule(do={"strategy": []}), BadPolicyText, r"rules\[0\].do has the strategy \[\]"),
    (rule(do={"strategy": "compute", "store": "int8"}), BadPolicyText, r"rules\[0\].do has store"),
    (rule(do={"strategy": "reuse", "store": "int4"}), BadParameter, "store='int4' is out of range"),
    (rule(do={"strategy": "reuse", "store": 8}), BadPolicyText, r"rules\[0\].do.store is 8"),
    (rule(do={"strategy": "reuse_kv"}, where={"span": "stack"}), BadParameter, "other strategies need attention"),
    (rule(do=None), BadPolicyText, r"rules\[0\].do is null, but must be a dict"),
    (rule(where=[]), BadPolicyText, r"rules\[0\].where is \[\], but must be a dict"),
    (
        rule(where={"layer": 3}),
        BadPolicyText,
        r"rules\[0\].where has layer, and its fields are kinds, layers, fraction",
    ),
    (rule(where={"layers": 3}), BadPolicyText, r"rules\[0\].where.layers is 3, but must be a list"),
    (rule(where={"layers": [1]}), BadPolicyText, r"rules\[0\].where.layers has 1 items, but must have 2"),
    (rule(where={"layers": [3, 2]}), BadParameter, r"layers=\(3, 2\)"),
    (rule(where={"fraction": ["0", 1]}), BadPolicyText, r"rules\[0\].where.fraction\[0\] is \"0\""),
    (rule(where={"fraction": [0, 2]}), BadParameter, "fraction"),
    (rule(where={"names": []}), BadPolicyText, r"rules\[0\].where.names is \[\]"),
    (rule(where={"span": "blocks"}), BadParameter, "span='blocks'"),
    (rule(where={"streams": "cond"}), BadPolicyText, r"rules\[0\].where.streams is \"cond\""),
    (rule(where={"kinds": "mlp"}), BadPolicyText, r"rules\[0\].where.kinds is \"mlp\", but must be a list"),
    (rule(where={"kinds": [1]}), BadPolicyText, r"rules\[0\].where.kinds\[0\] is 1, but must be a str"),
    (rule(where={"kinds": ["mlpp"]}), BadParameter, "mlpp"),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_policy(value: Any, error: type[PolicyError], message: str) -> None:
    """A missing field, an unknown field or one of another type gives an error with its location."""
    with pytest.raises(error, match=message):
        from_json(json.dumps(value))


@pytest.mark.parametrize("text", ["", "{", "policy", "[" * 100_000, "\ufeff{}"])
def test_no_json(text: str) -> None:
    """Text that is not JSON is not a policy."""
    with pytest.raises(BadPolicyText, match="the text cannot be parsed"):
        from_json(text)


def test_typed() -> None:
    """Fields of types that no class has yet: unions, and tuples of one length."""
    typed = serialise._typed
    assert typed([3, 4], tuple[int, int] | None, "x") == (3, 4)
    assert typed(None, tuple[int, int] | None, "x") is None
    assert typed(0.5, float | None, "x") == 0.5
    for value, hint in ((("3"), int | None), ([1], tuple[int, int]), (True, int), ([1, "a"], tuple[int, int] | None)):
        with pytest.raises(BadPolicyText, match="x.* must"):
            typed(value, hint, "x")
