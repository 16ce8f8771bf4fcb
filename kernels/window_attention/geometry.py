"""Geometry of window attention: which keys a query attends to, and how many scores that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dit_rewrite.kernels.common.checks import require

AXES = 3  # time, height, width; a grid with fewer axes is padded with leading axes of size 1


@dataclass(frozen=True)
class Window:
    """A window over a grid of `sizes` (T, H, W), with `prefix` tokens of text before it and `suffix` behind it.

    Text attends to all tokens, and all tokens attend to it. A grid token attends to the grid tokens whose distance on
    each axis is at most `reach` of that axis.
    """

    prefix: int
    sizes: tuple[int, ...]
    reach: tuple[int, ...]
    suffix: int = 0

    @property
    def axes(self) -> int:
        """Number of axes without leading axes of size 1; at least 1."""
        return next((AXES - i for i, size in enumerate(self.sizes) if size != 1), 1)

    def sees(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return whether queries `rows` attend to keys `cols`; both are token indices and broadcast."""
        seen = self._is_text(rows) | self._is_text(cols)
        places = zip(self._coordinates(rows), self._coordinates(cols), self.reach, strict=True)
        t, y, x = ((row - col).abs() <= reach for row, col, reach in places)
        return seen | (t & y & x)

    def _is_text(self, tokens: Tensor) -> Tensor:
        return (tokens < self.prefix) | (tokens >= self.prefix + math.prod(self.sizes))

    def _coordinates(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, height, width = self.sizes
        place = tokens - self.prefix
        return place // (height * width), place // width % height, place % width

    def pairs(self) -> int:
        """Count the (query, key) pairs in the window. An axis of L positions has L (2w + 1) - w (w + 1) within w."""
        grid = math.prod(self.sizes)
        near = math.prod(size * (2 * w + 1) - w * (w + 1) for size, w in zip(self.sizes, self.reach, strict=True))
        text = self.prefix + self.suffix
        return near + text * (text + 2 * grid)


def make_window(
    where: str, tokens: int, window: Sequence[int], grid: Sequence[int] | None, prefix: int, suffix: int = 0
) -> Window:
    """Return the window over `tokens` tokens. Raises BadOpArgument, for the op `where`, if the arguments conflict."""
    require(0 <= prefix < tokens, where, "prefix", prefix, f"0 or more, and less than the number of tokens, {tokens}")
    left = tokens - prefix
    require(
        0 <= suffix < left, where, "suffix", suffix, f"0 or more, and less than the tokens after the prefix, {left}"
    )
    sizes = (left - suffix,) if grid is None else tuple(grid)
    require(1 <= len(sizes) <= AXES, where, "grid", sizes, "(H, W), (T, H, W), or None for a sequence")
    fits = all(size > 0 for size in sizes) and math.prod(sizes) == left - suffix
    require(fits, where, "grid", sizes, f"sizes whose product is the number of tokens without text, {left - suffix}")
    require(len(window) == len(sizes), where, "window", tuple(window), f"one number for each axis of {sizes}")
    inside = all(0 <= w < size for w, size in zip(window, sizes, strict=True))
    require(inside, where, "window", tuple(window), f"tokens on each side, from 0 and less than the axis of {sizes}")
    missing = AXES - len(sizes)
    return Window(prefix, (1,) * missing + sizes, (0,) * missing + tuple(window), suffix)


def paper_window(tokens: int) -> tuple[int]:
    """Return DiTFastAttn's window for a sequence: an eighth of the tokens on each side, 23 % of all scores."""
    return (tokens // 8,)


def window_flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    window: Sequence[int],
    grid: Sequence[int] | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> int:
    """Return the FLOPs of window attention on (B, H, N, d): 4 d for each score in the window.

    2 d are for the product of query and key, 2 d for the product with the values. `attn_mask` does not reduce the
    count. Raises BadParameter.
    """
    batch, heads, tokens, head_size = q_shape
    require(tuple(k_shape) == tuple(q_shape), "window_flops", "k_shape", tuple(k_shape), f"that of q, {tuple(q_shape)}")
    return 4 * batch * heads * head_size * make_window("window_flops", tokens, window, grid, prefix, suffix).pairs()
