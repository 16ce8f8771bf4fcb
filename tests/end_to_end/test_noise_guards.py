"""Guards on the noise level: known only in an explicit trajectory that names its scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.hooks.sea_cache import _apply_sea_filter

from dit_rewrite.errors import DecisionReason, NoiseUnknown, Reason, RefusalReason
from dit_rewrite.guards import drift, sigma, snr
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.where import Where
from tests.helpers import tiny
from tests.helpers.drawn import latents

STEPS = 8


def decisions(policy: Policy, **told: object) -> list[tuple[bool, Reason]]:
    """Whether the first site was reused at each step, with the reason."""
    model = tiny.rewritten(tiny.build(), policy)
    calls = tiny.calls(STEPS)
    for call, time in zip(calls, getattr(told.get("scheduler"), "timesteps", ()), strict=False):
        call["timestep"] = torch.as_tensor(time).expand(2)
    with model.trajectory(**told):  # type: ignore[arg-type]
        tiny.outputs(model, calls)
    rows = model.stats().decisions
    return [(row.strategies[name] == "reuse", row.reasons[name]) for row in rows for name in [next(iter(row.reasons))]]


def test_reuse_where_the_signal_is_strong() -> None:
    """The SNR = abar / (1 - abar) at the scheduler's timesteps decides each step but the first."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(STEPS)
    abar = scheduler.alphas_cumprod[scheduler.timesteps]
    strong = (abar / (1 - abar) > 0.5).tolist()
    assert 0 < sum(strong) < STEPS
    found = decisions(Policy((Rule(snr > 0.5),)), scheduler=scheduler)
    assert [reused for reused, _ in found] == strong


def test_a_guard_on_sigma_under_flow_matching() -> None:
    """Sigma is the share of noise; at the last step it is above 0, and the guard is true there."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    expected = [False, *(value < 0.6 for value in scheduler.sigmas[1:STEPS].tolist())]
    found = decisions(Policy((Rule(sigma < 0.6),)), scheduler=scheduler)
    assert [reused for reused, _ in found] == expected


def test_the_snr_without_a_scheduler_is_an_error() -> None:
    """An explicit trajectory could never reuse: the error says so, and how to correct it."""
    with pytest.raises(NoiseUnknown, match=r"no scheduler was given.*Use trajectory\(scheduler="):
        decisions(Policy((Rule(snr > 0.0),)), num_steps=STEPS)


def test_a_scheduler_that_does_not_say_it_proves_nothing() -> None:
    """The steps are known but their noise is not: the site computes, with the reason."""
    mute = SimpleNamespace(timesteps=list(range(STEPS, 0, -1)))
    assert decisions(Policy((Rule(snr > 0.0),)), scheduler=mute) == [(False, DecisionReason.NOISE_UNKNOWN)] * STEPS


def test_without_a_scheduler_nothing_is_proven() -> None:
    """The number of steps alone does not give sigma (a cache_context could): the site computes, with the reason."""
    assert decisions(Policy((Rule(sigma > 0.0),)), num_steps=STEPS) == [(False, DecisionReason.NOISE_UNKNOWN)] * STEPS


@torch.no_grad()
@pytest.mark.parametrize("probe", ["latent", "self"])
def test_filtered_by_the_noise_of_its_step(probe: Literal["latent", "self"]) -> None:
    """Equal to diffusers' filter, applied to the model's input or to the stream that its first branch reads."""
    model = tiny.Patched().eval().requires_grad_(False)
    symbol = drift(probe, filter="sea", rescale=(1.0, 0.0))  # it may be negative, so that it is read
    compiled = tiny.rewritten(model, Policy((Rule(symbol < 0, where=Where(layers=(0, 1), kinds=("self",))),)))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    path = latents((3, 8, 12), 4, torch.float32, torch.Generator().manual_seed(0))
    with compiled.trajectory(scheduler=scheduler):
        for latent, time in zip(path, scheduler.timesteps, strict=True):
            compiled(latent, time.expand(len(latent)), tiny.condition())
    found = [list(d.measured.values()) for d in compiled.stats().decisions]
    grids = [x if probe == "latent" else model.body.embed(model.patches(x).movedim(1, -1)).movedim(-1, 1) for x in path]
    filtered = [
        torch.stack([_apply_sea_filter(x.movedim(0, -1)[None], float(s), 2.0) for x in grid])
        for grid, s in zip(grids, scheduler.sigmas, strict=False)
    ]
    pairs = zip(filtered, filtered[1:], strict=False)
    expected = [float((now - before).abs().sum() / before.abs().sum()) for before, now in pairs]
    assert found == [[], *([{symbol.name: pytest.approx(x, rel=1e-4)}] for x in expected)]


def test_a_filter_without_noise_or_grid_proves_nothing() -> None:
    """Each decision gives unknown noise as its reason; tokens without a grid are refused at compile time."""
    filtered = Policy((Rule(drift("latent", filter="sea") < 9),))
    assert filtered.mentions == {"drift(latent, filter=sea)"}
    model = tiny.rewritten(tiny.Patched().eval(), filtered)
    with torch.no_grad(), model.trajectory(3):
        for k in range(3):
            model(torch.ones(2, 3, 8, 8) + k, torch.full((2,), 3 - k), tiny.condition())
    for decision in model.stats().decisions:
        assert set(decision.reasons.values()) == {DecisionReason.NOISE_UNKNOWN}
        assert decision.measured == {}
    packed = tiny.rewritten(tiny.build(), filtered)
    tiny.outputs(packed, tiny.calls(2))
    assert {refusal.reason for refusal in packed.explain().refused} >= {RefusalReason.NO_GRID}
