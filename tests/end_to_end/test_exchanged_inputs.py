"""Prompts and samples that a caller exchanges in the middle of a run: none gets the values of another one."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_rewrite.errors import StreamReason, TrajectoryReason
from dit_rewrite.policies import FORA
from tests.helpers import tiny
from tests.helpers.drawn import prepare
from tests.helpers.tiny import calls, condition, fora, outputs, rewritten, row, same

STEPS = 6
MODES = pytest.mark.parametrize("mode", ["explicit", "inferred"])


class MaskedDiT(tiny.TinyDiT):
    """The condition counts where a mask is set."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, condition * mask)


def masked() -> MaskedDiT:
    model = MaskedDiT()
    prepare(model, torch.float32)
    return model


@MODES
@pytest.mark.parametrize("exchanged", [1, 2, 3])
@torch.no_grad()
def test_a_prompt_that_is_exchanged(mode: str, exchanged: int) -> None:
    """The old prompt was freed. In the second step, the new one could be an input that moves from step to step."""
    model, mask = masked(), torch.ones(2, 1)
    compiled, inputs = rewritten(model, FORA(10)), [{**arguments, "mask": mask} for arguments in calls(STEPS)]
    parts, found = [inputs[:exchanged], inputs[exchanged:]], []
    with compiled.trajectory(STEPS) if mode == "explicit" else contextlib.nullcontext():
        for seed, part in enumerate(parts):
            given = condition(seed)
            found.append([compiled(**{**arguments, "condition": given}).clone() for arguments in part])
            del given
    for seed, (part, results) in enumerate(zip(parts, found, strict=True)):
        assert same(results, fora(model, [{**arguments, "condition": condition(seed)} for arguments in part], 10))
    assert row(compiled, STEPS) == "C" + "R" * (exchanged - 1) + "C" + "R" * (STEPS - 1 - exchanged)
    stats = compiled.stats()
    if exchanged == 1:
        assert (stats.streams, stats.num_trajectories) == ({StreamReason.MOVED_ONCE: 1}, 1)
    elif mode == "explicit":
        assert stats.streams == {StreamReason.NEW_CONDITIONING: 1}
    else:
        assert stats.trajectories[TrajectoryReason.NEW_CONDITIONING] == 1


@MODES
@torch.no_grad()
def test_an_input_that_moves_is_reused_under_from_its_third_step_on(mode: str) -> None:
    model, inputs = masked(), calls(STEPS)
    masks = [torch.full((2, 1), 1 + 0.01 * step) for step in range(STEPS)]
    compiled, found = rewritten(model, FORA(10)), []
    with compiled.trajectory(STEPS) if mode == "explicit" else contextlib.nullcontext():
        for arguments, mask in zip(inputs, masks, strict=True):
            found.append(compiled(**arguments, mask=mask.clone()).clone())
    assert row(compiled, STEPS) == "CCRRRR"
    moving = [{**arguments, "mask": mask} for arguments, mask in zip(inputs, masks, strict=True)]
    assert same(found[1:], fora(model, moving[1:], 10))
    assert compiled.stats().streams == {StreamReason.MOVED_ONCE: 1}


class Timed(tiny.TinyDiT):
    """The time of each sample is a number in a list."""

    def forward(self, hidden_states: Tensor, timestep: list[float], condition: Tensor) -> Tensor:
        times = torch.stack([torch.ones(()) * time for time in timestep])
        return super().forward(hidden_states, times, condition)


@pytest.mark.parametrize("number", [int, float, np.float32])
def test_times_in_a_list(number: Any) -> None:
    """Dynamo may take the first number for a constant and compile twice; the second run has all code."""
    model = Timed()
    prepare(model, torch.float32)
    compiled = rewritten(model)
    inputs = [{**a, "timestep": [number(time) for time in a["timestep"]]} for a in calls(STEPS)]
    for _ in range(2):
        with compiled.trajectory(STEPS):
            found = outputs(compiled, inputs)
    assert same(found, fora(model, inputs))
    assert row(compiled, STEPS) == "CRRCRR"
    assert compiled.stats().recompiles == (number is float)


def batch(sample: int) -> list[dict[str, Any]]:
    """Eight pictures of one prompt; the last one is number `sample`."""
    inputs = [path for seed in (*range(7), sample) for path in [calls(STEPS, seed, condition())]]
    given = condition()[:1].expand(8, -1).contiguous()
    return [
        {
            "hidden_states": torch.cat([a["hidden_states"][:1] for a in step]),
            "timestep": step[0]["timestep"][:1].expand(8),
            "condition": given,
        }
        for step in zip(*inputs, strict=True)
    ]


@pytest.mark.parametrize("mode", ["named", "inferred"])
def test_a_sample_that_is_exchanged(mode: str) -> None:
    """One picture of eight: the latent of the whole batch moves by less than half. An explicit trajectory does not
    read latents, so the caller names the batches."""
    model = tiny.build()
    compiled = rewritten(model, FORA(10))
    before, after = batch(8), batch(9)
    given = before[0]["condition"]
    parts = [before[:3], [{**arguments, "condition": given} for arguments in after[3:]]]
    found = []
    with compiled.trajectory(STEPS) if mode == "named" else contextlib.nullcontext():
        for number, part in enumerate(parts):
            with compiled.cache_context(f"batch {number}") if mode == "named" else contextlib.nullcontext():
                found.append(outputs(compiled, part))
    assert row(compiled, STEPS) == "CRRCRR"
    for part, results in zip(parts, found, strict=True):
        assert same(results, fora(model, part, 10))
    if mode == "inferred":
        assert compiled.stats().trajectories[TrajectoryReason.NEW_LATENT] == 1
