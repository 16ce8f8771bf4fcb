"""The error of reusing one site at one step, against a run in which the test does that by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite.analysis.reuse_errors import reuse_errors
from dit_rewrite.errors import BadArgument, NoImage
from dit_rewrite.module import RewrittenModule
from dit_rewrite.proof.image_metrics import relative_l2
from tests.helpers import tiny

STEPS = 4


def sample(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """A sampler whose latent depends on the model's outputs."""
    condition = tiny.condition(seed)
    latent = tiny.calls(1, seed)[0]["hidden_states"]
    times = [call["timestep"] for call in tiny.calls(steps, seed)]
    trajectory = getattr(model, "trajectory", None)
    if trajectory is None:
        return _loop(model, latent, times, condition)
    with trajectory(steps):
        return _loop(model, latent, times, condition)


def _loop(model: Any, latent: Tensor, times: list[Tensor], condition: Tensor) -> Tensor:
    for time in times:
        latent = latent + 0.2 * model(latent, time, condition)
    return latent


def by_hand(model: tiny.TinyDiT, part: torch.nn.Module, step: int) -> Tensor:
    """Sample with the output of one module at one step replaced by that of the step before."""
    outputs: list[Tensor] = []

    def hook(module: object, inputs: object, output: Tensor) -> Tensor:
        outputs.append(output)
        return outputs[step - 1] if len(outputs) == step + 1 else output

    handle = part.register_forward_hook(hook)
    with torch.no_grad():
        image = sample(model, 0)
    handle.remove()
    return image


def test_one_site_is_reused_at_one_step() -> None:
    model = tiny.build()
    found = reuse_errors(model, sample, [0], backend="aot_eager", at=(1, 3))
    assert not isinstance(model, RewrittenModule)
    assert found.sites == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    with torch.no_grad():
        plain = sample(model, 0)
    for i, block in enumerate(model.blocks):
        for name, part in (("attn", block.attn), ("mlp", block.mlp)):
            errors = found.of(f"blocks.{i}.{name}")
            assert errors.isnan().tolist() == [True, False, True, False]
            for step in (1, 3):
                assert errors[step] == pytest.approx(relative_l2(by_hand(model, part, step), plain), rel=1e-3)


def test_the_mean_over_prompts() -> None:
    model = tiny.build()
    options: dict[str, Any] = {"backend": "aot_eager", "at": (2,), "sites": ["blocks.1.mlp"]}
    both = reuse_errors(model, sample, [0, 1], **options)
    alone = [reuse_errors(model, sample, [seed], **options).values[0, 2] for seed in (0, 1)]
    assert both.values[0, 2] == pytest.approx(float(sum(alone)) / 2)
    assert both.prompts == 2


def test_what_cannot_be_measured() -> None:
    model = tiny.build()
    with pytest.raises(BadArgument, match="sites='blocks.9' .*blocks.0.attn"):
        reuse_errors(model, sample, [0], backend="aot_eager", sites=["blocks.9"])
    for step in (0, 99):
        with pytest.raises(BadArgument, match=f"at={step} is out of range. Give at as steps from 1 to "):
            reuse_errors(model, sample, [0], backend="aot_eager", at=(step,))
    with pytest.raises(BadArgument, match="recorded calls"):
        reuse_errors(model, [tiny.calls(2)], backend="aot_eager")
    with pytest.raises(NoImage, match="sampling returned NoneType"):
        reuse_errors(model, lambda ours, seed: None, [0], backend="aot_eager")
