"""Cosine distance in Triton: one pass over both tensors writes partial sums, which PyTorch adds up."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def partial_sums_kernel(a, b, partials, numel, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Program p adds blocks p, p + programs, ... and writes column p of `partials` (3, programs)."""
    program = tl.program_id(0).to(tl.int64)  # offsets may exceed 2^31
    programs = tl.num_programs(0)
    product = tl.zeros((BLOCK,), ACC)
    square_a = tl.zeros((BLOCK,), ACC)
    square_b = tl.zeros((BLOCK,), ACC)
    for start in range(program * BLOCK, numel, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(a + at, mask=at < numel, other=0.0).to(ACC)
        y = tl.load(b + at, mask=at < numel, other=0.0).to(ACC)
        product += x * y
        square_a += x * x
        square_b += y * y
    tl.store(partials + program, tl.sum(product, 0).to(tl.float64))
    tl.store(partials + programs + program, tl.sum(square_a, 0).to(tl.float64))
    tl.store(partials + 2 * programs + program, tl.sum(square_b, 0).to(tl.float64))


def launch(a: Tensor, b: Tensor, *, block: int = 4096, max_programs: int = 1024) -> Tensor:
    """Return 1 - <a, b> / (|a| |b|) as a 0-d float32 tensor; the order of summation is fixed."""
    a, b = a.contiguous(), b.contiguous()
    programs = max(1, min(max_programs, triton.cdiv(a.numel(), block)))
    partials = torch.empty(3, programs, dtype=torch.float64, device=a.device)
    acc = tl.float64 if a.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(a):
        partial_sums_kernel[(programs,)](a, b, partials, a.numel(), ACC=acc, BLOCK=block)
    product, square_a, square_b = partials.sum(1)
    return (1 - product / (square_a * square_b).sqrt()).float()
