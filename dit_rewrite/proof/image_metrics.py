"""Distances of images from a reference, computed in float64 over the whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_rewrite.errors import MissingExtra

DATA_RANGE = 2.0  # images are in [-1, 1]


def relative_l2(images: Tensor, reference: Tensor) -> float:
    """Return ``|images - reference| / |reference|`` in the Euclidean norm; 0 means equal."""
    images, reference = images.double(), reference.double()
    return ((images - reference).norm() / reference.norm()).item()


def mean_squared_error(images: Tensor, reference: Tensor) -> float:
    """Return the mean squared error; 0 means equal."""
    return (images.double() - reference.double()).square().mean().item()


def psnr(images: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Return the peak signal-to-noise ratio in dB, ``10 log10(data_range^2 / mean squared error)``; inf if equal."""
    error = mean_squared_error(images, reference)
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(images: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Return the mean structural similarity of images (n, c, h, w) (Wang et al. 2004, Gaussian window); 1 means equal.

    Raises MissingExtra without torchmetrics.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise MissingExtra("torchmetrics", "structural similarity", "benchmark") from error
    found = structural_similarity_index_measure(images.double(), reference.double(), data_range=data_range)
    assert isinstance(found, Tensor)  # torchmetrics returns a tuple only if the full image is requested
    return found.item()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance of the Gaussians of two sets of features, (n, d) and (m, d) (Heusel et al. 2017,
    eq. 6).

    The distance is ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` with unbiased covariances A and B; n and m are
    at least 2. It is biased upwards for small sets, so only compare distances of equal n and m.
    """
    features, reference = features.double(), reference.double()
    a, b = features.T.cov().reshape(features.shape[1], -1), reference.T.cov().reshape(reference.shape[1], -1)
    # A B is similar to a positive semi-definite matrix; only rounding makes an eigenvalue negative or complex
    root = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    means = (features.mean(0) - reference.mean(0)).square().sum()
    return (means + a.trace() + b.trace() - 2 * root).clamp(min=0).item()
