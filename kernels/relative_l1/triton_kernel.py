"""Relative L1 change in Triton: one pass over both tensors, then one program that adds the partial sums."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_rewrite.kernels.common.reduction import ratio_of_sums


@triton.jit
def partial_sums_kernel(current, reference, partials, numel, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Program p adds blocks p, p + programs, ... and writes column p of `partials` (2, programs)."""
    program = tl.program_id(0).to(tl.int64)  # offsets may exceed 2^31
    programs = tl.num_programs(0)
    change = tl.zeros((BLOCK,), ACC)
    size = tl.zeros((BLOCK,), ACC)
    within = tl.arange(0, BLOCK)
    whole = numel // BLOCK
    for block in range(program, whole, programs):  # without a mask, loads are of 16 bytes for every number of elements
        a = tl.load(current + block * BLOCK + within).to(ACC)
        b = tl.load(reference + block * BLOCK + within).to(ACC)
        change += tl.abs(a - b)
        size += tl.abs(b)
    if program == whole % programs:
        at = tl.cast(whole, tl.int64) * BLOCK + within
        a = tl.load(current + at, mask=at < numel, other=0.0).to(ACC)
        b = tl.load(reference + at, mask=at < numel, other=0.0).to(ACC)
        change += tl.abs(a - b)
        size += tl.abs(b)
    tl.store(partials + program, tl.sum(change, 0).to(tl.float64))
    tl.store(partials + programs + program, tl.sum(size, 0).to(tl.float64))


def launch(current: Tensor, reference: Tensor, *, block: int = 4096, max_programs: int = 1024) -> Tensor:
    """Return sum |current - reference| / sum |reference| as a 0-d float32 tensor.

    block: elements that a program loads at a time, a power of two. max_programs: bound on the grid; it does not depend
    on the device, so that every GPU sums in the same order.
    """
    current, reference = _same_order(current, reference)
    programs = max(1, min(max_programs, triton.cdiv(current.numel(), block)))
    partials = torch.empty(2, programs, dtype=torch.float64, device=current.device)
    acc = tl.float64 if current.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(current):
        partial_sums_kernel[(programs,)](
            current, reference, partials, current.numel(), ACC=acc, BLOCK=block, num_warps=8
        )
        return ratio_of_sums(partials)


def _same_order(current: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors dense in the memory order of `current`; copies only tensors that are not in that order."""
    order = sorted(range(current.ndim), key=current.stride, reverse=True)
    return current.permute(order).contiguous(), reference.permute(order).contiguous()
