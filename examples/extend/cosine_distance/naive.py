"""Naive reference of the cosine distance in PyTorch; the op runs it on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - <a, b> / (|a| |b|); sums are taken in float32 (float64 for float64)."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)
    return (1 - (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()).float()
