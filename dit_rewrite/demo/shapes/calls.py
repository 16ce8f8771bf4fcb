"""The factory that ``dit-rewrite verify`` uses by default: the bundled denoiser and the calls of one trajectory.

Write a similar factory for your model: ``--model my_package.models:build``. It takes the number of steps, and for
``dit-rewrite analyze`` also a seed. It returns the model and the keyword arguments of the call in each step.
Conditioning tensors must be the same objects in every step, as in a pipeline.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_rewrite.demo.shapes import SIZE, load_denoiser


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
