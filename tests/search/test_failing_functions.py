"""Samplers, metrics and evaluations that fail: the error names the function and the run, and has the exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from dit_rewrite import Evaluation, autopolicy, tune
from dit_rewrite.errors import FunctionFailed
from dit_rewrite.policies import FORA
from dit_rewrite.policy.rules import Policy
from dit_rewrite.search.calibrate import calibrate
from dit_rewrite.search.greedy import greedy
from dit_rewrite.search.segment_runner import greedy_plan
from tests.helpers import tiny
from tests.search import test_autopolicy as good
from tests.search.known_losses import Fake, drawn, names

RAN: list[int] = []


def sample(denoiser: Any, seed: int = 0) -> torch.Tensor:
    """Fails with every seed but 0."""
    RAN.append(seed)
    if seed:
        raise ZeroDivisionError("no guidance")
    return good.sample(denoiser, seed, 3)


def evaluate(policy: Policy) -> Iterator[dict[str, float]]:
    yield {"error": 0.0, "flops": 1.0}
    raise ZeroDivisionError("no guidance")


def policy_of(interval: int) -> Policy:
    raise ZeroDivisionError("no guidance")


def metric(reference: torch.Tensor, output: torch.Tensor) -> float:
    raise ZeroDivisionError("no guidance")


def failed(call: Callable[[], object], name: str, run: str) -> None:
    with pytest.raises(FunctionFailed) as caught:
        call()
    expected = rf"{__name__}.{name} failed {run} (ZeroDivisionError: no guidance). Check it"
    assert str(caught.value).startswith(expected)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_samplers() -> None:
    model, settings = tiny.build(), {"backend": "aot_eager"}
    run = "with seed 1 under FORA(interval=2, kinds=('attention', 'mlp'), anchor='start')"
    RAN.clear()
    failed(lambda: list(Evaluation(model, sample, (0, 1), **settings)(FORA(2))), "sample", run)  # type: ignore[arg-type]
    assert RAN == [0, 0, 1], "seed 0 ran with the policy and without"
    with_seed_1 = good.SETTINGS | {"calibration_seeds": (1,)}
    failed(lambda: autopolicy(model, sample, speedup=2, **with_seed_1), "sample", "with seed 1")
    broken = partial(sample, seed=1)
    failed(lambda: calibrate("magcache", model, broken, threshold=0.1), "sample", "in the calibration")
    trajectories = [partial(sample, seed=seed) for seed in (0, 1)]
    options: dict[str, Any] = {"steps": 3, "conditional": "first", "backend": "aot_eager"}
    failed(lambda: greedy_plan(model, trajectories, 0.1, **options), "sample", "in trajectory 1")


def test_metrics() -> None:
    site = names(2)[0]
    failed(lambda: greedy(Fake(drawn(3), 2), names(2), 3, 0.1, metric=metric), "metric", f"at step 1, {site}, AST")


def test_evaluations_and_policies() -> None:
    pytest.importorskip("optuna")
    space: dict[str, Any] = {"interval": [2]}
    run = "with FORA(interval=2, kinds=('attention', 'mlp'), anchor='start')"
    failed(lambda: tune(FORA, space, evaluate, sampler="grid"), "evaluate", run)
    failed(lambda: tune(policy_of, space, evaluate, sampler="grid"), "policy_of", "with {'interval': 2}")
