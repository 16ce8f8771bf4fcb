"""The supported diffusion transformers at toy size with random weights.

`MODELS` maps a short name to a `Case`: how to build the model, the calls of one trajectory, and the number of sites
of each kind, counted by hand from the architecture. Each of these is one site:

* ``self``: attention whose K and V come from the residual stream that its output is added to
* ``cross``: attention whose K and V come from a condition alone
* ``joint``: one attention core over two token streams, one value for each stream that it is added to; one site
* ``mlp``: a feed-forward branch; each token stream has its own
* ``parallel``: attention and MLP that end in one common output projection

Nothing else in these models is a residual branch. In particular, sums in the embedders are none: the summands (time,
class, pooled text, size, position) are computed side by side, not one from the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tests.helpers.image_models import (
    build_dit,
    build_flux,
    build_omnigen,
    build_pixart_alpha,
    build_pixart_sigma,
    build_sd3,
    dit_calls,
    flux_calls,
    omnigen_calls,
    pixart_alpha_calls,
    pixart_sigma_calls,
    sd3_calls,
)
from tests.helpers.video_models import (
    build_cogvideox,
    build_latte,
    build_mochi,
    build_stdit,
    build_wan,
    cogvideox_calls,
    latte_calls,
    mochi_calls,
    stdit_calls,
    wan_calls,
)


class Build(Protocol):
    """Builds a model: seeded, in eval mode, without gradients."""

    def __call__(self, dtype: torch.dtype = torch.float32) -> nn.Module: ...


class Calls(Protocol):
    """The keyword arguments of each call of one trajectory."""

    def __call__(self, steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Case:
    """One model, its calls and its sites."""

    name: str
    build: Build
    calls: Calls
    sites: dict[str, int]
    autocast: bool = False
    """Also run with float32 weights under ambient bfloat16 autocast, as its pipeline does."""

    def inputs(self, steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
        """Arguments of each call of one trajectory; conditioning tensors are the same objects in every call."""
        return self.calls(steps, dtype, seed)


def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the prediction from the output of a model."""
    return result[0] if isinstance(result, tuple) else result


MODELS: dict[str, Case] = {
    case.name: case
    for case in (
        # 3 blocks of (self-attention, MLP).
        Case("dit", build_dit, dit_calls, {"self": 3, "mlp": 3}),
        # 3 blocks of (self-attention, cross-attention without norm and gate, MLP).
        Case("pixart_alpha", build_pixart_alpha, pixart_alpha_calls, {"self": 3, "cross": 3, "mlp": 3}),
        Case("pixart_sigma", build_pixart_sigma, pixart_sigma_calls, {"self": 3, "cross": 3, "mlp": 3}),
        # 3 blocks of (joint attention, image MLP, text MLP), but the last has neither a text value nor a text MLP:
        # joint 3 (2 + 2 + 1 values), MLP 3 + 2.
        Case("sd3", build_sd3, sd3_calls, {"joint": 3, "mlp": 3 + 2}),
        # 2 double blocks of (joint attention, image MLP, text MLP): joint 2, MLP 2 + 2. 2 single blocks, each one
        # branch over text and image together, whose last projection takes cat(attention, MLP). The text half of the
        # last single block is dropped, but only after the sum, so the branch has both halves.
        Case("flux", build_flux, flux_calls, {"joint": 2, "mlp": 2 + 2, "parallel": 2}),
        # 3 blocks of (joint attention, MLP). One MLP runs over cat(text, video) and its output's slices go to the two
        # streams: one site with two values, except in the last block, whose text sum is not read. The text value of the
        # last joint attention is read as part of that MLP's input, although no video token depends on it.
        Case("cogvideox", build_cogvideox, cogvideox_calls, {"joint": 3, "mlp": 3}),
        # 2 times a spatial block of (self-attention, cross-attention, MLP) and a temporal one of (self-attention, MLP).
        Case("latte", build_latte, latte_calls, {"self": 2 + 2, "cross": 2, "mlp": 2 + 2}),
        # 3 blocks of (joint attention, video MLP, text MLP), but the last has neither a text value nor a text MLP:
        # joint 3, MLP 3 + 2. A joint attention has one core for each sample of the batch (the text tokens that the mask
        # keeps differ in number); it is still one site. The attention pooling of the text is no branch: it is added to
        # the time embedding, from which it is not computed.
        Case("mochi", build_mochi, mochi_calls, {"joint": 3, "mlp": 3 + 2}, autocast=True),
        # 3 blocks of (self-attention, MLP), no gates. Text, time and image tokens are one stream.
        Case("omnigen", build_omnigen, omnigen_calls, {"self": 3, "mlp": 3}, autocast=True),
        # 2 blocks of (self-attention, cross-attention without gate, MLP).
        Case("wan", build_wan, wan_calls, {"self": 2, "cross": 2, "mlp": 2}),
        # 2 blocks of (spatial and temporal self-attention, cross-attention without gate, MLP).
        Case("stdit", build_stdit, stdit_calls, {"self": 2 * 2, "cross": 2, "mlp": 2}),
    )
}
