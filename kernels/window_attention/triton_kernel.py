"""Window attention with a residual in Triton: one pass over keys and values for each tile of queries."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_rewrite.kernels.common.scores import default_scale
from dit_rewrite.kernels.common.tiles import load_tile, mask_arguments, masked_scores, padded
from dit_rewrite.kernels.window_attention.geometry import Window
from dit_rewrite.kernels.window_attention.reach import key_tiles, may_see, sees

LOG2_E = tl.constexpr(1.4426950408889634)
TILES = ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2))  # queries, keys, warps, stages
WIDE_TILES = ((64, 32, 8, 2), (32, 32, 4, 2))  # for float32 and large heads, which need more registers
INTERPRETED = (32, 32)


@triton.jit
def attend(scores, v, acc, largest, total):
    """Advance the online softmax by one tile of scores in units of log 2; the sums are relative to `largest`."""
    new = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # only masked keys so far: avoid -inf - -inf
    p = tl.exp2(scores - base[:, None])
    decay = tl.exp2(largest - base)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new, total * decay + tl.sum(p, 1)


@triton.jit
def normalised(acc, total):
    """Return the weighted mean of the values; fully masked rows give 0."""
    return tl.where(total[:, None] == 0, 0.0, acc / total[:, None])


@triton.jit
def window_kernel(
    query, key, value, mask, residual, out, heads, n, head_size, scale,
    prefix, height, width, reach_t, reach_y, reach_x,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    r_batch, r_head, r_row, r_dim, o_batch, o_head, o_row, o_dim, m_batch, m_head, m_row, m_col,
    REFRESH: tl.constexpr, AXES: tl.constexpr, KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Process BLOCK_M queries of one head. With REFRESH, write O and R = O - W; otherwise write W + residual."""
    tiles = tl.cdiv(n, BLOCK_M)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    last = tl.minimum(first + BLOCK_M, n) - 1
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    dims = tl.arange(0, BLOCK_D)
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head
    mask += batch * m_batch + head * m_head
    q = load_tile(query + batch * q_batch + head * q_head, rows, q_row, n, dims[None, :], q_dim, head_size)
    row, dim = rows.to(tl.int64), dims[None, :].to(tl.int64)
    at_residual = residual + batch * r_batch + head * r_head + row * r_row + dim * r_dim
    at_out = out + batch * o_batch + head * o_head + row * o_row + dim * o_dim
    inside = (rows < n) & (dims[None, :] < head_size)

    before, skipped, count = key_tiles(first, last, n, prefix, height, width, reach_t, reach_y, reach_x, AXES, BLOCK_N)
    near = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    near_largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    near_total = tl.zeros((BLOCK_M,), tl.float32)
    if REFRESH:
        full = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for tile in range(0, tl.cdiv(n, BLOCK_N)):
            cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            k = load_tile(key, cols[None, :], k_row, n, dims[:, None], k_dim, head_size)
            v = load_tile(value, cols[:, None], v_row, n, dims[None, :], v_dim, head_size)
            s = masked_scores(q, k, scale, mask, rows, m_row, n, cols[None, :], m_col, n, KIND, LOG2_E)
            full, largest, total = attend(s, v, full, largest, total)
            start = tile * BLOCK_N
            end = tl.minimum(start + BLOCK_N, n) - 1
            if may_see(first, last, start, end, prefix, height, width, reach_t, reach_y, reach_x):
                seen = sees(rows, cols[None, :], prefix, height, width, reach_t, reach_y, reach_x, AXES)
                s = tl.where(seen, s, float("-inf"))
                near, near_largest, near_total = attend(s, v, near, near_largest, near_total)
        result = normalised(full, total)
        tl.store(at_residual, (result - normalised(near, near_total)).to(residual.dtype.element_ty), mask=inside)
    else:
        for i in range(0, count):
            start = tl.where(i < before, i, i + skipped) * BLOCK_N
            end = tl.minimum(start + BLOCK_N, n) - 1
            if AXES < 3 or may_see(first, last, start, end, prefix, height, width, reach_t, reach_y, reach_x):
                cols = start + tl.arange(0, BLOCK_N)
                k = load_tile(key, cols[None, :], k_row, n, dims[:, None], k_dim, head_size)
                v = load_tile(value, cols[:, None], v_row, n, dims[None, :], v_dim, head_size)
                s = masked_scores(q, k, scale, mask, rows, m_row, n, cols[None, :], m_col, n, KIND, LOG2_E)
                seen = sees(rows, cols[None, :], prefix, height, width, reach_t, reach_y, reach_x, AXES)
                s = tl.where(seen, s, float("-inf"))
                near, near_largest, near_total = attend(s, v, near, near_largest, near_total)
        result = normalised(near, near_total) + tl.load(at_residual, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_out, result.to(out.dtype.element_ty), mask=inside)


def launch_refresh(
    query: Tensor, key: Tensor, value: Tensor, window: Window, attn_mask: Tensor | None, scale: float | None,
    *, block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return O and R = O - W. `block`, (queries, keys) as powers of two, replaces the autotuned tile."""
    out, residual = torch.empty_like(query), torch.empty_like(query)
    _launch(query, key, value, residual, out, window, attn_mask, scale, block, refresh=True)
    return out, residual


def launch_reuse(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Window, attn_mask: Tensor | None,
    scale: float | None, *, block: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return W + R; `block` as in `launch_refresh`."""
    out = torch.empty_like(query)
    _launch(query, key, value, residual, out, window, attn_mask, scale, block, refresh=False)
    return out


def _launch(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, out: Tensor, window: Window, mask: Tensor | None,
    scale: float | None, block: tuple[int, int] | None, *, refresh: bool,
) -> None:  # fmt: skip
    batch, heads, n, head_size = query.shape
    if not query.numel():
        return
    mask, mask_strides, kind = mask_arguments(mask, (batch, heads, n, n), query)
    tensors = (query, key, value, residual, out)
    kernel, options = _kernel(query, block)
    with torch.cuda.device_of(query):
        kernel[lambda meta: (batch * heads * triton.cdiv(n, meta["BLOCK_M"]),)](
            query, key, value, mask, residual, out, heads, n, head_size,
            default_scale(query, scale) * math.log2(math.e), window.prefix, *window.sizes[1:], *window.reach,
            *(stride for tensor in tensors for stride in tensor.stride()), *mask_strides,
            REFRESH=refresh, AXES=window.axes, KIND=kind, BLOCK_D=padded(head_size), **options,
        )  # fmt: skip


def _kernel(query: Tensor, block: tuple[int, int] | None) -> tuple[Any, dict[str, int]]:
    """Return the kernel and its launch options; on a GPU it is autotuned unless `block` is given."""
    if block is None and query.is_cuda:
        return _tuned(window_kernel, query.element_size() > 2 or query.shape[-1] > 128), {}
    block_m, block_n = block or INTERPRETED
    return window_kernel, {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8 if block_m > 64 else 4}


@functools.cache
def _tuned(kernel: Any, wide: bool) -> Any:
    tiles = WIDE_TILES if wide else TILES
    configs = [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in tiles]
    return triton.autotune(configs, key=["n", "heads", "head_size", "REFRESH", "AXES", "KIND"])(kernel)
