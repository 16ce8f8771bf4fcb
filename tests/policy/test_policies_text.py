"""Policies as text, and values passed as a policy: every input gives a policy or one of our errors."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dit_rewrite.errors import BadParameter, BadPlan, BadPolicyFile, DitRewriteError, NotAPolicy
from dit_rewrite.guards import step
from dit_rewrite.policies import DQAR, FORA, CachedAttention, DiTFastAttn, FirstBlockCache, Never, as_policy, parse
from dit_rewrite.policy.plan import Choice, Plan
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.serialise import to_json
from dit_rewrite.policy.strategies import BlockwiseReuse, WindowResidual
from dit_rewrite.policy.where import Where

RULE = Rule(step > 2)
PLAN = Plan("model", 2, "none", ("attn",), ((Choice.FULL,), (Choice.AST,)), 0.1)
NO_NUMBERS: list[Any] = [True, "abc", math.nan, None, [1], 1j, b"1"]

# --- the parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [*NO_NUMBERS, math.inf, 2.0, 0, -1])
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("interval", lambda v: FORA(v)),
        ("block", lambda v: CachedAttention(1.0, block=v)),
        ("max_streak", lambda v: FirstBlockCache(0.1, max_streak=v)),
    ],
)
def test_whole_numbers(name: str, build: Any, value: Any) -> None:
    if name in ("max_streak", "block") and value is None:
        return
    with pytest.raises(BadParameter, match=f"{name}=.*(number|block)"):
        build(value)
    assert build(3) == build(3)


@pytest.mark.parametrize("value", [*NO_NUMBERS, math.inf, -0.1])
@pytest.mark.parametrize(
    ("name", "build", "optional"),
    [
        ("warmup", lambda v: DQAR(warmup=v), False),
        ("layer_fraction", lambda v: DQAR(layer_fraction=v), False),
        ("snr_threshold", lambda v: DQAR(snr_threshold=v), True),
        ("entropy_threshold", lambda v: DQAR(entropy_threshold=v), True),
        ("threshold", lambda v: FirstBlockCache(threshold=v), False),
    ],
)
def test_real_numbers(name: str, build: Any, optional: bool, value: Any) -> None:
    if optional and value is None:
        return
    with pytest.raises(BadParameter, match=f"{name}="):
        build(value)
    assert build(Fraction(1, 2)).rules and build(0.5).rules


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_bound_on_scores(value: Any) -> None:
    """It may be infinite, and negative."""
    with pytest.raises(BadParameter, match="threshold="):
        BlockwiseReuse(value)
    assert BlockwiseReuse(-math.inf) != BlockwiseReuse(math.inf)


@pytest.mark.parametrize("value", ["self", 5, None, ("self", 1), (["self"],), ("attn",)])
@pytest.mark.parametrize(
    "build", [lambda k: FORA(3, k), lambda k: DQAR(kinds=k), lambda k: CachedAttention(1, kinds=k)]
)
def test_kinds(build: Any, value: Any) -> None:
    """A string is not split into its letters; a list works like a tuple."""
    with pytest.raises(BadParameter, match="kinds="):
        build(value)
    assert build(["self", "cross"]) == build(("self", "cross"))


@pytest.mark.parametrize(
    "given",
    [
        {"layers": 3}, {"layers": (1,)}, {"layers": ("a", None)}, {"layers": (True, 3)}, {"layers": (0, 2.5)},
        {"fraction": 0.5}, {"fraction": ("a", 1)}, {"fraction": (math.nan, 1)}, {"fraction": (False, True)},
        {"names": 3}, {"span": []}, {"streams": "cond"}, {"streams": (1,)}, {"kinds": "mlp"},
    ],
    ids=str,
)  # fmt: skip
def test_places(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(BadParameter, match=f"Where: {name}="):
        Where(**given)
    assert Where(["mlp"], [0, 2], None, None, None, ["cond"]) == Where(("mlp",), (0, 2), None, None, None, ("cond",))


@pytest.mark.parametrize("grid", [(), 4, (4.0, 4), (0, 4), (True, 4), [4, 4], (1, 2, 3, 4)])
def test_grids(grid: Any) -> None:
    with pytest.raises(BadParameter, match="grid="):
        WindowResidual(1, grid=grid)
    assert WindowResidual(1, grid=(4, 4)).reach(16) == (1, 1)


@pytest.mark.parametrize(("window", "grid"), [((1, 1), None), ((1, 1), (2, 2, 2)), ((1, 1, 1), (4, 4)), ((), (4, 4))])
def test_a_window_has_a_size_for_each_axis(window: Any, grid: Any) -> None:
    """The window itself raises the error: after compiling, the error could not name the cause."""
    with pytest.raises(BadParameter, match=r"window=.*one for each axis of grid"):
        WindowResidual(window, grid)
    assert WindowResidual((1, 2), (4, 4)).reach(16) == (1, 2)
    assert WindowResidual((1,), (4, 4)).window == (1,)


def test_rules_and_policies_of_something_else() -> None:
    with pytest.raises(BadParameter, match="rules=.*a tuple of rules"):
        Policy(RULE)  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="rules=.*a tuple of rules"):
        Policy((RULE, FORA(3)))  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="lag=True"):
        Policy((RULE,), lag=True)
    with pytest.raises(BadParameter, match="where='self'"):
        Rule(step > 2, where="self")  # type: ignore[arg-type]
    assert Policy([RULE]) == Policy((RULE,))  # type: ignore[arg-type]


# --- text -------------------------------------------------------------------------------------------------------------

NAMES = ["never", "fora", "dqar", "first_block_cache", "cached_attention", "ditfastattn", "other"]
KEYS = ["interval", "kinds", "anchor", "warmup", "layer_fraction", "snr_threshold", "order", "threshold", "block"]
KEYS += ["entropy_threshold", "bound", "max_streak", "lag", "plan", "x"]
VALUES = [
    "True",
    "None",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "3",
    "-1",
    "0.5",
    "abc",
    "[1]",
    "{}",
    "{[]:1}",
    "1j",
    "b'x'",
    "",
]
VALUES += ["(1", "9" * 5000, "(" * 300, "\0", "linear", "paper", "self+mlp", "self + cross", "b.json", "x" * 300]
ITEMS = st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=8)).map("=".join)


@settings(deadline=None, max_examples=400)
@given(
    st.tuples(st.sampled_from(NAMES), st.lists(ITEMS, max_size=4).map(",".join)).map(":".join) | st.text(max_size=20)
)
@example("fora:interval=True")
@example("dqar:snr_threshold=abc")
@example("dqar:order={[]:1}")
@example("ditfastattn:plan=3")
@example("no/such.json")
@example("\0.json")
def test_any_text_is_a_policy_or_one_of_our_errors(text: str) -> None:
    try:
        assert isinstance(as_policy(text), Policy)
    except DitRewriteError as error:
        assert "\n" not in str(error).replace(text, "") and len(str(error)) < 12_000


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 10**6), st.sampled_from(["start", "paper"]), st.lists(st.sampled_from(["self", "mlp"]), min_size=1)
)
def test_text_means_the_call(interval: int, anchor: Any, kinds: list[str]) -> None:
    text = f"fora:interval={interval},anchor={anchor},kinds={'+'.join(kinds)}"
    assert parse(text) == FORA(interval, tuple(kinds), anchor)


def test_numbers_and_none_in_text() -> None:
    assert parse("dqar:snr_threshold=None,warmup=0.2") == DQAR(0.2, snr_threshold=None)
    assert parse("cached_attention:threshold=inf") == CachedAttention(math.inf)
    assert parse("cached_attention:threshold=-inf") == CachedAttention(-math.inf)
    for text, says in (("threshold=nan", "threshold=nan"), ("threshold=1,threshold=2", "one value: it is given twice")):
        with pytest.raises(BadParameter, match=says):
            parse(f"cached_attention:{text}")


def test_files(tmp_path: Path) -> None:
    """A missing file gives a one-line error with the reason; text and paths are both accepted."""
    with pytest.raises(BadPlan, match=r"none\.json cannot be used as a plan: it cannot be read \(No such file"):
        parse("ditfastattn:plan=none.json")
    with pytest.raises(BadPolicyFile, match=r"none\.json cannot be used as a policy \(No such file"):
        as_policy(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadPolicyFile, match=r"bytes\.json cannot be used as a policy \('utf-8' codec"):
        as_policy(str(tmp_path / "bytes.json"))
    (tmp_path / "good.json").write_text(to_json(FORA(3)))
    assert as_policy(tmp_path / "good.json") == as_policy(str(tmp_path / "good.json")) == FORA(3)
    with pytest.raises(BadParameter, match="plan=3 .*a Plan, or the path"):
        DiTFastAttn(3)  # type: ignore[arg-type]


# --- values passed as a policy ----------------------------------------------------------------------------------------


def test_a_policy_or_its_text() -> None:
    policy = FORA(3)
    assert as_policy(policy) is policy
    assert as_policy("fora:interval=3") == policy
    assert as_policy("never") == Never()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (FORA, r"A policy is needed, but an object of type function was given\. Call it: `FORA\(interval=3\)`"),
        (DQAR, r"Call it with its parameters: `DQAR\(…\)`"),
        (Policy, r"of type type.* `Policy\(…\)`"),
        (RULE, r"`Policy\(\(rule,\)\)`"),
        ([RULE, RULE], r"of type list.* `Policy\(tuple\(rules\)\)`"),
        ((RULE,), r"`Policy\(tuple\(rules\)\)`"),
        (PLAN, r"`policies\.DiTFastAttn\(plan\)`"),
        (torch.nn.Linear(1, 1), "of type Linear.* Give the model first"),
        (None, "of type NoneType.* such as `fora:interval=3`"),
        ([], "of type list.* such as `fora:interval=3`"),
        (3, "of type int"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_policy_says_what_to_give(given: Any, says: str) -> None:
    with pytest.raises(NotAPolicy, match=says):
        as_policy(given)
