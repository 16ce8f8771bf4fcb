"""Attention scores in plain PyTorch, a block of query rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def default_scale(query: Tensor, scale: float | None) -> float:
    """What the scores are multiplied by: 1/sqrt(d) unless given, as in scaled dot product attention."""
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The scores under a mask: -inf where a boolean one is False, the sum with an additive one."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def without_keys(scores: Tensor) -> Tensor:
    """The rows (last axis kept, of size 1) that see no key at all: they have no distribution."""
    return (scores == -math.inf).all(-1, keepdim=True)
