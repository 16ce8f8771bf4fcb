"""The window's mask in Triton: exact for the tokens of a tile, conservative for a pair of tiles."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def coordinates(token, prefix, height, width):
    """Return the (t, y, x) grid coordinates of a token after the prefix."""
    at = token - prefix
    return at // (height * width), at // width % height, at % width


@triton.jit
def sees(rows, cols, prefix, height, width, reach_t, reach_y, reach_x, AXES: tl.constexpr):
    """Return whether queries `rows` attend to keys `cols`."""
    if AXES == 1:
        near = tl.abs(rows - cols) <= reach_x
    else:
        t, y, x = coordinates(rows, prefix, height, width)
        key_t, key_y, key_x = coordinates(cols, prefix, height, width)
        near = (tl.abs(y - key_y) <= reach_y) & (tl.abs(x - key_x) <= reach_x)
        if AXES == 3:
            near = near & (tl.abs(t - key_t) <= reach_t)
    return near | (rows < prefix) | (cols < prefix)


@triton.jit
def gap(a, b, c, d):
    """Return the distance between the ranges a..b and c..d; zero or negative if they overlap."""
    return tl.maximum(c - b, a - d)


@triton.jit
def may_see(first, last, start, end, prefix, height, width, reach_t, reach_y, reach_x):
    """Return False only if no query of first..last attends to a key of start..end.

    An inner axis is compared only if both ranges stay at one coordinate of every outer axis.
    """
    t0, y0, x0 = coordinates(first, prefix, height, width)
    t1, y1, x1 = coordinates(last, prefix, height, width)
    key_t0, key_y0, key_x0 = coordinates(start, prefix, height, width)
    key_t1, key_y1, key_x1 = coordinates(end, prefix, height, width)
    frames = (t0 != t1) | (key_t0 != key_t1)
    lines = frames | (y0 != y1) | (key_y0 != key_y1)
    near = gap(t0, t1, key_t0, key_t1) <= reach_t
    near = near & (frames | (gap(y0, y1, key_y0, key_y1) <= reach_y))
    near = near & (lines | (gap(x0, x1, key_x0, key_x1) <= reach_x))
    return near | (first < prefix) | (start < prefix)


@triton.jit
def key_tiles(
    first, last, n, prefix, height, width, reach_t, reach_y, reach_x, AXES: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Select the key tiles that queries first..last can attend to, by the outermost axis alone.

    Returns the number of tiles that hold the prefix, the number to skip after them, and the number to visit in all.
    """
    if AXES == 1:
        step, reach = 1, reach_x
    elif AXES == 2:
        step, reach = width, reach_y
    else:
        step, reach = height * width, reach_t
    start = tl.maximum(((first - prefix) // step - reach) * step, 0) + prefix
    end = tl.minimum(((last - prefix) // step + reach + 1) * step + prefix, n)
    start = tl.where(first < prefix, 0, start)
    end = tl.where(first < prefix, n, end)
    before = tl.cdiv(prefix, BLOCK_N)
    skipped = tl.maximum(start // BLOCK_N - before, 0)
    return before, skipped, tl.maximum(tl.cdiv(end, BLOCK_N) - skipped, before)
