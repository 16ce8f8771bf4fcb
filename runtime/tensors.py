"""What identity, version and one read of the device say of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and device."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def relative_changes(now: Tensor | None, before: Sequence[Tensor | None]) -> list[float]:
    """The relative L2 change from each tensor of `before` to `now`, by one read of the device; NaN where unknown."""
    known = [i for i, tensor in enumerate(before) if now is not None and tensor is not None and alike(now, tensor)]
    changes = [float("nan")] * len(before)
    if not known:
        return changes
    measured = torch.stack([relative_change(now, before[i]) for i in known])  # type: ignore[arg-type]
    for i, change in zip(known, measured.tolist(), strict=True):
        changes[i] = change
    return changes


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """The relative L2 change as a tensor of no dimensions."""
    if now is before:
        return torch.zeros((), dtype=torch.float64, device=now.device)
    change = torch.linalg.vector_norm(now.detach() - before.detach(), dtype=torch.float32)
    return (change / torch.linalg.vector_norm(before.detach(), dtype=torch.float32)).to(torch.float64)
