"""The window's mask in Triton: exactly within a tile, and by ranges of tokens for whole tiles."""

# The arguments of kernels have no types in Python.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(token, prefix, height, width):
    """Time, height and width of a token after the prefix."""
    at = token - prefix
    return at // (height * width), at // width % height, at % width


@triton.jit
def sees(rows, cols, prefix, height, width, reach_t, reach_y, reach_x, AXES: tl.constexpr):
    """Whether the queries `rows` see the keys `cols`."""
    if AXES == 1:
        near = tl.abs(rows - cols) <= reach_x
    else:
        t, y, x = place(rows, prefix, height, width)
        key_t, key_y, key_x = place(cols, prefix, height, width)
        near = (tl.abs(y - key_y) <= reach_y) & (tl.abs(x - key_x) <= reach_x)
        if AXES == 3:
            near = near & (tl.abs(t - key_t) <= reach_t)
    return near | (rows < prefix) | (cols < prefix)


@triton.jit
def apart(a, b, c, d):
    """The distance of the ranges a..b and c..d; negative or zero where they meet."""
    return tl.maximum(c - b, a - d)


@triton.jit
def may_see(first, last, start, end, prefix, height, width, reach_t, reach_y, reach_x):
    """Whether a query of first..last might see a key of start..end; inner axes count where outer ones are one place."""
    t0, y0, x0 = place(first, prefix, height, width)
    t1, y1, x1 = place(last, prefix, height, width)
    key_t0, key_y0, key_x0 = place(start, prefix, height, width)
    key_t1, key_y1, key_x1 = place(end, prefix, height, width)
    frames = (t0 != t1) | (key_t0 != key_t1)
    lines = frames | (y0 != y1) | (key_y0 != key_y1)
    near = apart(t0, t1, key_t0, key_t1) <= reach_t
    near = near & (frames | (apart(y0, y1, key_y0, key_y1) <= reach_y))
    near = near & (lines | (apart(x0, x1, key_x0, key_x1) <= reach_x))
    return near | (first < prefix) | (start < prefix)


@triton.jit
def key_tiles(
    first, last, n, prefix, height, width, reach_t, reach_y, reach_x, AXES: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The tiles of keys that the queries first..last can see by the outermost axis.

    Returned are how many there are with the prefix's, how many to skip after those, and how many there are in all.
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
