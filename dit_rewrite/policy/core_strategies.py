"""Strategies in the place of an attention op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeGuard

from dit_rewrite.errors import BadParameter

GRIDS = '(H, W) or (T, H, W) in tokens, "latent", or None for a sequence'


@dataclass(frozen=True)
class Core:
    """A strategy in the place of an attention op; `dit_rewrite.compiler.attention_codecs.codec` implements it."""


@dataclass(frozen=True)
class WindowResidual(Core):
    """Window attention plus the cached residual to full attention (DiTFastAttn's WA-RS, section 3.2).

    `window` is the distance that a token attends to on each side: a fraction of the tokens (1/8 in the paper's code) or
    a number of tokens. With `grid`, the (H, W) or (T, H, W) of the image's or video's tokens, it may be one number or
    fraction per axis. grid="latent" takes the grid that the graph shows for each attention, along the axes of the
    latent: (T, H, W), (H, W), or (T,) for the temporal attention of a video. The strategy is refused where the graph
    shows no grid, or one with another number of axes than the window, and where `grid` has another number of tokens
    than the attention.

    Text tokens that a joint attention puts before or after the image attend to all tokens, and all tokens attend to
    them. Only a step followed by one that reads the residual computes it. ``residual=False`` takes it as zero, which is
    plain window attention. Raises BadParameter.
    """

    window: float | tuple[float, ...] = 0.125
    grid: tuple[int, ...] | Literal["latent"] | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        reach = self.window if isinstance(self.window, tuple) else (self.window,)
        good = all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < math.inf for w in reach)
        if not good or any(isinstance(w, float) and w >= 1 for w in reach):
            raise BadParameter("WindowResidual", "window", self.window, "fractions below 1, or whole numbers of tokens")
        if self.grid not in (None, "latent") and not _is_grid(self.grid):
            raise BadParameter("WindowResidual", "grid", self.grid, GRIDS)
        axes = (1, 2, 3) if self.grid == "latent" else (1, 1 if self.grid is None else len(self.grid))
        if isinstance(self.window, tuple) and len(self.window) not in axes:
            allowed = f"one number, or a tuple of {axes[-1]}: one for each axis of grid={self.grid}"
            raise BadParameter("WindowResidual", "window", self.window, allowed)

    def fits(self, axes: int) -> bool:
        """Return whether the window has one size for all axes, or one for each of so many."""
        return not isinstance(self.window, tuple) or len(self.window) in (1, axes)

    def reach(self, tokens: int) -> tuple[int, ...]:
        """Return the window in tokens on each side, per axis of the grid, for a sequence of `tokens`."""
        sizes = self.grid if isinstance(self.grid, tuple) else (tokens,)
        window = self.window if isinstance(self.window, tuple) else (self.window,) * len(sizes)
        return tuple(
            int(w * size) if isinstance(w, float) else w for w, size in zip(window, sizes, strict=len(window) > 1)
        )


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether `value` is an int or a float, which JSON can store, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_grid(grid: object) -> bool:
    """Return whether `grid` is a tuple of 1 to 3 numbers of tokens."""
    axes = grid if isinstance(grid, tuple) else ()
    return 1 <= len(axes) <= 3 and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in axes)


@dataclass(frozen=True)
class BlockwiseReuse(Core):
    """Recompute attention for the blocks of keys whose scores may have changed by more than `threshold`, and reuse the
    partial results of the others (CachedAttention, algorithms 1 and 2; kernels/blockwise_attention).

    `block` is the number of keys in a block. None chooses it by shape: one block for keys that do not change, and at
    most eight for others, since each block stores a partial output as large as the output. `bound` estimates the change
    of the scores: "paper" is equation 14 as printed, which can be negative; it is about the queries that each block was
    computed from, so the state stores them. "sound" is a true upper bound.

    `keys="condition"` is for attention over one sequence of image and condition (joint attention, or a single stream):
    only blocks of the condition's keys may be kept, and the image's keys are always recomputed, as one block. Keys of
    the condition beyond a whole number of blocks are recomputed with them; `block=None` makes the condition one block.
    There bound="paper" is allowed: a block is kept only if its keys and values did not move at all, where equation 14
    is defined. Where the graph does not show which keys belong to the condition, the strategy is refused.

    `certify` computes a bound on the error that reuse adds to the output of each such attention at each step:
    max |output - softmax(scale q kᵀ + mask) v| over the batch, heads, tokens and channels, for the q, k and v of this
    step, rounding included (kernels/blockwise_attention/certificate.py). It holds for both values of `bound`, and
    `stats().certificates` has it. It is not a bound on the error of the image: q, k and v already carry the errors of
    earlier layers and steps, and nothing is said of how later layers amplify this one. It takes several passes over
    the output per block, so use it to choose a threshold and not in production. Raises BadParameter.
    """

    threshold: float
    block: int | None = None
    bound: Literal["paper", "sound"] = "sound"
    certify: bool = False
    keys: Literal["all", "condition"] = "all"

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or math.isnan(self.threshold):
            raise BadParameter("BlockwiseReuse", "threshold", self.threshold, "a number, inf or -inf")
        whole = isinstance(self.block, int) and not isinstance(self.block, bool)
        if self.block is not None and not (whole and self.block >= 1):
            raise BadParameter("BlockwiseReuse", "block", self.block, "a number of keys >= 1, or None")
        if self.bound not in ("paper", "sound"):
            raise BadParameter("BlockwiseReuse", "bound", self.bound, '"paper" or "sound"')
        if not isinstance(self.certify, bool):
            raise BadParameter("BlockwiseReuse", "certify", self.certify, "True or False")
        if self.keys not in ("all", "condition"):
            raise BadParameter("BlockwiseReuse", "keys", self.keys, '"all" or "condition"')
