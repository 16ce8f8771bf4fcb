"""SeaCache's filter against that of diffusers, and the share of noise it uses."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.hooks.sea_cache import _apply_sea_filter
from torch import Tensor

from dit_rewrite.runtime.measure import Measured, Meter, Tracked
from dit_rewrite.runtime.spectral import Grid, noise_share, on_grid, sea_filter
from tests.helpers.tracing import tokens

SHARES = [0.0, 0.02, 0.3, 0.7, 1.0]


def theirs(latent: Tensor, sigma: float, power: float) -> Tensor:
    """Apply diffusers' filter to a batch ``(batch, channels, frames, height, width)``, sample by sample."""
    return torch.stack([_apply_sea_filter(sample.movedim(0, -1), sigma, power).movedim(-1, 0) for sample in latent])


@pytest.mark.parametrize("sigma", SHARES)
def test_of_videos(sigma: float) -> None:
    """Videos are filtered along frames, height and width."""
    latent = tokens(0, 2, 3, 4, 6, 5)
    assert torch.allclose(sea_filter(latent, (2, 3, 4), sigma), theirs(latent, sigma, 3.0), atol=1e-5)


@pytest.mark.parametrize("sigma", SHARES)
def test_of_images(sigma: float) -> None:
    """Images have p = 2, and an axis of a single frame does not change the result."""
    latent = tokens(1, 2, 3, 6, 8)
    expected = theirs(latent[:, :, None], sigma, 2.0)[:, :, 0]
    assert torch.allclose(sea_filter(latent, (2, 3), sigma), expected, atol=1e-5)


def test_low_and_high_noise() -> None:
    """With little noise the signal is unchanged; with much noise only low frequencies remain."""
    grid = torch.arange(16) * (2 * math.pi / 16)
    slow, fast = torch.cos(grid), torch.cos(7 * grid)
    image = (slow[:, None] * slow + fast[:, None] * fast)[None, None]
    little, much = (sea_filter(image, (2, 3), share)[0, 0] for share in (0.0, 0.9))
    assert torch.allclose(little, image[0, 0], atol=1e-4)
    waves = [slow[:, None] * slow, fast[:, None] * fast]
    kept = [float((much * wave).sum() / (wave * wave).sum()) for wave in waves]
    assert kept[0] > 10 * kept[1] > 0


def test_tokens_on_their_grid() -> None:
    """Tokens in the order of the latent's patches are filtered as an image; other tokens are not filtered."""
    latent, grid = tokens(2, 1, 4, 6, 8), Grid(0, (2, 2))
    image = tokens(3, 1, 5, 3, 4)
    placed = on_grid(image.flatten(2).transpose(1, 2), grid, latent)
    assert placed is not None
    found = sea_filter(*placed, 0.4).movedim(-1, 1)
    assert torch.allclose(found, sea_filter(image, (2, 3), 0.4), atol=1e-6)
    assert on_grid(tokens(3, 1, 13, 5), grid, latent) is None, "text among them"
    assert on_grid(image, grid, latent) is None


def test_low_precision() -> None:
    """Half precision inputs are filtered in float32."""
    latent = tokens(1, 2, 3, 6, 8).bfloat16()
    assert torch.equal(sea_filter(latent, (2, 3), 0.5), sea_filter(latent.float(), (2, 3), 0.5))


def test_noise() -> None:
    """The share follows from the SNR if known, otherwise from an explicit sigma; otherwise it is unknown."""
    for sigma in (0.1, 0.5, 0.9):
        assert noise_share(7.0, ((1 - sigma) / sigma) ** 2) == pytest.approx(sigma)
        assert noise_share(sigma, None) == sigma
    assert (noise_share(None, 0.0), noise_share(None, math.inf)) == (1.0, 0.0)
    assert noise_share(1.5, None) is noise_share(-0.1, None) is noise_share(None, None) is None
    abar = 0.3  # variance preserving: a = sqrt(abar), b = sqrt(1 - abar)
    share = noise_share(None, abar / (1 - abar))
    assert share is not None
    assert (1 - share) / share == pytest.approx(math.sqrt(abar / (1 - abar)))


def relative(now: Tensor, before: Tensor) -> Tensor:
    return (now - before).abs().sum() / before.abs().sum()


def test_each_call_is_filtered_by_its_own_noise() -> None:
    """A constant latent changes with the noise of its step; if the noise is unknown, nothing is measured."""
    tracked, measured = Tracked(), Measured("x", "drift", 0, grid=Grid(0))
    latent, found = tokens(4, 1, 2, 8, 8), []
    for noise in (0.9, 0.6, None, 0.2):
        meter = Meter(tracked, [(measured,)], [latent], 1, 0, relative, noise)
        found.append(meter.read(0, "x"))
        meter.close([found[-1] is not None])
    filtered = [sea_filter(latent, (2, 3), noise) for noise in (0.9, 0.6, 0.2)]
    steps = [float(relative(now, before)) for before, now in zip(filtered, filtered[1:], strict=False)]
    assert found == [None, pytest.approx(steps[0]), None, pytest.approx(sum(steps))]
