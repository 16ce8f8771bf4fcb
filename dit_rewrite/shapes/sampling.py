"""Sampling the bundled denoiser: DDIM with classifier-free guidance, both halves in one call of the network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.shapes.data import NULL_CLASS, SIZE
from dit_rewrite.shapes.model import build_scheduler

GUIDANCE = 1.25  # chosen by measuring: examples/shapes/evaluate.py


def _told(denoiser: nn.Module, steps: int, scheduler: Any) -> AbstractContextManager[object]:
    """The trajectory of a rewritten denoiser; nothing for any other."""
    trajectory = getattr(denoiser, "trajectory", None)
    return nullcontext() if trajectory is None else trajectory(num_steps=steps, scheduler=scheduler)


def _noise(n: int, seed: int, device: torch.device) -> Tensor:
    """The start of ``n`` trajectories, drawn on the CPU so that it is the same on every device."""
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def sample_images(
    denoiser: nn.Module,
    labels: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Images ``(n, 3, SIZE, SIZE)`` in [-1, 1] of the classes ``labels`` ``(n,)``, on the device of the labels.

    ``guidance`` 1 is none. ``progress`` is called after each step.
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    conditioning = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])  # one object for all steps
    latents = _noise(len(labels), seed, labels.device)
    with _told(denoiser, steps, scheduler):
        for timestep in scheduler.timesteps:
            latents = _step(denoiser, scheduler, latents, timestep, conditioning, guidance)
            if progress is not None:
                progress()
    return latents.clamp(-1, 1)


def _step(
    denoiser: nn.Module, scheduler: Any, latents: Tensor, timestep: Tensor, conditioning: Tensor, guidance: float
) -> Tensor:
    times = timestep.to(latents.device).expand(len(conditioning))
    both = denoiser(torch.cat([latents, latents]), times, class_labels=conditioning, return_dict=False)[0]
    conditional, unconditional = both.chunk(2)
    guided = unconditional + guidance * (conditional - unconditional)
    return scheduler.step(guided, timestep, latents, return_dict=False)[0]
