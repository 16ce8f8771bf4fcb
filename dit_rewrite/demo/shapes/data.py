"""A procedural data set: an anti-aliased shape on a dark background, labelled by shape and colour.

Images are generated from the seed of a generator and not stored, so the data set is infinite and reproducible. An image
is (3, SIZE, SIZE) float32 in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 16
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.9, -0.6, -0.6),
    "green": (-0.6, 0.8, -0.5),
    "blue": (-0.5, -0.3, 0.95),
    "yellow": (0.9, 0.8, -0.6),
    "white": (0.9, 0.9, 0.9),
}
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
NUM_CLASSES = len(CLASSES)
NULL_CLASS = NUM_CLASSES  # the label of "no class", for classifier-free guidance


def _distances(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return signed distances in pixels, negative inside, to each of SHAPES: (len(SHAPES), n, SIZE, SIZE)."""
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.62 * radius  # equilateral, apex up
    arm = 0.33 * radius
    upright = torch.maximum(x.abs() - arm, y.abs() - radius)
    level = torch.maximum(y.abs() - arm, x.abs() - radius)
    return torch.stack([circle, square, triangle, torch.minimum(upright, level)])


def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `n` images (n, 3, SIZE, SIZE) in [-1, 1], and their labels (n,) int64 below NUM_CLASSES."""
    labels = torch.randint(NUM_CLASSES, (n,), generator=generator)
    shape, colour = labels // len(COLOURS), labels % len(COLOURS)
    radius = 3.8 + 2.2 * torch.rand(n, 1, 1, generator=generator)
    room = SIZE - 2 * radius
    centre = radius + room * torch.rand(2, n, 1, 1, generator=generator)
    pixel = torch.arange(SIZE) + 0.5
    x = pixel[None, None, :] - centre[0]
    y = pixel[None, :, None] - centre[1]
    distance = _distances(x, y, radius)[shape, torch.arange(n)]
    coverage = (0.5 - distance).clamp(0, 1)[:, None]
    ink = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]
    ground = -0.85 + 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    return ground + coverage * (ink - ground), labels
