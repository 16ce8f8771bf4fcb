"""What `verify` is given to prove: a model and the calls of one trajectory. Here: the bundled denoiser.

python -m dit_rewrite verify --model examples.ci.shapes_dit:build --policy fora:interval=3
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_rewrite.shapes.data import NULL_CLASS, SIZE
from dit_rewrite.shapes.model import load_denoiser

STEPS = 12


def build() -> tuple[nn.Module, list[dict[str, Any]]]:
    """The trained denoiser, and its keyword arguments at each step: two images, with and without their class.

    The latents need not come from a sampler: equality has to hold for any. The labels are one object for all
    steps, as in a sampler, since that is how the calls of one trajectory are known to belong together.
    """
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 4, 3, SIZE, SIZE, generator=generator)
    labels = torch.tensor([0, 7, NULL_CLASS, NULL_CLASS])
    calls = []
    for step in range(STEPS):
        part = step / STEPS
        latents = (1 - part) * start + part * target
        timestep = torch.full((4,), round(999 * (1 - part)))
        calls.append({"hidden_states": latents, "timestep": timestep, "class_labels": labels, "return_dict": False})
    return load_denoiser(), calls
