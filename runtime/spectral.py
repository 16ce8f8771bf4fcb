"""SeaCache's spectral filter (arXiv 2602.18993, equations 5 to 7): what of a noisy signal is signal, by frequency.

A Wiener filter for x = a x0 + b noise, where the power of x0 falls with the frequency f like |f|^-p: along each axis
the gain a S / (a^2 S + b^2), S = |f|^-p, and their product scaled to the mean 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-16
LEAST_SHARE = 1e-6
POWERS = {2: 2.0, 3: 3.0}  # p of images and of videos, by the number of axes


class Grid(NamedTuple):
    """Where a signal's axes are: on the wire of the latent ``(batch, channels, …)``, of which each token of the signal
    covers a ``patch``; without one the signal is the latent itself."""

    latent: int
    patch: tuple[int, ...] = ()


def noise_share(sigma: float | None, snr: float | None) -> float | None:
    """The share b of noise where a + b = 1, as in flow matching; None where the noise is not known.

    The filter depends on a / b alone, which the signal-to-noise ratio tells of any scheduler. Where nobody knows that,
    a sigma that the caller named is such a share, as it is in diffusers' `cache_context`.
    """
    if snr is not None and snr >= 0:
        return 1 / (1 + math.sqrt(snr))
    return sigma if snr is None and sigma is not None and 0 <= sigma <= 1 else None


def on_grid(x: Tensor, grid: Grid, latent: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
    """A signal with one dimension for each axis, and which these are; None where its tokens do not fit the latent."""
    sizes = latent.shape[2:]
    if not grid.patch:
        return x, tuple(range(2, x.ndim))
    axes = [size // patch for size, patch in zip(sizes, grid.patch, strict=True)]
    if x.ndim != 3 or x.shape[1] != math.prod(axes):
        return None
    return x.unflatten(1, axes), tuple(range(1, 1 + len(axes)))


def sea_filter(x: Tensor, axes: Sequence[int], share: float) -> Tensor:
    """The filtered signal, in float32, at a share of noise. Waits for nothing on the host."""
    spectrum = torch.fft.fftn(x.float(), dim=tuple(axes))
    for axis in axes:
        gain = _gain(x.shape[axis], share, POWERS[len(axes)], x.device)
        spectrum = spectrum * gain.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return torch.fft.ifftn(spectrum, dim=tuple(axes)).real


def _gain(size: int, share: float, power: float, device: torch.device) -> Tensor:
    """The gain along one axis, of mean 1: the mean of a product of axes is the product of their means."""
    noise = min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)
    signal = 1 - noise
    frequencies = torch.fft.fftfreq(size, device=device, dtype=torch.float32)
    clean = 1 / (frequencies.abs().pow(power) + TINY)
    gain = signal * clean / (signal**2 * clean + noise**2 + TINY)
    return gain / gain.mean()
