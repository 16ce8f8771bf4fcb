"""Launches of the window kernel: its arguments, its tiles, and their tuning."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dit_rewrite.kernels.common.heads import scale_arguments, split, strides
from dit_rewrite.kernels.common.scores import default_scale
from dit_rewrite.kernels.common.tiles import mask_arguments
from dit_rewrite.kernels.window_attention import triton_kernel
from dit_rewrite.kernels.window_attention.geometry import Window
from dit_rewrite.kernels.window_attention.patches import patch


class Tile(NamedTuple):
    """A tile of the kernel, as powers of two."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


TILES = (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3))
WIDE_TILES = (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2))  # for float32 and large heads, which need more registers
INTERPRETED = Tile(32, 32)
_tuned_launches: set[Hashable] = set()
# everything that the time depends on, apart from dtypes, which Triton adds
KEY = [
    *("batches", "heads", "n", "prefix", "suffix", "frames", "height", "width", "reach_t", "reach_y", "reach_x"),
    *(f"{tensor}_{axis}" for tensor in "qkvro" for axis in ("batch", "head", "row", "dim")),
    *("m_batch", "m_head", "m_row", "m_col", "REFRESH", "KIND", "D", "UNIT"),
]


def launch_refresh(
    query: Tensor, key: Tensor, value: Tensor, window: Window, attn_mask: Tensor | None, scale: float | None,
    *, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return O and R = O - W. `tile` replaces the tuned one."""
    out, residual = torch.empty_like(query), torch.empty_like(query)
    _launch(query, key, value, residual, out, window, attn_mask, scale, tile, refresh=True)
    return out, residual


def launch_reuse(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Window, attn_mask: Tensor | None,
    scale: float | None, subtract: bool = False, *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return R + W, or R - W with `subtract`; `tile` as in `launch_refresh`."""
    out = torch.empty_like(query)
    _launch(query, key, value, residual, out, window, attn_mask, scale, tile, refresh=False, subtract=subtract)
    return out


def _launch(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, out: Tensor, window: Window, mask: Tensor | None,
    scale: float | None, tile: Tile | None, *, refresh: bool, subtract: bool = False,
) -> None:  # fmt: skip
    batch, heads, n, head_size = query.shape
    if not query.numel():
        return
    mask, mask_strides, kind = mask_arguments(mask, (batch, heads, n, n), query)
    steps, unit = strides((query, key, value, residual, out))
    size, turn = scale_arguments(default_scale(query, scale))
    first, second = split(head_size)
    wide = query.element_size() > 2 or head_size > 128
    if tile is None and query.is_cuda:
        tile = _fixed_tile((refresh, kind, window, query.dtype, query.shape, tuple(steps), tuple(mask_strides)), wide)
    kernel, options = _kernel(query.is_cuda, wide, window.sizes, tile)
    with torch.cuda.device_of(query):
        kernel[lambda meta: (batch * heads * _tiles(window, meta),)](
            query, key, value, mask, residual, out, batch, heads, n, size, turn,
            -1.0 if subtract else 1.0, window.prefix, window.suffix, *window.sizes, *window.reach, *steps,
            *mask_strides, REFRESH=refresh, AXES=window.axes, TEXT=window.prefix + window.suffix > 0, KIND=kind,
            ONE_ROW=kind > 0 and mask_strides[2] == 0, D=head_size, D1=first, D2=second, UNIT=unit, **options,
        )  # fmt: skip


def _fixed_tile(launch: Hashable, wide: bool) -> Tile | None:
    """Return None where the tile is tuned. A CUDA graph cannot be captured while tuning measures: a launch whose first
    call is inside a capture takes the first tile."""
    if launch in _tuned_launches:
        return None
    if torch.cuda.is_current_stream_capturing():
        return (WIDE_TILES if wide else TILES)[0]
    _tuned_launches.add(launch)
    return None


def _tiles(window: Window, meta: dict[str, Any]) -> int:
    """Return the number of tiles of queries of one head."""
    sides = (meta["QT"], meta["QY"], meta["QX"])
    grid = math.prod(-(-size // side) for size, side in zip(window.sizes, sides, strict=True))
    return grid + sum(-(-text // meta["BLOCK_M"]) for text in (window.prefix, window.suffix))


def _kernel(cuda: bool, wide: bool, sizes: tuple[int, ...], tile: Tile | None) -> tuple[Any, dict[str, int]]:
    """Return the kernel and its options; on a GPU it is tuned unless a tile is given."""
    if tile is None and cuda:
        return _tuned(triton_kernel.window_kernel, wide, sizes), {}
    tile = tile or INTERPRETED
    return triton_kernel.window_kernel, {**sides(tile, sizes), "num_warps": tile.warps, "num_stages": tile.stages}


def sides(tile: Tile, sizes: tuple[int, ...]) -> dict[str, int]:
    """Return the constants that describe a tile on a grid of these sizes."""
    q, k = patch(tile.queries, sizes), patch(tile.keys, sizes)
    named = {f"{letter}{axis}": side for letter, p in (("Q", q), ("K", k)) for axis, side in zip("TYX", p, strict=True)}
    return {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, **named}


@functools.cache
def _tuned(kernel: Any, wide: bool, sizes: tuple[int, ...]) -> Any:
    """Return the kernel with its tiles on a grid. Which of them is fastest is measured once, and kept on disk."""
    tiles = WIDE_TILES if wide else TILES
    configs = [triton.Config(sides(tile, sizes), num_warps=tile.warps, num_stages=tile.stages) for tile in tiles]
    return triton.autotune(configs, key=KEY, cache_results=True)(kernel)
