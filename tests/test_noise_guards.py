"""Guards on the noise: known in a told trajectory that names its scheduler, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from dit_rewrite.errors import NoiseUnknown, Reason
from dit_rewrite.guards import sigma, snr
from dit_rewrite.policy import Policy, Rule
from tests import tiny

STEPS = 8


def decisions(policy: Policy, **told: object) -> list[tuple[bool, Reason]]:
    """Whether the first site was reused at each step, and why (not)."""
    model = tiny.rewritten(tiny.build(), policy)
    calls = tiny.calls(STEPS)
    for call, time in zip(calls, getattr(told.get("scheduler"), "timesteps", ()), strict=False):
        call["timestep"] = torch.as_tensor(time).expand(2)
    with model.trajectory(**told):  # type: ignore[arg-type]
        tiny.outputs(model, calls)
    rows = model.stats().decisions
    return [(row.strategies[name] == "reuse", row.reasons[name]) for row in rows for name in [next(iter(row.reasons))]]


def test_reuse_where_the_signal_is_strong() -> None:
    """SNR = abar / (1 - abar) of the scheduler's timesteps decides each step, the first excepted."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(STEPS)
    abar = scheduler.alphas_cumprod[scheduler.timesteps]
    strong = (abar / (1 - abar) > 0.5).tolist()
    assert 0 < sum(strong) < STEPS
    found = decisions(Policy((Rule(snr > 0.5),)), scheduler=scheduler)
    assert [reused for reused, _ in found] == strong


def test_a_guard_on_sigma_under_flow_matching() -> None:
    """Sigma is the share of noise; the last step's is above 0 and the guard holds there."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    expected = [False, *(value < 0.6 for value in scheduler.sigmas[1:STEPS].tolist())]
    found = decisions(Policy((Rule(sigma < 0.6),)), scheduler=scheduler)
    assert [reused for reused, _ in found] == expected


def test_the_snr_without_a_scheduler_is_an_error() -> None:
    """A told trajectory could never reuse: it says so, and what to do."""
    with pytest.raises(NoiseUnknown, match=r"no scheduler was told.*Give trajectory\(scheduler="):
        decisions(Policy((Rule(snr > 0.0),)), num_steps=STEPS)


def test_a_scheduler_that_does_not_say_it_proves_nothing() -> None:
    """Its steps are known and their noise is not: computed, with the reason."""
    mute = SimpleNamespace(timesteps=list(range(STEPS, 0, -1)))
    assert decisions(Policy((Rule(snr > 0.0),)), scheduler=mute) == [(False, Reason.NOISE_UNKNOWN)] * STEPS


def test_without_a_scheduler_nothing_is_proven() -> None:
    """A told number of steps says nothing of sigma (a cache_context could): computed, with the reason."""
    assert decisions(Policy((Rule(sigma > 0.0),)), num_steps=STEPS) == [(False, Reason.NOISE_UNKNOWN)] * STEPS
