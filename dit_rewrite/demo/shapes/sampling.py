"""Sample the bundled denoisers with classifier-free guidance, both halves in one call, by DDIM or another scheduler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.demo.shapes.data import NULL_CLASS, SIZE
from dit_rewrite.demo.shapes.model import build_scheduler

GUIDANCE = 1.25  # chosen by examples/shapes/evaluate.py


def _trajectory(denoiser: nn.Module, steps: int, scheduler: Any) -> AbstractContextManager[object]:
    """Open an explicit trajectory of a rewritten denoiser; do nothing for other modules."""
    trajectory = getattr(denoiser, "trajectory", None)
    return nullcontext() if trajectory is None else trajectory(num_steps=steps, scheduler=scheduler)


def _noise(n: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Return the initial noise of `n` trajectories, drawn on the CPU so that it is the same for every device."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(device)


Predict = Callable[[Tensor, Tensor], Tensor]  # (latents, timesteps) of both halves of the guidance -> predictions


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    predict: Predict,
    n: int,
    device: torch.device,
    *,
    steps: int,
    guidance: float,
    seed: int,
    scheduler: Any = None,
    size: int = SIZE,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Sample `n` images (n, 3, size, size) with `scheduler`. `predict` calls `denoiser`, the conditional half first.

    The guided prediction is that of Ho and Salimans 2022, equation 6, with the weight w + 1 = `guidance`. `scheduler`
    is DDIM by default. It may be another diffusers scheduler for the process that the denoiser was trained on, if it
    starts from noise of variance 1 and does not scale the model's input, such as DPM-Solver++ or UniPC. There is one
    call per timestep of the scheduler; second-order ones, such as Heun's, have two per step.
    """
    scheduler = build_scheduler() if scheduler is None else scheduler
    scheduler.set_timesteps(steps)
    latents = _noise(n, size, seed, device)
    with _trajectory(denoiser, steps, scheduler):
        for timestep in scheduler.timesteps:
            both = predict(torch.cat([latents, latents]), timestep.to(device).expand(2 * n))
            conditional, unconditional = both.chunk(2)
            guided = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
            if progress is not None:
                progress()
    return latents.clamp(-1, 1)


def sample_images(
    denoiser: nn.Module,
    labels: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    scheduler: Any = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Sample images (n, 3, SIZE, SIZE) in [-1, 1] of the classes `labels` (n,), on the device of the labels.

    `guidance` = 1 turns guidance off. `scheduler` is as in `sample`. `progress` is called after each call of the
    denoiser.
    """
    conditioning = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])  # one object for all steps: conditioning

    def predict(latents: Tensor, times: Tensor) -> Tensor:
        prediction: Tensor = denoiser(latents, times, class_labels=conditioning, return_dict=False)[0]
        return prediction

    return sample(
        denoiser,
        predict,
        len(labels),
        labels.device,
        steps=steps,
        guidance=guidance,
        seed=seed,
        scheduler=scheduler,
        progress=progress,
    )
