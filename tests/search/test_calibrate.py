"""Calibrated tables, beside numpy's fit and the norms of a plain run."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import dit_rewrite
from dit_rewrite import calibrate
from dit_rewrite.errors import BadParameter, NotAModule, NotCalibrated
from dit_rewrite.guards import table
from dit_rewrite.passes.guards.measurements import measurement
from dit_rewrite.policies import MagCache, TeaCache
from dit_rewrite.search.calibrate import explained, grown, polyfit
from tests.helpers import tiny
from tests.helpers.records import record, relative
from tests.helpers.runs import decided, the_row

STEPS, LAYERS = 20, 4


def sampler(*seeds: int, steps: int = STEPS) -> Any:
    """One image per seed; each calls the denoiser once a step."""

    def sample(denoiser: Any) -> None:
        for seed in seeds:
            tiny.outputs(denoiser, tiny.calls(steps, seed))

    return sample


def guidance(denoiser: Any) -> None:
    """Two calls a step, without stream names."""
    with denoiser.trajectory(STEPS):
        for one, other in zip(tiny.calls(STEPS, 0), tiny.calls(STEPS, 0, tiny.condition(5)), strict=True):
            denoiser(**one), denoiser(**other)


def pairs_of(*seeds: int) -> list[tuple[float, float]]:
    """The changes of the modulated input and of the output in a plain run, except the last ones of each image."""
    model = tiny.build(LAYERS)
    pairs = []
    for seed in seeds:
        r = record(model, model, tiny.calls(STEPS, seed))
        changes = [[relative(b, a) for a, b in pairwise(values)] for values in (r.modulated, r.outputs)]
        pairs += list(zip(*changes, strict=True))[:-1]
    return pairs


def coefficients_of(policy: dit_rewrite.Policy) -> tuple[float, ...]:
    """The coefficients of the polynomial in a TeaCache policy's guard."""
    (found,) = filter(None, map(measurement, policy.mentions))
    assert isinstance(found.rescale, tuple)
    return found.rescale


def test_teacache() -> None:
    """numpy's polynomial through the pairs of two images, its R² in the name, and the model unchanged."""
    model = tiny.build(LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = calibrate("teacache", model, sampler(0, 1), threshold=0.2, min_r2=-9.0, backend="aot_eager", warmup=2)
    pairs = pairs_of(0, 1)
    xs, ys = (np.array(column) for column in zip(*pairs, strict=True))
    fit = np.poly1d(np.polyfit(xs, ys, 4))
    found = coefficients_of(policy)
    assert np.allclose(np.polyval(found, xs), fit(xs), rtol=1e-3)
    r2 = 1 - ((ys - fit(xs)) ** 2).sum() / ((ys - ys.mean()) ** 2).sum()
    assert policy.name.endswith(f"(R² {r2:.3f})")
    assert policy.rules == TeaCache(0.2, found, warmup=2).rules
    assert type(model) is type(tiny.build()) and not hasattr(model, "stats")


def test_a_fit_that_explains_too_little() -> None:
    with pytest.raises(NotCalibrated, match=r"R² of the polynomial is 0\.\d+, below min_r2 = 1"):
        calibrate("teacache", tiny.build(LAYERS), sampler(0), threshold=0.2, min_r2=1, backend="aot_eager")


@pytest.mark.parametrize("seed", range(3))
def test_polyfit(seed: int) -> None:
    """Equal to numpy's, also where powers are small and similar; and R² of a perfect and a useless fit."""
    generator = np.random.default_rng(seed)
    xs = generator.uniform(0.01, 0.3, 40)
    ys = 100 * xs**4 - 3 * xs**2 + xs + generator.normal(0, 0.01, 40)
    assert np.allclose(polyfit(xs.tolist(), ys.tolist(), 4), np.polyfit(xs, ys, 4), rtol=1e-6)
    assert explained((2.0, 1.0), [(x, 2 * x + 1) for x in xs.tolist()]) == pytest.approx(1)
    assert explained((ys.mean(),), list(zip(xs.tolist(), ys.tolist(), strict=True))) == pytest.approx(0)


def ratios_of(given: list[list[dict[str, Any]]]) -> list[float]:
    """The growth of the stack's change of the stream in a plain run, averaged over tokens and runs."""
    model, tables = tiny.build(LAYERS), []
    for inputs in given:
        changes = [stream[-1] - stream[0] for stream in record(model, model, inputs).streams]
        tables.append([float((b.norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairwise(changes)])
    return [1.0, *np.mean(tables, 0).tolist()]


def errors_of(policy: dit_rewrite.Policy) -> list[float]:
    """The entries of the guard's table where the previous step computed: |1 - ratio|, from step 1 on."""
    (found,) = policy.rules[0].when.atoms(table)
    return [row[0] for row in found.args[0].rows[1:]]


def test_magcache() -> None:
    """The mean ratio of each step over tokens and images; the policy decides by these ratios."""
    model = tiny.build(LAYERS)
    policy = calibrate("magcache", model, sampler(0, 1), threshold=0.3, backend="aot_eager", max_streak=4)
    expected = ratios_of([tiny.calls(STEPS, seed) for seed in (0, 1)])
    assert errors_of(policy) == pytest.approx([abs(1 - ratio) for ratio in expected[1:]], abs=1e-4)
    row = the_row(decided(policy, STEPS, copy.deepcopy(model)))
    assert {"C", "R"} == set(row[5:])
    assert row == the_row(decided(MagCache(expected, 0.3, 4), STEPS, copy.deepcopy(model)))


def test_streams_of_guidance_are_told_apart() -> None:
    """Each stream has its own growth: as many ratios as steps, not as calls."""
    policy = calibrate("magcache", tiny.build(LAYERS), guidance, threshold=0.3, backend="aot_eager", retention=0.5)
    expected = ratios_of([tiny.calls(STEPS, 0), tiny.calls(STEPS, 0, tiny.condition(5))])
    assert errors_of(policy) == pytest.approx([abs(1 - ratio) for ratio in expected[1:]], abs=1e-4)


def test_growth() -> None:
    """All tokens have equal weight, whatever their norm."""
    before = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    assert grown(before * torch.tensor([[[2.0], [4.0]]]), before) == pytest.approx(3.0)


def test_runs_that_show_nothing() -> None:
    """A sampler that does not call the given model, or ends too early, gives an error that says so."""
    model = tiny.build(LAYERS)
    for method, steps, says in [
        ("teacache", 9, "needs 10 changes .*, but saw 7"),
        ("teacache", 0, "0 changes"),
        ("magcache", 1, "values of 2 steps, but saw 1"),
        ("magcache", 0, "values of 2 steps, but saw 0"),
    ]:
        with pytest.raises(NotCalibrated, match=says):
            calibrate(method, model, sampler(*[0][:steps], steps=steps), threshold=0.2, backend="aot_eager")  # type: ignore[arg-type]


def test_what_cannot_be_asked() -> None:
    for given, says in [
        ({"method": "seacache"}, "method="),
        ({"threshold": -1}, "threshold="),
        ({"min_r2": 1.5}, "min_r2="),
        ({"coefficients": (1.0,)}, "coefficients="),
        ({"max_streak": 3}, "max_streak="),
    ]:
        with pytest.raises(BadParameter, match=says):
            calibrate(**{"method": "teacache", "model": tiny.build(), "sample": sampler(0), "threshold": 0.1, **given})
    with pytest.raises(NotAModule):
        calibrate("teacache", None, sampler(0), threshold=0.1)  # type: ignore[arg-type]
