"""Pieces of attention kernels: a tile of scores, and its mask."""

# The arguments of kernels have no types in Python.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MASKS = {torch.bool: 1}  # kinds of mask: 0 none, 1 boolean, 2 additive
MAX_HEAD_SIZE = 256  # beyond it the tiles do not fit in shared memory


def supported(query: Tensor) -> bool:
    """Whether the kernels take this dtype and head size; tensor cores have no float64 in Triton."""
    return query.dtype != torch.float64 and query.shape[-1] <= MAX_HEAD_SIZE


def padded(head_size: int) -> int:
    """The head size as tiles have it: a power of two, and at least what a matrix product needs."""
    return max(16, triton.next_power_of_2(head_size))


def mask_arguments(mask: Tensor | None, shape: tuple[int, ...], stand_in: Tensor) -> tuple[Tensor, list[int], int]:
    """The mask, its strides when expanded to the 4-D shape of the scores, and its kind; a stand-in for none."""
    if mask is None:
        return stand_in, [0, 0, 0, 0], 0
    return mask, list(mask.expand(shape).stride()), MASKS.get(mask.dtype, 2)


@triton.jit
def load_tile(base, rows, row_stride, row_count, dims, dim_stride, dim_count):
    """The tile [rows, dims] of a matrix, zero outside of it."""
    inside = (rows < row_count) & (dims < dim_count)
    return tl.load(base + rows.to(tl.int64) * row_stride + dims.to(tl.int64) * dim_stride, mask=inside, other=0.0)


@triton.jit
def masked_scores(
    q, k, scale, mask, rows, row_stride, row_count, cols, col_stride, col_count, KIND: tl.constexpr, UNIT: tl.constexpr
):
    """A tile of scores in units of 1/UNIT nats, which `scale` has folded in; -inf where no key is seen."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    inside = (rows < row_count) & (cols < col_count)
    at = mask + rows.to(tl.int64) * row_stride + cols.to(tl.int64) * col_stride
    if KIND == 1:
        scores = tl.where(tl.load(at, mask=inside, other=0) != 0, scores, float("-inf"))
    if KIND == 2:
        added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if UNIT != 1:  # the least float32, with which some pad, is a score: in other units it must not become -inf
            finite = tl.maximum(added * UNIT, -3.4e38, propagate_nan=tl.PropagateNan.ALL)
            added = tl.where(added == float("-inf"), added, finite)
        scores += added
    return tl.where(cols < col_count, scores, float("-inf"))
