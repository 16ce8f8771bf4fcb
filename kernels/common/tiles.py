"""Loads of tiles, and the launch arguments of masks."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MASKS = {torch.bool: 1}  # values of KIND: 0 no mask, 1 boolean, 2 additive
MAX_HEAD_SIZE = 256  # tiles of larger heads do not fit in shared memory


def supported(query: Tensor) -> bool:
    """Return whether the kernels support the query's dtype and head size; Triton has no float64 on tensor cores."""
    return query.dtype != torch.float64 and query.shape[-1] <= MAX_HEAD_SIZE


def padded(head_size: int) -> int:
    """Round the head size up to a power of two of at least 16, the minimum of `tl.dot`."""
    return max(16, triton.next_power_of_2(head_size))


def mask_arguments(mask: Tensor | None, shape: tuple[int, ...], stand_in: Tensor) -> tuple[Tensor, list[int], int]:
    """Return the mask, its strides when expanded to `shape` (the 4-D shape of the scores), and its KIND.

    Without a mask `stand_in` is returned as a valid pointer that the kernel does not read.
    """
    if mask is None:
        return stand_in, [0, 0, 0, 0], 0
    return mask, list(mask.expand(shape).stride()), MASKS.get(mask.dtype, 2)


@triton.jit
def load_tile(base, rows, row_stride, row_count, dims, dim_stride, dim_count):
    """Load the tile [rows, dims] of a matrix; elements outside the matrix are 0."""
    inside = (rows < row_count) & (dims < dim_count)
    return tl.load(base + rows.to(tl.int64) * row_stride + dims.to(tl.int64) * dim_stride, mask=inside, other=0.0)
