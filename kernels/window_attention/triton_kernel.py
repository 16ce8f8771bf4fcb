"""Window attention with a residual in Triton, for each tile of queries.

Tiles of keys that all queries of a tile see are attended without masks, those on the window's edges with them. A
refresh first attends to the window, stores W, and continues the same sums over all other keys, so that one
accumulator gives both.
"""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from dit_rewrite.kernels.common.heads import load_pieces
from dit_rewrite.kernels.common.online_softmax import attend
from dit_rewrite.kernels.window_attention.patches import (
    EVERYWHERE,
    NOWHERE,
    ceil_divide,
    count,
    cut,
    position,
    reached,
    spot,
    unless_empty,
)

SEEN = tl.constexpr(0)  # keys that all queries of the tile see
NEAR = tl.constexpr(1)  # keys in the window of a query
FAR = tl.constexpr(2)  # keys outside it


@triton.jit
def normalised(acc, total, dtype: tl.constexpr):
    """Return the weighted mean of the values, rounded to `dtype`; fully masked rows give 0."""
    return (acc * tl.where(total == 0, 0.0, 1.0 / total)[:, None]).to(dtype)


@triton.jit
def text_tile(index, n, prefix, suffix, WHOLE: tl.constexpr, N: tl.constexpr):
    """Return the first token and the end of a tile of text: the whole ones, or the rests before and behind the grid."""
    if WHOLE:
        before = prefix // N
        start = tl.where(index < before, index * N, n - suffix + (index - before) * N)
        return start, start + N
    first = (index == 0) & (prefix % N > 0)
    return tl.where(first, prefix // N * N, n - suffix % N), tl.where(first, prefix, n)


@triton.jit
def near(low, high, col, ok):
    """Return which positions of one axis are within the bounds of each row; those that are not `ok` are in none."""
    col = tl.where(ok, col, NOWHERE)[None, :]
    return (col >= low) & (col <= high)


@triton.jit
def window_kernel(
    query, key, value, mask, residual, out, batches, heads, n, scale, turn, sign,
    prefix, suffix, frames, height, width, reach_t, reach_y, reach_x,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    r_batch, r_head, r_row, r_dim, o_batch, o_head, o_row, o_dim, m_batch, m_head, m_row, m_col,
    REFRESH: tl.constexpr, AXES: tl.constexpr, TEXT: tl.constexpr, KIND: tl.constexpr, ONE_ROW: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, QT: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
    BLOCK_N: tl.constexpr, KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
):  # fmt: skip
    """Process a tile of queries of one head. With REFRESH, write O and R = O - W; otherwise write residual + sign W.

    `turn` is the sign of the scale, and `scale` its size in units of log 2. `batches` is part of the tuning's key.
    """
    k_row *= UNIT
    v_row *= UNIT
    columns = ceil_divide(width, QX)
    lines = ceil_divide(height, QY)
    text_before, text_behind = ceil_divide(prefix, BLOCK_M), ceil_divide(suffix, BLOCK_M)
    tiles = text_before + text_behind + ceil_divide(frames, QT) * lines * columns
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)

    i = tl.arange(0, BLOCK_M)
    patch = tile - text_before - text_behind
    if AXES == 1:
        q_t, q_y, q_x = 0, 0, patch * QX
        row_t, row_y, row_x = i * 0, i * 0, q_x + i
    else:
        q_t, q_y, q_x = patch // (lines * columns) * QT, patch // columns % lines * QY, patch % columns * QX
        row_t, row_y, row_x = position(i, QY, QX)
        row_t, row_y, row_x = q_t + row_t, q_y + row_y, q_x + row_x
    rows = prefix + (row_t * height + row_y) * width + row_x
    valid = (row_t < frames) & (row_y < height) & (row_x < width)
    if TEXT:
        is_text = patch < 0
        start = tl.where(tile < text_before, tile * BLOCK_M, n - suffix + (tile - text_before) * BLOCK_M)
        rows = tl.where(is_text, start + i, rows)
        valid = tl.where(is_text, rows < tl.where(tile < text_before, prefix, n), valid)
        reach_t = tl.where(is_text, EVERYWHERE, reach_t)
        reach_y = tl.where(is_text, EVERYWHERE, reach_y)
        reach_x = tl.where(is_text, EVERYWHERE, reach_x)
        q_t, q_y, q_x = tl.where(is_text, 0, q_t), tl.where(is_text, 0, q_y), tl.where(is_text, 0, q_x)
        row_t, row_y, row_x = tl.where(is_text, 0, row_t), tl.where(is_text, 0, row_y), tl.where(is_text, 0, row_x)
    low_t, high_t = (row_t - reach_t)[:, None], (row_t + reach_t)[:, None]
    low_y, high_y = (row_y - reach_y)[:, None], (row_y + reach_y)[:, None]
    low_x, high_x = (row_x - reach_x)[:, None], (row_x + reach_x)[:, None]
    valid = valid[:, None]
    row = rows[:, None].to(tl.int64)

    t0, t1, in_t0, in_t1 = reached(q_t, frames, reach_t, QT, KT)
    y0, y1, in_y0, in_y1 = reached(q_y, height, reach_y, QY, KY)
    x0, x1, in_x0, in_x1 = reached(q_x, width, reach_x, QX, KX)
    box = (t0, t1, y0, y1, x0, x1)
    inner = unless_empty((in_t0, in_t1, in_y0, in_y1, in_x0, in_x1), box)
    none = (0, 0, 0, 0, 0, 0)
    whole_text = prefix // BLOCK_N + suffix // BLOCK_N if TEXT else 0
    rest_text = tl.minimum(prefix % BLOCK_N, 1) + tl.minimum(suffix % BLOCK_N, 1) if TEXT else 0

    query += batch * (q_batch * UNIT) + head * (q_head * UNIT)
    key += batch * (k_batch * UNIT) + head * (k_head * UNIT)
    value += batch * (v_batch * UNIT) + head * (v_head * UNIT)
    residual += batch * (r_batch * UNIT) + head * (r_head * UNIT)
    out += batch * (o_batch * UNIT) + head * (o_head * UNIT)
    mask += batch * m_batch + head * m_head
    if not ONE_ROW:
        mask += row * m_row
    q, q_tail = load_pieces(query, row * (q_row * UNIT), 1, q_dim, valid, D, D1, D2, True)
    q, q_tail = (q.to(tl.float32) * turn).to(q.dtype), (q_tail.to(tl.float32) * turn).to(q.dtype)
    acc = tl.zeros((BLOCK_M, D1), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, D2 if D2 > 0 else 16), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    j = tl.arange(0, BLOCK_N)
    j_t, j_y, j_x = position(j, KY, KX)
    at_patch = j if AXES == 1 else (j_t * height + j_y) * width + j_x

    patches = count(inner)
    for index in range(0, patches + whole_text):
        t, y, x = spot(index, inner, none, AXES)
        token = prefix + (t * KT * height + y * KY) * width + x * KX
        at = at_patch
        if TEXT:
            start, _ = text_tile(index - patches, n, prefix, suffix, True, BLOCK_N)
            token, at = tl.where(index < patches, token, start), tl.where(index < patches, at, j)
        acc, acc_tail, largest, total = attend(
            acc, acc_tail, largest, total, q, q_tail, key, value, mask, valid, token, at, j < BLOCK_N, valid, scale,
            k_row, k_dim, v_row, v_dim, m_col, 0, KIND, ONE_ROW, D, D1, D2,
        )  # fmt: skip

    patches = count(box) - count(inner)
    for index in range(0, patches + rest_text):
        t, y, x = spot(index, box, inner, AXES)
        token = prefix + (t * KT * height + y * KY) * width + x * KX
        col_t, col_y, col_x = t * KT + j_t, y * KY + j_y, x * KX + j_x
        real = col_x < width
        if AXES > 1:
            real = real & (col_y < height) & (col_t < frames)
        at = at_patch
        bounds_x, bounds_y, bounds_t = (low_x, high_x), (low_y, high_y), (low_t, high_t)
        if TEXT:
            grid = index < patches
            start, end = text_tile(index - patches, n, prefix, suffix, False, BLOCK_N)
            token, at = tl.where(grid, token, start), tl.where(grid, at, j)
            real = tl.where(grid, real, start + j < end)
            far = NOWHERE - 1
            bounds_x = (tl.where(grid, low_x, -far), tl.where(grid, high_x, far))
            bounds_y = (tl.where(grid, low_y, -far), tl.where(grid, high_y, far))
            bounds_t = (tl.where(grid, low_t, -far), tl.where(grid, high_t, far))
        seen = near(bounds_x[0], bounds_x[1], col_x, real)
        if AXES > 1:
            seen = seen & near(bounds_y[0], bounds_y[1], col_y, real)
        if AXES > 2:
            seen = seen & near(bounds_t[0], bounds_t[1], col_t, real)
        acc, acc_tail, largest, total = attend(
            acc, acc_tail, largest, total, q, q_tail, key, value, mask, valid, token, at, real, seen, scale,
            k_row, k_dim, v_row, v_dim, m_col, 1, KIND, ONE_ROW, D, D1, D2,
        )  # fmt: skip

    dtype = out.dtype.element_ty
    first = tl.arange(0, D1)[None, :]
    second = D1 + tl.arange(0, D2 if D2 > 0 else 16)[None, :]
    at_residual, at_out = residual + row * (r_row * UNIT), out + row * (o_row * UNIT)
    ok, ok_tail = valid & (first < D), valid & (second < D)
    if REFRESH:
        tl.store(at_residual + first * r_dim, normalised(acc, total, dtype), mask=ok)
        if D2 > 0:
            tl.store(at_residual + second * r_dim, normalised(acc_tail, total, dtype), mask=ok_tail)

        everything = (
            0, ceil_divide(frames, KT), 0, ceil_divide(height, KY), 0, ceil_divide(width, KX)
        )  # fmt: skip
        complete = unless_empty((0, frames // KT, 0, height // KY, 0, width // KX), everything)
        seen_box = cut(box, complete)
        edges = count(seen_box) - count(inner)
        for index in range(0, edges + count(everything) - count(complete)):
            t, y, x = spot(index, seen_box, inner, AXES)
            rest_t, rest_y, rest_x = spot(index - edges, everything, complete, AXES)
            edge = index < edges
            t, y, x = tl.where(edge, t, rest_t), tl.where(edge, y, rest_y), tl.where(edge, x, rest_x)
            token = prefix + (t * KT * height + y * KY) * width + x * KX
            col_t, col_y, col_x = t * KT + j_t, y * KY + j_y, x * KX + j_x
            real = col_x < width
            if AXES > 1:
                real = real & (col_y < height) & (col_t < frames)
            seen = near(low_x, high_x, col_x, real)
            if AXES > 1:
                seen = seen & near(low_y, high_y, col_y, real)
            if AXES > 2:
                seen = seen & near(low_t, high_t, col_t, real)
            acc, acc_tail, largest, total = attend(
                acc, acc_tail, largest, total, q, q_tail, key, value, mask, valid, token, at_patch, real,
                real[None, :] & (seen == 0), scale, k_row, k_dim, v_row, v_dim, m_col, 2, KIND, ONE_ROW, D, D1, D2,
            )  # fmt: skip
        for index in range(0, count(complete) - count(seen_box)):
            t, y, x = spot(index, complete, seen_box, AXES)
            token = prefix + (t * KT * height + y * KY) * width + x * KX
            acc, acc_tail, largest, total = attend(
                acc, acc_tail, largest, total, q, q_tail, key, value, mask, valid, token, at_patch, j < BLOCK_N, valid,
                scale, k_row, k_dim, v_row, v_dim, m_col, 0, KIND, ONE_ROW, D, D1, D2,
            )  # fmt: skip
        tl.debug_barrier()  # W was stored by other threads
    weighted = normalised(acc, total, dtype if REFRESH else tl.float32).to(tl.float32)
    other = tl.load(at_residual + first * r_dim, mask=ok, other=0.0).to(tl.float32)
    result = weighted if REFRESH else other + sign * weighted
    tl.store(at_out + first * o_dim, result.to(dtype), mask=ok)
    if REFRESH:  # both are rounded, so that a window of all keys leaves exactly 0
        tl.store(at_residual + first * r_dim, (weighted - other).to(dtype), mask=ok)
    if D2 > 0:
        weighted = normalised(acc_tail, total, dtype if REFRESH else tl.float32).to(tl.float32)
        other = tl.load(at_residual + second * r_dim, mask=ok_tail, other=0.0).to(tl.float32)
        result = weighted if REFRESH else other + sign * weighted
        tl.store(at_out + second * o_dim, result.to(dtype), mask=ok_tail)
        if REFRESH:
            tl.store(at_residual + second * r_dim, (weighted - other).to(dtype), mask=ok_tail)
