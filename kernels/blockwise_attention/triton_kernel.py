"""Blockwise attention in Triton: one pass over the key blocks, with a branch for each (query tile, key block).

A program handles ROWS queries of a tile. For each block it either recomputes the partial output in steps of KEYS keys
or loads it. If the tile is fully kept, the program loads only the merged output. DP is the number of channels D padded
to a power of two.
"""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention.bounds import Decision
from dit_rewrite.kernels.blockwise_attention.state import State
from dit_rewrite.kernels.blockwise_attention.triton_estimate import estimate
from dit_rewrite.kernels.common.tiles import load_tile, mask_arguments, masked_scores, padded

__all__ = ["attend", "estimate"]


@triton.jit
def attend_block(
    query, k, v, mask, row, queries, first, end, k_n, k_d, v_n, v_d, mask_n, mask_m, scale, D: tl.constexpr,
    DP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return m, l and T of the keys from `first` to `end`, by online softmax."""
    channel = tl.arange(0, DP)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, DP), tl.float32)
    for start in range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        keys = load_tile(k, key[None, :], k_n, end, channel[:, None], k_d, D)
        values = load_tile(v, key[:, None], v_n, end, channel[None, :], v_d, D)
        scores = masked_scores(
            query, keys, scale, mask, row[:, None], mask_n, queries, key[None, :], mask_m, end, MASK, 1
        )
        higher = tl.maximum(peak, tl.max(scores, 1))
        top = tl.where(higher == float("-inf"), 0.0, higher)  # only masked keys so far: avoid -inf - -inf
        weights = tl.exp(scores - top[:, None])
        decay = tl.exp(peak - top)
        total = total * decay + tl.sum(weights, 1)
        summed = summed * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = higher
    return peak, total, summed


@triton.jit
def attention_kernel(
    q, k, v, mask, out, recompute, change, row_max, row_sum, partial, merged, q_ref, q_moved, computed, q_b, q_h,
    q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_n, mask_m, out_b, out_h, out_n, out_d,
    heads, queries, keys, tiles, blocks, block, scale, D: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Compute the output of ROWS queries of one tile, and update the state."""
    CHUNKS: tl.constexpr = TILE // ROWS
    chunk = tl.program_id(0) % CHUNKS
    tile = (tl.program_id(0) // CHUNKS) % tiles
    group = (tl.program_id(0) // (CHUNKS * tiles)).to(tl.int64)  # of batch and head; 64 bits: offsets beyond 2^31
    b, h = group // heads, group % heads
    channel = tl.arange(0, DP)
    inside = chunk * ROWS + tl.arange(0, ROWS)
    row = (tile * TILE + inside).to(tl.int64)
    row_valid = row < queries
    valid = row_valid[:, None] & (channel < D)[None, :]
    base = (group * tiles + tile) * TILE * D
    merged += base
    q_ref += base
    out += b * out_b + h * out_h
    kept_at = inside[:, None] * D + channel[None, :]
    pairs = (group * tiles + tile) * blocks
    busy = 0
    for j in range(0, blocks):
        busy += tl.load(recompute + pairs + j)
    if busy == 0:
        whole = tl.load(merged + kept_at, mask=valid, other=0.0)
        tl.store(out + row[:, None] * out_n + channel[None, :] * out_d, whole, mask=valid)
    else:
        query = load_tile(q + b * q_b + h * q_h, row[:, None], q_n, queries, channel[None, :], q_d, D)
        k_group = k + b * k_b + h * k_h
        v_group = v + b * v_b + h * v_h
        mask_group = mask + b * mask_b + h * mask_h
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, DP), tl.float32)
        for j in range(0, blocks):
            again = tl.load(recompute + pairs + j)
            at = (pairs + j) * TILE + inside
            partial_at = partial + (pairs + j) * (TILE * D) + kept_at
            if again != 0:
                first = j * block
                m_j, l_j, t_j = attend_block(
                    query, k_group, v_group, mask_group, row, queries, first, tl.minimum(first + block, keys), k_n, k_d,
                    v_n, v_d, mask_n, mask_m, scale, D, DP, ROWS, KEYS, MASK,
                )  # fmt: skip
                tl.store(row_max + at, m_j, mask=row_valid)
                tl.store(row_sum + at, l_j, mask=row_valid)
                average = t_j / tl.where(l_j == 0, 1.0, l_j)[:, None]
                tl.store(partial_at, average.to(query.dtype), mask=valid)
            else:
                m_j = tl.load(row_max + at, mask=row_valid, other=float("-inf"))
                l_j = tl.load(row_sum + at, mask=row_valid, other=0.0)
                t_j = tl.load(partial_at, mask=valid, other=0.0).to(tl.float32) * l_j[:, None]
            higher = tl.maximum(peak, m_j)
            top = tl.where(higher == float("-inf"), 0.0, higher)
            old, new = tl.exp(peak - top), tl.exp(m_j - top)
            total = old * total + new * l_j
            summed = old[:, None] * summed + new[:, None] * t_j
            peak = higher
            if chunk == 0:  # one program per tile updates q_moved and computed, which this launch does not read
                entry = tl.arange(0, WP)
                summary = (pairs + j) * (2 * D + 1) + entry
                moved = tl.load(change + summary, mask=entry < 2 * D + 1, other=0.0)
                tl.store(q_moved + summary, tl.where(again != 0, 0.0, moved), mask=entry < 2 * D + 1)
                tl.store(computed + pairs + j, (again * 0 + 1).to(tl.uint8))
        result = (summed / tl.where(total == 0, 1.0, total)[:, None]).to(query.dtype)
        tl.store(out + row[:, None] * out_n + channel[None, :] * out_d, result, mask=valid)
        tl.store(merged + kept_at, result, mask=valid)
        tl.store(q_ref + kept_at, query, mask=valid)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: State, decision: Decision, scale: float
) -> Tensor:
    """Recompute the chosen blocks, merge them with the kept blocks, and update the state; see naive.attend."""
    batch, heads, queries, size = q.shape
    tiles, blocks, tile = state.partial.shape[2:5]
    out = torch.empty_like(q)
    given, mask_strides, kind = mask_arguments(mask, (*q.shape[:3], k.shape[2]), q)
    rows, steps = sizes(size, q.dtype, tile)
    with torch.cuda.device_of(q):
        attention_kernel[(batch * heads * tiles * (tile // rows),)](
            q, k, v, given, out, decision.recompute, decision.change, state.row_max, state.row_sum, state.partial,
            state.merged, state.q_ref, state.q_moved, state.computed.view(torch.uint8), *q.stride(), *k.stride(),
            *v.stride(), *mask_strides, *out.stride(), heads, queries, k.shape[2], tiles, blocks, state.block, scale,
            D=size, DP=padded(size), WP=triton.next_power_of_2(2 * size + 1), TILE=tile, ROWS=rows,
            KEYS=steps, MASK=kind, num_warps=8, num_stages=2,
        )  # fmt: skip
    return out


def sizes(size: int, dtype: torch.dtype, tile: int) -> tuple[int, int]:
    """Return ROWS and KEYS such that both accumulators hardly spill registers (ptxas for sm_90, 8 warps)."""
    wide = size > 128 or dtype == torch.float32
    return (min(tile, 32), 32) if wide else (min(tile, 64), 64)
