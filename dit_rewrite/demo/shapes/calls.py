"""The factories that commands use by default: the bundled denoiser with the calls of one trajectory, or its sampler.

Write a similar factory for your model: ``--model my_package.models:build``. It takes the number of steps, and for
``dit-rewrite analyze`` also a seed. It returns the model and the keyword arguments of the call in each step.
Conditioning tensors must be the same objects in every step, as in a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.demo.shapes import SIZE, load_denoiser
from dit_rewrite.demo.shapes.data import NUM_CLASSES
from dit_rewrite.demo.shapes.model import SCHEDULE
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images


def build(steps: int, seed: int = 0) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Return the bundled denoiser and the inputs of one trajectory: two images from noise to a fixed target."""
    generator = torch.Generator().manual_seed(seed)
    noise, target = torch.randn(2, 2, 3, SIZE, SIZE, generator=generator)
    labels = torch.tensor([1, 8])
    calls = [
        {
            "hidden_states": noise * (1 - step / steps) + target * (step / steps),
            "timestep": torch.tensor([999 - step * 1000 // steps] * 2),
            "class_labels": labels,
            "return_dict": False,
        }
        for step in range(steps)
    ]
    return load_denoiser(), calls


Solvers = dict[str, Callable[[Any, int, int], Tensor]]


def sampler(steps: int = 50, images: int = 8) -> tuple[torch.nn.Module, Callable[[Any, int], Tensor], Solvers]:
    """Return the bundled denoiser, its sampler by DDIM, and the solvers that may sample it with fewer steps."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    labels = torch.arange(images) % NUM_CLASSES

    def sample(denoiser: Any, count: int, seed: int, scheduler: Callable[[], Any] | None = None) -> Tensor:
        made = None if scheduler is None else scheduler()
        return sample_images(denoiser, labels, steps=count, guidance=GUIDANCE, seed=seed, scheduler=made)

    spaced = {**SCHEDULE, "timestep_spacing": "trailing"}
    solvers: dict[str, Callable[[], Any] | None] = {
        "DDIM": None,
        "DPM-Solver++ 2M": partial(DPMSolverMultistepScheduler, **spaced),
        "UniPC": partial(UniPCMultistepScheduler, **spaced),
    }
    controls: Solvers = {name: partial(sample, scheduler=make) for name, make in solvers.items()}
    return load_denoiser(), lambda denoiser, seed: sample(denoiser, steps, seed), controls
