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

from dit_rewrite.kernels.common.reduction import ratio_of_sums
from dit_rewrite.kernels.common.scores import default_scale
from dit_rewrite.kernels.common.tiles import load_tile, mask_arguments, masked_scores, padded


# With p_j = exp(s_j - m), m the largest score so far, l = sum p_j and u = sum p_j (s_j - m), the entropy is
# log l - u / l. Taking the scores relative to m avoids cancellation when they are large.
@triton.jit
def entropy_kernel(
    query, key, mask, partials, heads, group, n, m, head_size, scale,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, m_batch, m_head, m_row, m_col,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the sum of the entropies of BLOCK_M rows of one head, and how many of the rows are not fully masked."""
    program = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK_M)
    batch = (program // tiles // heads).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    key += batch * k_batch + head // group * k_head
    mask += batch * m_batch + head * m_head
    q = load_tile(query + batch * q_batch + head * q_head, rows[:, None], q_row, n, dims[None, :], q_dim, head_size)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, m, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_tile(key, cols[None, :], k_row, m, dims[:, None], k_dim, head_size)
        s = masked_scores(q, k, scale, mask, rows[:, None], m_row, n, cols[None, :], m_col, m, KIND, 1)
        if CAUSAL:
            s = tl.where(cols[None, :] <= rows[:, None], s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # only masked keys so far: avoid -inf - -inf
        away = s - base[:, None]
        p = tl.exp(away)
        decay = tl.exp(largest - base)
        weighted = tl.where(decay > 0, decay * (weighted + total * (largest - base)), 0.0)
        weighted += tl.sum(tl.where(p > 0, p * away, 0.0), 1)
        total = total * decay + tl.sum(p, 1)
        largest = new

    counted = (rows < n) & (total != 0)  # true for NaN, which must propagate
    entropy = tl.where(counted, tl.log(total) - weighted / total, 0.0)
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
    with torch.cuda.device_of(q):
        if programs:
            entropy_kernel[(programs,)](
                q, k, mask, partials, heads, heads // k.shape[1], n, m, head_size, default_scale(query, scale),
                *q.stride(), *k.stride(), *mask_strides, KIND=kind, CAUSAL=is_causal,
                BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=padded(head_size), num_warps=4 if block_m < 128 else 8,
            )  # fmt: skip
        return ratio_of_sums(partials)


def block_of(query: Tensor) -> tuple[int, int]:
    """Choose tiles such that one of queries and two of keys (for prefetching) fit in shared memory."""
    row = padded(query.shape[-1]) * query.element_size()
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
