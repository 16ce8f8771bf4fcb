"""How far images are from a reference, computed in float64 over the whole batch."""

from __future__ import annotations

import math

from torch import Tensor

DATA_RANGE = 2.0  # of images in [-1, 1]


def relative_l2(images: Tensor, reference: Tensor) -> float:
    """``|images - reference| / |reference|`` in the Euclidean norm; 0 is equal."""
    images, reference = images.double(), reference.double()
    return ((images - reference).norm() / reference.norm()).item()


def psnr(images: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(data_range^2 / mean squared error)``; infinite when equal."""
    error = (images.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)
