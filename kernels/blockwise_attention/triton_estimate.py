"""Estimates and decisions of blockwise attention in Triton, one program per tile of queries; see bounds.py.

DP is the number of channels D padded to a power of two; a summary is 2 D + 1 numbers.
"""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention.bounds import SLACK, Decision, KVChange
from dit_rewrite.kernels.blockwise_attention.state import State
from dit_rewrite.kernels.common.tiles import load_tile, padded


@triton.jit
def widen(low, high, norm, SLACK: tl.constexpr):
    """Widen the bounds of a summary by more than the rounding error of one addition."""
    return low - tl.abs(low) * SLACK, high + tl.abs(high) * SLACK, norm + tl.abs(norm) * SLACK


@triton.jit
def load_summary(base, index, channel, D: tl.constexpr):
    """Load entry `index` of an array of summaries: least and greatest values per channel, and the greatest norm."""
    at = base + index * (2 * D + 1)
    low = tl.load(at + channel, mask=channel < D, other=0.0)
    high = tl.load(at + D + channel, mask=channel < D, other=0.0)
    return low, high, tl.load(at + 2 * D)


@triton.jit
def row_norms(rows):
    """Return the norm of each row. Rows are scaled first, because squares may overflow or underflow; see bounds.py."""
    largest = tl.max(tl.abs(rows), 1)
    scale = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    scaled = rows / scale[:, None]
    return tl.sqrt(tl.sum(scaled * scaled, 1)) * scale


@triton.jit
def product(a_low, a_high, a_norm, b_low, b_high, b_norm, D: tl.constexpr, SLACK: tl.constexpr):
    """Bound |x.y| for rows x and y of two summaries, by interval products and by Cauchy-Schwarz."""
    first, second, third, fourth = a_low * b_low, a_low * b_high, a_high * b_low, a_high * b_high
    high = tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth))
    low = tl.minimum(tl.minimum(first, second), tl.minimum(third, fourth))
    size = tl.sum(tl.maximum(tl.abs(high), tl.abs(low)), 0)
    corners = tl.maximum(tl.sum(high, 0), -tl.sum(low, 0)) + size * (SLACK * (D + 8))
    return corners, a_norm * b_norm * (1 + 4 * SLACK)


@triton.jit
def summarise(
    q, reference, first, queries, stride_n, stride_d, channel, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Return the summaries of the change of a tile's queries since `reference` and of the queries themselves, and 0, or
    NaN if anything is not finite, which maxima would drop. `first` is the tile's first query."""
    low, high = tl.full((DP,), float("inf"), tl.float32), tl.full((DP,), float("-inf"), tl.float32)
    q_low, q_high = low, high
    norm, q_norm, poison = 0.0, 0.0, 0.0
    for start in range(0, TILE, ROWS):
        inside = start + tl.arange(0, ROWS)
        row = first + inside
        valid = (row < queries)[:, None] & (channel < D)[None, :]
        now = load_tile(q, row[:, None], stride_n, queries, channel[None, :], stride_d, D).to(tl.float32)
        moved = now - tl.load(reference + inside[:, None] * D + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(valid, moved, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(valid, moved, float("-inf")), 0))
        norm = tl.maximum(norm, tl.max(row_norms(moved), 0))
        poison += tl.sum(tl.sum(moved * 0.0, 1), 0)
        q_low = tl.minimum(q_low, tl.min(tl.where(valid, now, float("inf")), 0))
        q_high = tl.maximum(q_high, tl.max(tl.where(valid, now, float("-inf")), 0))
        q_norm = tl.maximum(q_norm, tl.max(row_norms(now), 0))
    real = channel < D
    norm, q_norm = norm * (1 + SLACK * D), q_norm * (1 + SLACK * D)
    low, high, norm = widen(tl.where(real, low, 0.0), tl.where(real, high, 0.0), norm, SLACK)
    q_low, q_high, q_norm = widen(tl.where(real, q_low, 0.0), tl.where(real, q_high, 0.0), q_norm, SLACK)
    return low, high, norm, q_low, q_high, q_norm, poison


@triton.jit
def estimate_kernel(
    q, q_ref, q_moved, computed, k_stats, k_change, v_relative, recompute, score_change, change, counters, stride_b,
    stride_h, stride_n, stride_d, heads, queries, keys, tiles, blocks, block, scale, threshold, D: tl.constexpr,
    DP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PAPER: tl.constexpr, KV_STATIC: tl.constexpr,
    OWN: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Summarise the change of the tile's queries, then decide for each key block."""
    tile = tl.program_id(0) % tiles
    group = (tl.program_id(0) // tiles).to(tl.int64)  # of batch and head
    channel = tl.arange(0, DP)
    q += (group // heads) * stride_b + (group % heads) * stride_h
    real = channel < D
    first, base = tile * TILE, (group * tiles + tile) * TILE * D
    if not OWN:
        low, high, norm, q_low, q_high, q_norm, poison = summarise(
            q, q_ref + base, first, queries, stride_n, stride_d, channel, D, DP, TILE, ROWS, SLACK
        )
    pairs_done, scores_done = 0, 0
    rows = tl.minimum(queries - tile * TILE, TILE)
    for j in range(0, blocks):
        pair = (group * tiles + tile) * blocks + j
        if OWN:
            a_low, a_high, a_norm, q_low, q_high, q_norm, poison = summarise(
                q, q_ref + pair * TILE * D, first, queries, stride_n, stride_d, channel, D, DP, TILE, ROWS, SLACK
            )
        else:
            a_low, a_high, a_norm = load_summary(q_moved, pair, channel, D)
            a_low, a_high, a_norm = widen(low + a_low, high + a_high, norm + a_norm, SLACK)
        tl.store(change + pair * (2 * D + 1) + channel, a_low, mask=real)
        tl.store(change + pair * (2 * D + 1) + D + channel, a_high, mask=real)
        tl.store(change + pair * (2 * D + 1) + 2 * D, a_norm)
        k_low, k_high, k_norm = load_summary(k_stats, group * blocks + j, channel, D)
        if KV_STATIC:
            corners, lengths = product(a_low, a_high, a_norm, k_low, k_high, k_norm, D, SLACK)
        else:
            e_low, e_high, e_norm = load_summary(k_change, pair, channel, D)
            k_low, k_high, k_norm = widen(k_low - e_high, k_high - e_low, k_norm + e_norm, SLACK)
            corners, lengths = product(a_low, a_high, a_norm, k_low, k_high, k_norm, D, SLACK)
            by_keys, by_length = product(q_low, q_high, q_norm, e_low, e_high, e_norm, D, SLACK)
            corners += by_keys
            lengths += by_length
        bound = scale * (1 + SLACK) * tl.minimum(corners, lengths) + poison
        tl.store(score_change + pair, bound)
        finite = tl.where(tl.abs(bound) < float("inf"), 0.0, float("nan"))
        if PAPER:
            bound = tl.sum(tl.maximum(a_high * k_high, a_low * k_low), 0)
        bound += finite
        if not KV_STATIC:
            bound += tl.load(v_relative + pair)
        fresh = tl.load(computed + pair) == 0
        again = (fresh | (not_kept(bound, threshold))).to(tl.int32)
        tl.store(recompute + pair, again)
        pairs_done += again
        scores_done += again * rows * tl.where(j + 1 == blocks, keys - j * block, block)
    tl.atomic_add(counters, tl.cast(pairs_done, tl.int64))
    tl.atomic_add(counters + 2, tl.cast(scores_done, tl.int64))


@triton.jit
def not_kept(bound, threshold):
    """Return False only if the bound is finite and <= `threshold`, so that NaN is recomputed."""
    kept = (bound <= threshold) & (tl.abs(bound) < float("inf"))
    return kept == 0


def estimate(
    q: Tensor, k: Tensor, state: State, kv_change: KVChange | None, threshold: float, scale: float, paper: bool
) -> Decision:
    """Decide which (tile, block) pairs to recompute, and update `state.counters`; see naive.estimate."""
    batch, heads, queries, size = q.shape
    tiles, blocks, tile = state.partial.shape[2:5]
    recompute = torch.empty((batch, heads, tiles, blocks), dtype=torch.int32, device=q.device)
    score_change = torch.empty_like(recompute, dtype=torch.float32)
    change = state.k_stats.new_empty((*recompute.shape, 2 * size + 1))
    k_change, v_relative = (
        (state.k_stats, state.k_stats) if kv_change is None else (kv_change.k_change, kv_change.v_relative)
    )
    with torch.cuda.device_of(q):
        estimate_kernel[(batch * heads * tiles,)](
            q, state.q_ref, state.q_moved, state.computed.view(torch.uint8), state.k_stats, k_change.contiguous(),
            v_relative.contiguous(), recompute, score_change, change, state.counters, *q.stride(), heads, queries,
            k.shape[2], tiles, blocks, state.block, abs(scale), threshold, D=size, DP=padded(size),
            TILE=tile, ROWS=min(tile, 32), PAPER=paper, KV_STATIC=kv_change is None,
            OWN=state.own_queries, SLACK=SLACK, num_warps=4,
        )  # fmt: skip
        state.counters[1] += recompute.numel()
        state.counters[3] += batch * heads * queries * k.shape[2]
    return Decision(recompute, score_change, change)
