"""Forecasts through Inductor: within rounding of the replay, and summed in the kernel that reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache

from dit_rewrite import compile, verify
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.strategies import Forecast, Reuse
from dit_rewrite.policy.where import Where
from tests.end_to_end.test_forecast import every, inputs, sample
from tests.helpers.tiny import build


def kernels(policy: Policy) -> int:
    """How many kernels Inductor writes for a model of one block under a policy, to compute and to reuse."""
    torch._dynamo.reset()
    with fresh_cache():
        metrics.reset()
        model = compile(build(1), policy)
        with model.trajectory(num_steps=4):
            sample(model, 4)
        return int(metrics.generated_kernel_count)


def test_the_sum_takes_no_kernel_of_its_own() -> None:
    """As many kernels as reuse takes."""
    assert kernels(every(2, Forecast(1, history=3))) == kernels(every(2, Reuse())) > 0


@pytest.mark.parametrize(("do", "span"), [(Forecast(1, store="int8"), None), (Forecast(2), "output")], ids=str)
def test_verify(do: Any, span: Any) -> None:
    latent, condition = inputs()
    given = [
        {"hidden_states": latent * (1 - 0.1 * i), "timestep": torch.full((2,), 900.0 - 40 * i), "condition": condition}
        for i in range(5)
    ]
    result = verify(build(), given, every(3, do, Where(span=span)))
    assert result.passed and result.reuse0.exact and result.reused > 0
