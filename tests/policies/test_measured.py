"""Policies that measure changes, beside their sources' loops over the numbers of a plain run."""

from __future__ import annotations

from typing import Any

import pytest

from dit_rewrite.errors import BadParameter
from dit_rewrite.policies import (
    DiCache,
    DualBlockCache,
    EasyCache,
    FirstBlockCache,
    MagCache,
    SeaCache,
    TeaCache,
    parse,
)
from dit_rewrite.policies.published import MAGCACHE, TEACACHE
from dit_rewrite.policy.measured_bases import Aligned
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.strategies import Forecast, Reuse
from dit_rewrite.policy.where import Where
from tests.helpers import tiny
from tests.helpers.records import Decided, Records, record, relative, splitting
from tests.helpers.runs import decided, the_row

STEPS = 20
LAYERS = 4


@pytest.fixture(scope="module")
def plain() -> Records:
    model = tiny.build(LAYERS)
    return record(model, model, tiny.calls(STEPS))


def did(policy: Policy) -> str:
    return the_row(decided(policy, STEPS, tiny.build(LAYERS)))


# --- sums of changes --------------------------------------------------------------------------------------------------


def teacache(records: Records, coefficients: tuple[float, ...], threshold: float) -> Decided:
    row, compared, total = "", [], 0.0
    for i in range(STEPS):
        if i in (0, STEPS - 1):
            compute, total = True, 0.0
        else:
            x = relative(records.modulated[i], records.modulated[i - 1])
            total += sum(c * x ** (len(coefficients) - 1 - power) for power, c in enumerate(coefficients))
            compared.append(total)
            compute = not total < threshold
            total = 0.0 if compute else total
        row += "C" if compute else "R"
    return Decided(row, compared)


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (-3.0, 2.0, 0.5, 0.001), TEACACHE["ltx-video"]], ids=len)
def test_teacache(plain: Records, coefficients: tuple[float, ...]) -> None:
    threshold, expected = splitting(lambda t: teacache(plain, coefficients, t))
    assert {"C", "R"} == set(expected[1:-1])
    assert did(TeaCache(threshold, coefficients)) == expected


def easycache(records: Records, threshold: float, warmup: int) -> Decided:
    """`easycache_forward`, with its names; the plain run gives the computed values."""
    x, v = records.latents, records.outputs
    row, compared = "", []
    acc, k, last, before = 0.0, None, -1, -1  # the last computed step, and the one before
    for i in range(STEPS):
        if i < warmup or i >= STEPS - 1:
            compute, acc = True, 0.0
        elif k is None:
            compute = True
        else:
            acc += k * float((x[i] - x[i - 1]).abs().mean() / v[last].abs().mean())
            compared.append(acc)
            compute = not acc < threshold
            acc = 0.0 if compute else acc
        if compute:
            before, last = last, i
            if before >= 0:
                k = float((v[last] - v[before]).abs().mean() / (x[last] - x[before]).abs().mean())
        row += "C" if compute else "R"
    return Decided(row, compared)


@pytest.mark.parametrize("warmup", [1, 5])
def test_easycache(plain: Records, warmup: int) -> None:
    threshold, expected = splitting(lambda t: easycache(plain, t, warmup))
    assert {"C", "R"} == set(expected[5:-1])
    assert did(EasyCache(threshold, warmup)) == expected


def dicache(records: Records, threshold: float, depth: int, retention: float) -> Decided:
    row, compared, total = "", [], 0.0
    for i in range(STEPS):
        if i <= int(retention * STEPS) or i == STEPS - 1:
            compute, total = True, 0.0
        else:
            total += relative(records.streams[i][depth], records.streams[i - 1][depth])
            compared.append(total)
            compute = not total < threshold
            total = 0.0 if compute else total
        row += "C" if compute else "R"
    return Decided(row, compared)


@pytest.mark.parametrize(("depth", "retention"), [(1, 0.2), (2, 0)])
def test_dicache(plain: Records, depth: int, retention: float) -> None:
    threshold, expected = splitting(lambda t: dicache(plain, t, depth, retention))
    assert {"C", "R"} == set(expected[5:-1])
    assert did(DiCache(threshold, depth, retention)) == expected


@pytest.mark.parametrize(
    ("policy", "first", "last"),
    [
        (TeaCache(1e9, (1.0, 0.0), 2, 3), 2, 3),
        (EasyCache(1e9, 4, 2), 4, 2),
        (DiCache(1e9), 5, 1),
        (DualBlockCache(1, 0, 1e9, 3), 3, 0),
        (MagCache([1.0] * STEPS, max_streak=STEPS, retention=0.3), 6, 0),
    ],
    ids=str,
)
def test_first_and_last_steps(policy: Policy, first: int, last: int) -> None:
    """They compute, whatever the change."""
    assert did(policy) == "C" * first + "R" * (STEPS - first - last) + "C" * last


# --- changes since the last computed step -----------------------------------------------------------------------------


def dual_block(records: Records, threshold: float, front: int, warmup: int, most: int | None) -> Decided:
    """cache-dit's `can_cache`, in its order."""
    residuals = [stream[front] - stream[0] for stream in records.streams]
    row, compared, last, run = "", [], 0, 0
    for i, residual in enumerate(residuals):
        reuse = i >= max(warmup, 1) and (most is None or run < most)
        if reuse:
            compared.append(relative(residual, residuals[last]))
            reuse = compared[-1] < threshold
        run, last = (run + 1, last) if reuse else (0, i)
        row += "R" if reuse else "C"
    return Decided(row, compared)


@pytest.mark.parametrize(
    ("front", "back", "warmup", "most", "forecast"),
    [(1, 0, 0, None, None), (2, 1, 3, 2, "taylorseer"), (3, 0, 1, None, Forecast(2)), (2, 0, 8, 3, None)],
)
def test_dual_block_cache(plain: Records, front: int, back: int, warmup: int, most: int | None, forecast: Any) -> None:
    threshold, expected = splitting(lambda t: dual_block(plain, t, front, warmup, most))
    assert {"C", "R"} == set(expected[warmup + 1 :])
    policy = DualBlockCache(front, back, threshold, warmup, most, forecast)
    found = decided(policy, STEPS, tiny.build(LAYERS))
    last = LAYERS - back - 1
    assert found == {f"blocks.{front}..blocks.{last}" if last > front else f"blocks.{front}": expected}


# --- the error that a table predicts ----------------------------------------------------------------------------------

RATIOS = (
    1.0,
    1.2,
    1.1,
    1.05,
    0.98,
    1.0,
    0.99,
    1.01,
    0.97,
    1.02,
    1.04,
    0.95,
    1.0,
    0.99,
    0.96,
    0.9,
    0.92,
    1.0,
    0.85,
    0.8,
)


def magcache(ratios: tuple[float, ...], threshold: float, most: int, retention: float) -> str:
    """diffusers' hook: the running product, number and sum since the last computed step."""
    row, product, count, error = "", 1.0, 0, 0.0
    for i, ratio in enumerate(ratios):
        compute = True
        if i >= int(retention * len(ratios) + 0.5):
            product, count = product * ratio, count + 1
            error += abs(1 - product)
            compute = not (error <= threshold and count <= most and i > 0)
            if compute:
                product, count, error = 1.0, 0, 0.0
        row += "C" if compute else "R"
    return row


@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 3, 0.2), (0.05, 1, 0.0), (0.3, 6, 0.33)])
def test_magcache(threshold: float, most: int, retention: float) -> None:
    expected = magcache(RATIOS, threshold, most, retention)
    assert {"C", "R"} == set(expected[int(retention * STEPS) :])
    assert did(MagCache(RATIOS, threshold, most, retention)) == expected


def test_magcache_of_another_number_of_steps() -> None:
    """The nearest published number of steps."""
    table = MAGCACHE["flux"]
    near = tuple(table[round(i * 27 / 19)] for i in range(STEPS))
    assert did(MagCache("flux", 0.24, 5, 0.1, STEPS)) == magcache(near, 0.24, 5, 0.1)
    assert MagCache("flux").rules == MagCache(table, num_steps=28).rules


# --- as values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "do", "where"),
    [
        (TeaCache(0.1, "flux", store="int8"), Reuse("int8"), Where(span="stack")),
        (SeaCache(), Forecast(1, "taylorseer"), Where(span="stack")),
        (SeaCache(order=0), Reuse(), Where(span="stack")),
        (EasyCache(), Reuse(), Where(span="output", minus="latent")),
        (MagCache(RATIOS), Reuse(), Where(span="stack")),
        (DualBlockCache(), Reuse(), Where(span="stack", layers=(8, None))),
        (DualBlockCache(2, 3, forecast="hermite"), Forecast(1, "hermite"), Where(span="stack", layers=(2, -3))),
        (DiCache(depth=3), Forecast(1, Aligned("first_3_blocks")), Where(span="stack")),
    ],
    ids=str,
)
def test_what_is_done_where(policy: Policy, do: Any, where: Where) -> None:
    (rule,) = policy.rules
    assert (rule.do, rule.where) == (do, where)


BAD: list[tuple[Any, dict[str, Any]]] = [
    *[(build, {"threshold": n}) for build in (EasyCache, SeaCache, DualBlockCache, DiCache, FirstBlockCache)
      for n in (-0.1, float("inf"), float("nan"), None, True, "x")],
    *[(build, {"lag": n}) for build in (EasyCache, SeaCache, DualBlockCache, DiCache) for n in (2, True, None)],
    *[(build, {"warmup": n}) for build in (EasyCache, SeaCache, DualBlockCache) for n in (-1, 1.0, None)],
    *[(build, {"cooldown": n}) for build in (EasyCache, SeaCache) for n in (-1, 1.0, None)],
    *[(build, {"store": n}) for build in (EasyCache, SeaCache, DiCache) for n in ("fp4", 1)],
    *[(build, {"max_streak": n}) for build in (SeaCache, DualBlockCache) for n in (0, 1.0, True)],
    *[(TeaCache, {"threshold": n, "coefficients": (1.0,)}) for n in (-1, None, float("nan"))],
    *[(TeaCache, {"threshold": 1, "coefficients": n})
      for n in ((), "wan", None, 3.0, (float("nan"),), (True,), ("1",), (1.0,) * 17)],
    *[(SeaCache, {"order": n}) for n in (-1, 9, 1.0, None)],
    (SeaCache, {"probe": "output"}),
    *[(MagCache, {"ratios": n}) for n in ((), "wan", None, (1.0, 0.0), (1.0, -1), (1.0, float("inf")), (True,))],
    *[(MagCache, {"ratios": RATIOS, "threshold": n}) for n in (-1, None)],
    *[(MagCache, {"ratios": RATIOS, "max_streak": n}) for n in (0, None, 1.0, 5000)],
    *[(MagCache, {"ratios": RATIOS, "retention": n}) for n in (-0.1, 1.1, None)],
    *[(MagCache, {"ratios": RATIOS, "num_steps": n}) for n in (0, 1.0, 5000)],
    *[(DualBlockCache, {"front": n}) for n in (0, 1.0, None, True)],
    *[(DualBlockCache, {"back": n}) for n in (-1, 1.0, None, True)],
    *[(DualBlockCache, {"forecast": n}) for n in ("dmd", 1, Reuse())],
    *[(DiCache, {"depth": n}) for n in (0, 1.0, None, 10_000)],
    *[(DiCache, {"retention": n}) for n in (-0.1, 1.1, None)],
]  # fmt: skip


@pytest.mark.parametrize(("build", "given"), BAD, ids=lambda value: getattr(value, "__name__", str(value)[:40]))
def test_out_of_range(build: Any, given: dict[str, Any]) -> None:
    name = list(given)[-1] if len(given) == 1 or "threshold" not in given else "threshold|coefficients"
    with pytest.raises(BadParameter, match=f"({name})="):
        build(**given)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("teacache:threshold=0.25,coefficients=flux", TeaCache(0.25, "flux")),
        (
            "teacache:threshold=0.25,coefficients=(1e-3, -2),cooldown=0",
            TeaCache(0.25, (1e-3, -2), cooldown=0),
        ),
        ("seacache:threshold=0.3,order=0,max_streak=None", SeaCache(0.3, 0, max_streak=None)),
        ("easycache:threshold=0.05,warmup=7", EasyCache(0.05, 7)),
        ("magcache:ratios=flux,max_streak=5,num_steps=20", MagCache("flux", max_streak=5, num_steps=20)),
        ("dual_block_cache:front=4,back=2,forecast=taylorseer", DualBlockCache(4, 2, forecast="taylorseer")),
        ("dicache:threshold=0.1,lag=1", DiCache(0.1, lag=1)),
    ],
)
def test_as_text(text: str, policy: Policy) -> None:
    assert parse(text) == policy
