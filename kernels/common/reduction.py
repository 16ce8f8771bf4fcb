"""Second stage of a two-stage reduction: one program adds the partial sums of the first stage's programs.

Neither stage uses atomics, so the order of summation is fixed and two runs agree bit for bit.
"""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def ratio_kernel(partials, out, count, BLOCK: tl.constexpr):
    """Write the sum of the first row of `partials` (2, count) over the sum of the second. Runs as one program."""
    numerator = tl.zeros((BLOCK,), tl.float64)
    denominator = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        numerator += tl.load(partials + at, mask=at < count, other=0.0)
        denominator += tl.load(partials + count + at, mask=at < count, other=0.0)
    ratio = tl.sum(numerator, 0) / tl.sum(denominator, 0)
    tl.store(out, ratio.to(tl.float32))


def ratio_of_sums(partials: Tensor) -> Tensor:
    """Return sum(partials[0]) / sum(partials[1]) as a 0-d float32 tensor; `partials` is (2, count) float64.

    0/0 is NaN.
    """
    out = torch.empty((), dtype=torch.float32, device=partials.device)
    ratio_kernel[(1,)](partials, out, partials.shape[1], BLOCK=1024, num_warps=4)
    return out
