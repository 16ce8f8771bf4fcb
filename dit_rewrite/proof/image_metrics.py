"""How far images are from a reference, computed in float64 over the whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_rewrite.errors import MissingExtra

DATA_RANGE = 2.0  # of images in [-1, 1]


def relative_l2(images: Tensor, reference: Tensor) -> float:
    """``|images - reference| / |reference|`` in the Euclidean norm; 0 is equal."""
    images, reference = images.double(), reference.double()
    return ((images - reference).norm() / reference.norm()).item()


def psnr(images: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(data_range^2 / mean squared error)``; infinite when equal."""
    error = (images.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(images: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Mean structural similarity of images ``(n, c, h, w)`` (Wang et al. 2004, Gaussian window); 1 is equal.

    Raises MissingExtra without torchmetrics.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise MissingExtra("torchmetrics", "structural similarity", "benchmark") from error
    found = structural_similarity_index_measure(images.double(), reference.double(), data_range=data_range)
    assert isinstance(found, Tensor)  # alone, as no full image was asked for
    return found.item()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of the Gaussians of two sets of features ``(n, d)`` and ``(m, d)`` (Heusel et al. 2017, eq. 6).

    ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` with unbiased covariances A and B; needs two of each. It grows
    as a set gets smaller, so only distances of equally many samples may be compared.
    """
    features, reference = features.double(), reference.double()
    a, b = features.T.cov().reshape(features.shape[1], -1), reference.T.cov().reshape(reference.shape[1], -1)
    # A B is similar to a positive semi-definite matrix; rounding alone makes an eigenvalue negative or complex
    root = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    means = (features.mean(0) - reference.mean(0)).square().sum()
    return (means + a.trace() + b.trace() - 2 * root).clamp(min=0).item()
