"""Attention entropy in Triton: an online softmax that also accumulates the weighted mean of the scores."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_rewrite.kernels.common.heads import load_pieces, masked, products, scale_arguments, split, strides
from dit_rewrite.kernels.common.reduction import ratio_of_sums
from dit_rewrite.kernels.common.scores import default_scale
from dit_rewrite.kernels.common.tiles import mask_arguments

LN_2 = tl.constexpr(0.6931471805599453)


# With p_j = 2^(s_j - m), m the largest score so far in units of log 2, l = sum p_j and u = sum p_j (s_j - m), the
# entropy in these units is log2 l - u / l. Taking the scores relative to m avoids cancellation when they are large.
@triton.jit
def advance(
    largest, total, weighted, q, q_tail, key, mask, rows, row_valid, start, m, scale, k_row, k_dim, m_col,
    EDGE: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, ONE_ROW: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Advance m, l and u by one tile of keys; only on an EDGE may keys be missing, or behind the query if CAUSAL."""
    within = tl.arange(0, BLOCK_N)
    cols = start + within
    inside = (cols < m)[None, :]
    here = key + tl.cast(start, tl.int64) * k_row
    k, k_tail = load_pieces(here, within[None, :] * k_row, 0, k_dim, inside, D, D1, D2, EDGE)
    scores = products(q, q_tail, k, k_tail, D2)
    if KIND > 0:
        valid = inside if ONE_ROW else row_valid & inside
        scores = masked(scores, scale, mask + cols[None, :].to(tl.int64) * m_col, valid, KIND)
    if EDGE:
        seen = inside & (cols[None, :] <= rows) if CAUSAL else inside
        scores = tl.where(seen, scores, float("-inf"))
    factor = 1.0 if KIND == 2 else scale
    new = tl.maximum(largest, tl.max(scores, 1) * factor)
    base = new
    if EDGE or KIND > 0:
        base = tl.where(new == float("-inf"), 0.0, new)  # only masked keys so far: avoid -inf - -inf
    away = scores * factor - base[:, None]
    p = tl.exp2(away)
    decay = tl.exp2(largest - base)
    weighted = tl.where(decay > 0, decay * (weighted + total * (largest - base)), 0.0)
    each = p * away
    if EDGE or KIND > 0:
        each = tl.where(p > 0, each, 0.0)  # not 0 * -inf; a NaN of p stays in the total
    return new, total * decay + tl.sum(p, 1), weighted + tl.sum(each, 1)


@triton.jit
def entropy_kernel(
    query, key, mask, partials, heads, group, n, m, scale, turn,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, m_batch, m_head, m_row, m_col,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, ONE_ROW: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the sum of the entropies of BLOCK_M rows of one head, and how many of the rows are not fully masked."""
    k_row *= UNIT
    program = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK_M)
    batch = (program // tiles // heads).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    first = program % tiles * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    valid = (rows < n)[:, None]
    row = rows[:, None].to(tl.int64)
    query += batch * (q_batch * UNIT) + head * (q_head * UNIT)
    key += batch * (k_batch * UNIT) + head // group * (k_head * UNIT)
    mask += batch * m_batch + head * m_head
    if not ONE_ROW:
        mask += row * m_row
    q, q_tail = load_pieces(query, row * (q_row * UNIT), 1, q_dim, valid, D, D1, D2, True)
    q, q_tail = (q.to(tl.float32) * turn).to(q.dtype), (q_tail.to(tl.float32) * turn).to(q.dtype)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    whole, end = m // BLOCK_N * BLOCK_N, m
    if CAUSAL:  # keys behind the last query are not read, and the mask is for those behind the first
        end = tl.minimum(m, first + BLOCK_M)
        whole = tl.minimum(whole, (first + 1) // BLOCK_N * BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        largest, total, weighted = advance(
            largest, total, weighted, q, q_tail, key, mask, rows[:, None], valid, start, m,
            scale, k_row, k_dim, m_col, False, KIND, CAUSAL, ONE_ROW, D, D1, D2, BLOCK_N,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        largest, total, weighted = advance(
            largest, total, weighted, q, q_tail, key, mask, rows[:, None], valid, start, m,
            scale, k_row, k_dim, m_col, True, KIND, CAUSAL, ONE_ROW, D, D1, D2, BLOCK_N,
        )  # fmt: skip

    counted = (rows < n) & (total != 0)  # true for NaN, which must propagate
    entropy = tl.where(counted, (tl.log2(total) - weighted / total) * LN_2, 0.0)
    tl.store(partials + program, tl.sum(entropy, 0).to(tl.float64))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(counted.to(tl.float32), 0).to(tl.float64))


def launch(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None, is_causal: bool, enable_gqa: bool,
    *, block: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return the mean row entropy as a 0-d float32 tensor.

    `block` overrides the (queries, keys) of a tile; both are powers of two.
    """
    q, k, mask = _four_dimensional(query, key, attn_mask, enable_gqa)
    (batch, heads, n, head_size), m = q.shape, k.shape[2]
    mask, mask_strides, kind = mask_arguments(mask, (batch, heads, n, m), q)
    block_m, block_n = block or block_of(q)
    programs = batch * heads * triton.cdiv(n, block_m)
    partials = torch.empty(2, programs, dtype=torch.float64, device=q.device)
    steps, unit = strides((q, k))
    size, turn = scale_arguments(default_scale(query, scale))
    first, second = split(head_size)
    with torch.cuda.device_of(q):
        if programs:
            entropy_kernel[(programs,)](
                q, k, mask, partials, heads, heads // k.shape[1], n, m, size, turn, *steps, *mask_strides, KIND=kind,
                CAUSAL=is_causal, ONE_ROW=kind > 0 and mask_strides[2] == 0, D=head_size, D1=first, D2=second,
                UNIT=unit, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4 if block_m < 128 else 8, num_stages=3,
            )  # fmt: skip
        return ratio_of_sums(partials)


def block_of(query: Tensor) -> tuple[int, int]:
    """Choose tiles such that one of queries and two of keys (for prefetching) fit in shared memory."""
    row = sum(split(query.shape[-1])) * query.element_size()
    return (128, 64) if row <= 256 else (64, 32)


def _four_dimensional(
    query: Tensor, key: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reshape query and key to (batch, heads, rows, head size) and the mask to their scores; views if possible."""
    shared = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    key_shape = (*key.shape[:-3], key.shape[-3] * shared) if enable_gqa else key.shape[:-2]
    lead = torch.broadcast_shapes(query.shape[:-2], key_shape)
    few = (*lead[:-1], key.shape[-3]) if enable_gqa else lead
    wide = (*lead, query.shape[-2], key.shape[-2])
    return _heads(query, lead), _heads(key, few), None if mask is None else _heads(mask.expand(wide), lead)


def _heads(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    tail = tensor.shape[-2:]
    return tensor.expand(*lead, *tail).reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, *tail)
