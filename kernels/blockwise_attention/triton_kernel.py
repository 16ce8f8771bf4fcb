"""Blockwise attention in Triton: the blocks to recompute one after the other, then a merge of all blocks.

A program handles ROWS queries of a tile. It computes the chosen blocks in steps of KEYS keys and stores their partial
outputs, and then loads those of all blocks. A merge on the way would need a second accumulator in the loop over the
keys, whose registers would spill. So a recomputed block is rounded before the merge, as a kept one is, and the output
does not depend on which blocks were kept if nothing changed. If the tile is fully kept, the program loads only the
merged output. Heads have two pieces, see heads.py.
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
from dit_rewrite.kernels.common.heads import load_pieces, scale_arguments, split, strides
from dit_rewrite.kernels.common.online_softmax import attend as advance
from dit_rewrite.kernels.common.tiles import mask_arguments

__all__ = ["attend", "estimate"]


LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_block(
    q, q_tail, k, v, mask, row_valid, first, end, scale, k_n, k_d, v_n, v_d, mask_m, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Return m (in nats), l and both pieces of T of the keys from `first` to `end`, by online softmax."""
    acc = tl.zeros((ROWS, D1), tl.float32)
    acc_tail = tl.zeros((ROWS, D2 if D2 > 0 else 16), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    at = tl.arange(0, KEYS)
    whole = first + (end - first) // KEYS * KEYS
    for start in range(first, whole, KEYS):
        acc, acc_tail, peak, total = advance(
            acc, acc_tail, peak, total, q, q_tail, k, v, mask, row_valid, start, at, at < KEYS, row_valid, scale,
            k_n, k_d, v_n, v_d, mask_m, 0, MASK, ONE_ROW, D, D1, D2,
        )  # fmt: skip
    for start in range(whole, end, KEYS):
        real = start + at < end
        acc, acc_tail, peak, total = advance(
            acc, acc_tail, peak, total, q, q_tail, k, v, mask, row_valid, start, at, real, real[None, :], scale,
            k_n, k_d, v_n, v_d, mask_m, 1, MASK, ONE_ROW, D, D1, D2,
        )  # fmt: skip
    return peak * LN_2, total, acc, acc_tail


@triton.jit
def attention_kernel(
    q, k, v, mask, out, recompute, change, row_max, row_sum, partial, merged, q_ref, q_moved, computed, q_b, q_h,
    q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_n, mask_m, out_b, out_h, out_n, out_d,
    heads, queries, keys, tiles, blocks, block, scale, turn, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    UNIT: tl.constexpr, WP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, ONE_ROW: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Compute the output of ROWS queries of one tile, and update the state."""
    CHUNKS: tl.constexpr = TILE // ROWS
    chunk = tl.program_id(0) % CHUNKS
    tile = (tl.program_id(0) // CHUNKS) % tiles
    group = (tl.program_id(0) // (CHUNKS * tiles)).to(tl.int64)  # of batch and head; 64 bits: offsets beyond 2^31
    b, h = group // heads, group % heads
    channel = tl.arange(0, D1)[None, :]
    tail = D1 + tl.arange(0, D2 if D2 > 0 else 16)[None, :]
    row = tl.arange(0, ROWS)
    start = chunk * ROWS  # a scalar, so that the loops keep no offset for each row in registers
    first_row = tile * TILE + start
    row_valid = row < queries - first_row
    row_inside, far_row = row_valid[:, None], row[:, None].to(tl.int64)
    valid, tail_valid = row_inside & (channel < D), row_inside & (tail < D)
    base = ((group * tiles + tile) * TILE + start) * D
    merged += base
    if not OWN:
        q_ref += base
    q += b * (q_b * UNIT) + h * (q_h * UNIT) + first_row.to(tl.int64) * (q_n * UNIT)
    k += b * (k_b * UNIT) + h * (k_h * UNIT)
    v += b * (v_b * UNIT) + h * (v_h * UNIT)
    out += b * (out_b * UNIT) + h * (out_h * UNIT) + first_row.to(tl.int64) * (out_n * UNIT)
    mask += b * mask_b + h * mask_h
    if not ONE_ROW:
        mask += (first_row + far_row) * mask_n
    kept_at = row[:, None] * D
    pairs = (group * tiles + tile) * blocks
    busy = 0
    for j in range(0, blocks):
        busy += tl.load(recompute + pairs + j)
    if busy == 0:
        out_at = out + far_row * (out_n * UNIT)
        whole, rest = load_pieces(merged, kept_at, 1, 1, row_inside, D, D1, D2, True)
        tl.store(out_at + channel * out_d, whole, mask=valid)
        if D2 > 0:
            tl.store(out_at + tail * out_d, rest, mask=tail_valid)
    else:
        query, query_tail = load_pieces(q, far_row * (q_n * UNIT), 1, q_d, row_inside, D, D1, D2, True)
        if OWN:
            for j in range(0, blocks):
                if tl.load(recompute + pairs + j) != 0:
                    kept = q_ref + ((pairs + j) * TILE + start) * D + kept_at
                    tl.store(kept + channel, query, mask=valid)
                    if D2 > 0:
                        tl.store(kept + tail, query_tail, mask=tail_valid)
        else:
            tl.store(q_ref + kept_at + channel, query, mask=valid)
            if D2 > 0:
                tl.store(q_ref + kept_at + tail, query_tail, mask=tail_valid)
        turned, turned_tail = (query.to(tl.float32) * turn).to(query.dtype), query_tail
        if D2 > 0:
            turned_tail = (query_tail.to(tl.float32) * turn).to(query.dtype)
        for j in range(0, blocks):
            if tl.load(recompute + pairs + j) != 0:
                first = j * block
                end = tl.where(j + 1 == blocks, keys, first + block)
                m_j, l_j, t_j, tail_j = attend_block(
                    turned, turned_tail, k, v, mask, row_inside, first, end, scale,
                    k_n * UNIT, k_d, v_n * UNIT, v_d, mask_m, D, D1, D2, ROWS, KEYS, MASK, ONE_ROW,
                )  # fmt: skip
                at = (pairs + j) * TILE + start + row
                partial_at = partial + ((pairs + j) * TILE + start) * D + kept_at
                tl.store(row_max + at, m_j, mask=row_valid)
                tl.store(row_sum + at, l_j, mask=row_valid)
                divisor = tl.where(l_j == 0, 1.0, l_j)[:, None]
                tl.store(partial_at + channel, (t_j / divisor).to(query.dtype), mask=valid)
                if D2 > 0:
                    tl.store(partial_at + tail, (tail_j / divisor).to(query.dtype), mask=tail_valid)
        tl.debug_barrier()  # the blocks were stored by other threads
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, D1), tl.float32)
        summed_tail = tl.zeros((ROWS, D2 if D2 > 0 else 16), tl.float32)
        for j in range(0, blocks):
            at = (pairs + j) * TILE + start + row
            partial_at = partial + ((pairs + j) * TILE + start) * D + kept_at
            m_j = tl.load(row_max + at, mask=row_valid, other=float("-inf"))
            l_j = tl.load(row_sum + at, mask=row_valid, other=0.0)
            t_j = tl.load(partial_at + channel, mask=valid, other=0.0).to(tl.float32)
            higher = tl.maximum(peak, m_j)
            top = tl.where(higher == float("-inf"), 0.0, higher)
            old, new = tl.exp(peak - top), tl.exp(m_j - top) * l_j
            total = old * total + new
            summed = old[:, None] * summed + new[:, None] * t_j
            if D2 > 0:
                tail_j = tl.load(partial_at + tail, mask=tail_valid, other=0.0).to(tl.float32)
                summed_tail = old[:, None] * summed_tail + new[:, None] * tail_j
            peak = higher
            if chunk == 0:  # one program per tile updates q_moved and computed, which this launch does not read
                if not OWN:
                    again = tl.load(recompute + pairs + j)
                    entry = tl.arange(0, WP)
                    summary = (pairs + j) * (2 * D + 1) + entry
                    moved = tl.load(change + summary, mask=entry < 2 * D + 1, other=0.0)
                    tl.store(q_moved + summary, tl.where(again != 0, 0.0, moved), mask=entry < 2 * D + 1)
                tl.store(computed + pairs + j, tl.full((), 1, tl.uint8))
        out_at = out + far_row * (out_n * UNIT)
        divisor = tl.where(total == 0, 1.0, total)[:, None]
        result = (summed / divisor).to(query.dtype)
        tl.store(out_at + channel * out_d, result, mask=valid)
        tl.store(merged + kept_at + channel, result, mask=valid)
        if D2 > 0:
            result = (summed_tail / divisor).to(query.dtype)
            tl.store(out_at + tail * out_d, result, mask=tail_valid)
            tl.store(merged + kept_at + tail, result, mask=tail_valid)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: State, decision: Decision, scale: float
) -> Tensor:
    """Recompute the chosen blocks, merge them with the kept blocks, and update the state; see naive.attend."""
    batch, heads, queries, size = q.shape
    tiles, blocks, tile = state.partial.shape[2:5]
    out = torch.empty_like(q)
    given, mask_strides, kind = mask_arguments(mask, (*q.shape[:3], k.shape[2]), q)
    rows, keys = sizes(size, q.dtype, tile)
    steps, unit = strides((q, k, v, out))
    positive, turn = scale_arguments(scale)
    first, second = split(size)
    with torch.cuda.device_of(q):
        attention_kernel[(batch * heads * tiles * (tile // rows),)](
            q, k, v, given, out, decision.recompute, decision.change, state.row_max, state.row_sum, state.partial,
            state.merged, state.q_ref, state.q_moved, state.computed.view(torch.uint8), *steps[:12], *mask_strides,
            *steps[12:], heads, queries, k.shape[2], tiles, blocks, state.block, positive, turn, D=size, D1=first,
            D2=second, UNIT=unit, WP=triton.next_power_of_2(2 * size + 1), TILE=tile, ROWS=rows, KEYS=keys, MASK=kind,
            ONE_ROW=kind > 0 and mask_strides[2] == 0, OWN=state.own_queries, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def sizes(size: int, dtype: torch.dtype, tile: int) -> tuple[int, int]:
    """Return ROWS and KEYS whose accumulators fit in the registers of 4 warps; 8 would compute 64 rows twice."""
    wide = size > 128 or dtype == torch.float32
    return (min(tile, 32), 32) if wide else (min(tile, 64), 64)
