"""Comparison of tensors by version counter and relative change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def version(tensor: Tensor) -> int | None:
    """Return the version counter of a tensor, or None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and device."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def relative_changes(now: Tensor | None, before: Sequence[Tensor | None]) -> list[float]:
    """Return the relative L2 change from each tensor of `before` to `now`, with one device read; NaN means unknown."""
    known = [i for i, tensor in enumerate(before) if now is not None and tensor is not None and alike(now, tensor)]
    changes = [float("nan")] * len(before)
    if not known:
        return changes
    measured = torch.stack([relative_change(now, before[i]) for i in known])  # type: ignore[arg-type]
    for i, change in zip(known, measured.tolist(), strict=True):
        changes[i] = change
    return changes


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """Return the relative L2 change as a 0-d float64 tensor; norms are computed in float32."""
    if now is before:
        return torch.zeros((), dtype=torch.float64, device=now.device)
    change = torch.linalg.vector_norm(now.detach() - before.detach(), dtype=torch.float32)
    return (change / torch.linalg.vector_norm(before.detach(), dtype=torch.float32)).to(torch.float64)
