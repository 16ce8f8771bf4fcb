"""SeaCache beside diffusers' filter and its loop written out."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks.sea_cache import _apply_sea_filter
from torch import Tensor

from dit_rewrite.policies import SeaCache
from tests.helpers import tiny
from tests.helpers.drawn import latents
from tests.helpers.records import Decided, record, relative, splitting
from tests.helpers.runs import by_site, the_row

STEPS = 20


def seacache(probes: list[Tensor], threshold: float, warmup: int, cooldown: int, most: int | None) -> Decided:
    """diffusers' hook, on the probes of one sampler after its filter."""
    row, compared, total, run = "", [], 0.0, 0
    for i in range(STEPS):
        reuse = warmup <= i < STEPS - cooldown and not (most is not None and run >= most)
        if reuse:
            compared.append(total + relative(probes[i], probes[i - 1]))
            reuse = compared[-1] < threshold
        total, run = (compared[-1], run + 1) if reuse else (0.0, 0)
        row += "R" if reuse else "C"
    return Decided(row, compared)


@torch.no_grad()
@pytest.mark.parametrize(
    ("probe", "order", "most", "cooldown"),
    [("latent", 1, 2, 1), ("latent", 0, None, 3), ("modulated_input", 0, None, 1)],
)
def test_seacache(probe: Literal["latent", "modulated_input"], order: int, most: int | None, cooldown: int) -> None:
    model = tiny.Patched().eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    path = latents((3, 8, 12), STEPS, torch.float32, torch.Generator().manual_seed(0))
    given = tiny.condition()
    inputs = [
        {"latent": latent, "timestep": time.expand(len(latent)), "condition": given}
        for latent, time in zip(path, scheduler.timesteps, strict=True)
    ]
    records = record(model, model.body, inputs, "latent")
    images = records.latents
    if probe == "modulated_input":  # its tokens are patches
        images = [x.movedim(1, -1).unflatten(-1, (4, 6)) for x in records.modulated]
    filtered = [
        torch.stack([_apply_sea_filter(x.movedim(0, -1)[None].float(), float(s), 2.0) for x in image]).double()
        for image, s in zip(images, scheduler.sigmas, strict=False)
    ]
    threshold, expected = splitting(lambda t: seacache(filtered, t, 1, cooldown, most))
    assert {"C", "R"} == set(expected[1:-cooldown])
    compiled = tiny.rewritten(model, SeaCache(threshold, order, 1, cooldown, most, probe))
    with compiled.trajectory(STEPS, scheduler):
        tiny.outputs(compiled, inputs)
    assert the_row(by_site([decision.strategies for decision in compiled.stats().decisions])) == expected
