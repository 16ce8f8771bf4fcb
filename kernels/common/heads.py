"""Heads in the attention kernels: split into two powers of two, with strides that allow copies of 16 bytes."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

LEAST = 16  # channels, the minimum of `tl.dot`


def split(size: int) -> tuple[int, int]:
    """Return two powers of two that hold a head: 72 is 64 + 16, of which 8 are padding. The second is 0 if not needed.

    Padding 72 to 128 would spill registers and load channels that are not there.
    """
    first = max(LEAST, 1 << (size.bit_length() - 1))
    return (first, 0) if size <= first else (first, max(LEAST, triton.next_power_of_2(size - first)))


def strides(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return the strides of the tensors, divided by a number that the kernel multiplies them with, and that number.

    Triton knows of an argument only whether 16 divides it. With rows of 72 elements it would load two bytes at a time.
    If all rows start at multiples of 16 bytes, the strides are given in units of 16 bytes, except that of the channels.
    """
    found = [[0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)] for t in tensors]
    unit = 16 // tensors[0].element_size()
    aligned = all(stride % unit == 0 for each in found for stride in each[:-1])
    unit = unit if aligned else 1
    return [s for each in found for s in (*(stride // unit for stride in each[:-1]), each[-1] or 1)], unit


def scale_arguments(scale: float) -> tuple[float, float]:
    """Return the positive size of the scale in units of log 2, and its sign, which the query is multiplied with."""
    return abs(scale) * math.log2(math.e) or 1.0, float((scale > 0) - (scale < 0))


@triton.jit
def load_pieces(
    base, at, dims, stride, valid, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr
):
    """Load both pieces of a tile. `at` are the offsets of its rows, `dims` is the axis of the channels: 0 or 1."""
    first = tl.expand_dims(tl.arange(0, D1), 1 - dims)
    if MASKED:
        whole = tl.load(base + at + first * stride, mask=valid & (first < D), other=0.0)
    elif D < D1:
        whole = tl.load(base + at + first * stride, mask=first < D, other=0.0)
    else:
        whole = tl.load(base + at + first * stride)
    if D2 > 0:
        second = D1 + tl.expand_dims(tl.arange(0, D2), 1 - dims)
        if MASKED:
            tail = tl.load(base + at + second * stride, mask=valid & (second < D), other=0.0)
        else:
            tail = tl.load(base + at + second * stride, mask=second < D, other=0.0)
    else:
        tail = whole
    return whole, tail


@triton.jit
def products(q, q_tail, k, k_tail, D2: tl.constexpr):
    """Return the scores of a tile, without the scale."""
    scores = tl.dot(q, k, input_precision="ieee")
    if D2 > 0:
        scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
    return scores


@triton.jit
def masked(scores, scale, at, valid, KIND: tl.constexpr):
    """Apply the mask at the pointers `at`. An additive one needs scores with the scale applied, in units of log 2."""
    if KIND == 1:
        return tl.where(tl.load(at, mask=valid, other=0) != 0, scores, float("-inf"))
    added = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    # some models pad with the lowest float32, which must stay finite after the change of units
    finite = tl.maximum(added * 1.4426950408889634, -3.4e38, propagate_nan=tl.PropagateNan.ALL)
    return scores * scale + tl.where(added == float("-inf"), added, finite)
