"""What the ops of this layer ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.errors import BadParameter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, where: str, name: str, value: object, allowed: str) -> None:
    """Refuse the argument `name` of the op `where` unless the condition holds."""
    if not condition:
        raise BadParameter(where, name, value, allowed)


def real(where: str, name: str, tensor: Tensor) -> None:
    """Refuse what is not a tensor of real floating-point numbers."""
    require(tensor.dtype in DTYPES, where, f"{name}.dtype", tensor.dtype, "float16, bfloat16, float32 or float64")


def same_kind(where: str, name: str, tensor: Tensor, model: str, other: Tensor) -> None:
    """Refuse a tensor whose dtype or device is not that of the one called `model`."""
    require(tensor.dtype == other.dtype, where, f"{name}.dtype", tensor.dtype, f"that of {model}, {other.dtype}")
    require(tensor.device == other.device, where, f"{name}.device", tensor.device, f"that of {model}, {other.device}")


def same_shape(where: str, name: str, tensor: Tensor, model: str, other: Tensor) -> None:
    """Refuse a tensor whose shape is not that of the one called `model`."""
    value, wanted = tuple(tensor.shape), tuple(other.shape)
    require(value == wanted, where, f"{name}.shape", value, f"that of {model}, {wanted}")


def attention_mask(where: str, mask: Tensor | None, query: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is neither boolean nor real, on another device, or does not expand to the scores' shape."""
    if mask is None:
        return
    require(mask.dtype in (torch.bool, *DTYPES), where, "attn_mask.dtype", mask.dtype, "bool or a floating-point dtype")
    require(mask.device == query.device, where, "attn_mask.device", mask.device, f"that of query, {query.device}")
    sizes = tuple(mask.shape)
    fits = len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(sizes[::-1], shape[::-1], strict=False))
    require(fits, where, "attn_mask.shape", sizes, f"one that expands to that of the scores, {shape}")
