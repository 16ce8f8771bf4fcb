"""SeaCache's spectral filter of a noisy signal (arXiv 2602.18993, equations 5 to 7).

It is a Wiener filter for x = a x0 + b noise, where the power of x0 falls with the frequency f as S = |f|^-p. The gain
along each axis is a S / (a^2 S + b^2), and the product of the gains is scaled to a mean of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-16
LEAST_SHARE = 1e-6
POWERS = {2: 2.0, 3: 3.0}  # p by the number of axes: images, videos


class Grid(NamedTuple):
    """The grid of a signal's tokens.

    latent: wire of the latent (batch, channels, *axes). patch: size of the patch of the latent that a token covers, one
    number per axis; empty if the signal is the latent itself.
    """

    latent: int
    patch: tuple[int, ...] = ()


def noise_share(sigma: float | None, snr: float | None) -> float | None:
    """Return the share b of noise for a + b = 1, as in flow matching, or None if the noise is unknown.

    The filter depends only on a / b, which is the square root of the SNR for any scheduler. If the SNR is unknown, an
    explicit sigma is taken as the share, which is its meaning in diffusers' `cache_context`.
    """
    if snr is not None and snr >= 0:
        return 1 / (1 + math.sqrt(snr))
    return sigma if snr is None and sigma is not None and 0 <= sigma <= 1 else None


def on_grid(x: Tensor, grid: Grid, latent: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
    """Reshape a signal to one dimension per axis, and return it with these dimensions.

    Returns None if the number of tokens does not match the latent.
    """
    sizes = latent.shape[2:]
    if not grid.patch:
        return x, tuple(range(2, x.ndim))
    axes = [size // patch for size, patch in zip(sizes, grid.patch, strict=True)]
    if x.ndim != 3 or x.shape[1] != math.prod(axes):
        return None
    return x.unflatten(1, axes), tuple(range(1, 1 + len(axes)))


def sea_filter(x: Tensor, axes: Sequence[int], share: float) -> Tensor:
    """Return the filtered signal in float32, for noise of the given share. Does not synchronise with the device."""
    spectrum = torch.fft.fftn(x.float(), dim=tuple(axes))
    for axis in axes:
        gain = _gain(x.shape[axis], share, POWERS[len(axes)], x.device)
        spectrum = spectrum * gain.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return torch.fft.ifftn(spectrum, dim=tuple(axes)).real


def _gain(size: int, share: float, power: float, device: torch.device) -> Tensor:
    """Return the gain along one axis, scaled to a mean of 1.

    The mean of a product over axes is the product of the means, so scaling each axis suffices.
    """
    noise = min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)
    signal = 1 - noise
    frequencies = torch.fft.fftfreq(size, device=device, dtype=torch.float32)
    clean = 1 / (frequencies.abs().pow(power) + TINY)
    gain = signal * clean / (signal**2 * clean + noise**2 + TINY)
    return gain / gain.mean()
