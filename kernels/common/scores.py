"""Scaling and masking of attention scores in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def default_scale(query: Tensor, scale: float | None) -> float:
    """Return `scale`, or the default of scaled dot product attention, 1/sqrt(head size), if it is None."""
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def apply_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply `mask` to `scores`: -inf where a boolean mask is False; an additive mask is added."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def fully_masked_rows(scores: Tensor) -> Tensor:
    """Return which rows have only scores of -inf, as a bool tensor (..., 1). Their softmax is undefined."""
    return (scores == -math.inf).all(-1, keepdim=True)
