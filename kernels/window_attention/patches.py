"""Tiles of a window: patches of the grid, the patches of keys that each patch of queries sees, and their enumeration.

A tile of queries or of keys is a box of (t, y, x) positions, so that a window of two or three axes reaches few tiles
that it does not fill; along a sequence it is a run of tokens. Text has tiles of its own. A box of patches is a tuple
(t0, t1, y0, y1, x0, x1) of the first patch on each axis and the one behind the last.
"""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

EVERYWHERE = tl.constexpr(1 << 29)  # a reach beyond any distance
NOWHERE = tl.constexpr(1 << 30)  # a coordinate out of any reach, apart from EVERYWHERE


def patch(tokens: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    """Return the (t, y, x) sides, powers of two, of a patch of `tokens` tokens of a grid.

    As near to a square of one frame as the grid allows: 128 tokens of an image are 8 x 16.
    """
    frames, height, width = (triton.next_power_of_2(size) for size in sizes)
    side = 1 << (tokens.bit_length() // 2)
    x = min(side, width) if height * frames > 1 else tokens
    y = min(tokens // x, height)
    t = min(tokens // (x * y), frames)
    return t, y, tokens // (t * y)


@triton.jit
def position(index, Y: tl.constexpr, X: tl.constexpr):
    """Return the (t, y, x) offsets within a patch."""
    return index // (Y * X), index // X % Y, index % X


@triton.jit
def ceil_divide(a, b):
    """Return a / b, rounded up."""
    return (a + b - 1) // b


@triton.jit
def reached(first, size, reach, Q: tl.constexpr, K: tl.constexpr):
    """Return two ranges of key patches on one axis, for queries at first .. first + Q - 1.

    The first has the patches that some query sees, the second those within the grid that all of them see.
    """
    last = tl.minimum(first + Q, size) - 1
    start = tl.maximum(first - reach, 0) // K
    end = ceil_divide(tl.minimum(last + reach + 1, size), K)
    inner_start = ceil_divide(tl.maximum(last - reach, 0), K)
    return start, end, inner_start, tl.maximum(tl.minimum(first + reach + 1, size) // K, inner_start)


@triton.jit
def count(box):
    """Return the number of patches of a box."""
    t0, t1, y0, y1, x0, x1 = box
    return (t1 - t0) * (y1 - y0) * (x1 - x0)


@triton.jit
def unless_empty(box, outer):
    """Return the box, or one at the start of `outer` that is empty on every axis if it is on any."""
    t0, t1, y0, y1, x0, x1 = box
    t, _, y, _, x, _ = outer
    some = (t1 > t0) & (y1 > y0) & (x1 > x0)
    return (
        tl.where(some, t0, t), tl.where(some, t1, t), tl.where(some, y0, y), tl.where(some, y1, y),
        tl.where(some, x0, x), tl.where(some, x1, x),
    )  # fmt: skip


@triton.jit
def cut(box, other):
    """Return the part of a box that starts where it does, and ends before the ends of `other`."""
    t0, t1, y0, y1, x0, x1 = box
    _, t, _, y, _, x = other
    part = (t0, tl.minimum(t1, t), y0, tl.minimum(y1, y), x0, tl.minimum(x1, x))
    return unless_empty(part, other)


@triton.jit
def quotient(number, divisor):
    """Return number // divisor for numbers from 0 to 2^20, without an integer division in the loop."""
    return ((number + 0.5) * (1.0 / divisor)).to(tl.int32)


@triton.jit
def spot(index, outer, hole, AXES: tl.constexpr):
    """Return the (t, y, x) of a patch of the box `outer` by its index, not counting the box `hole` within it."""
    t0, t1, y0, y1, x0, x1 = outer
    hole_t, hole_t1, hole_y, hole_y1, hole_x, hole_x1 = hole
    frames, rows, columns = hole_t1 - hole_t, hole_y1 - hole_y, hole_x1 - hole_x
    t, y, x = t0, y0, x0
    if AXES == 1:
        x = x0 + index
        x += tl.where(x >= hole_x, columns, 0)
    else:
        at, wide, skipped = index, x1 - x0, rows
        if AXES == 3:  # frames without the hole come first
            plane = (y1 - y0) * wide
            whole = (t1 - t0 - frames) * plane
            beside = at < whole
            at = tl.where(beside, at, at - whole)
            size = tl.where(beside, plane, plane - rows * columns)
            step = quotient(at, size)
            at -= step * size
            t = tl.where(beside, t0 + step + tl.where(t0 + step >= hole_t, frames, 0), hole_t + step)
            skipped = tl.where(beside, 0, rows)
        whole = (y1 - y0 - skipped) * wide  # in each frame, rows without the hole come first
        beside = at < whole
        at = tl.where(beside, at, at - whole)
        size = tl.where(beside, wide, wide - columns)
        step = quotient(at, size)
        x = x0 + at - step * size
        x += tl.where(beside | (x < hole_x), 0, columns)
        y = tl.where(beside, y0 + step + tl.where(y0 + step >= hole_y, skipped, 0), hole_y + step)
    return t, y, x
