"""Naive reference of the relative L1 change in PyTorch; the op runs it on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements per block, so that no full-size float32 copy is allocated


def relative_l1(current: Tensor, reference: Tensor) -> Tensor:
    """Return sum |current - reference| / sum |reference|; blocks are summed in float32 (float64 for float64)."""
    dtype = torch.promote_types(current.dtype, torch.float32)
    blocks = zip(current.reshape(-1).split(BLOCK), reference.reshape(-1).split(BLOCK), strict=True)
    change, size = torch.stack([_sums(a.to(dtype), b.to(dtype)) for a, b in blocks]).double().sum(0)
    return (change / size).float()


def _sums(current: Tensor, reference: Tensor) -> Tensor:
    return torch.stack([(current - reference).abs().sum(), reference.abs().sum()])
