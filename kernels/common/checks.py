"""Argument checks of the custom ops. Each raises BadOpArgument with the name of the op and of the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.errors import BadOpArgument

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, op: str, name: str, value: object, allowed: str) -> None:
    """Raise BadOpArgument for the argument `name` of `op` unless `condition` holds."""
    if not condition:
        raise BadOpArgument(op, name, value, allowed)


def require_floating_point(op: str, name: str, tensor: Tensor) -> None:
    """Raise BadOpArgument unless `tensor` has one of `DTYPES`."""
    require(tensor.dtype in DTYPES, op, f"{name}.dtype", tensor.dtype, "float16, bfloat16, float32 or float64")


def require_same_dtype_and_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise BadOpArgument unless `tensor` has the dtype and the device of `other`."""
    require(tensor.dtype == other.dtype, op, f"{name}.dtype", tensor.dtype, f"that of {other_name}, {other.dtype}")
    require(tensor.device == other.device, op, f"{name}.device", tensor.device, f"that of {other_name}, {other.device}")


def require_same_shape(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise BadOpArgument unless `tensor` has the shape of `other`."""
    value, wanted = tuple(tensor.shape), tuple(other.shape)
    require(value == wanted, op, f"{name}.shape", value, f"that of {other_name}, {wanted}")


def require_attention_mask(op: str, mask: Tensor | None, query: Tensor, shape: tuple[int, ...]) -> None:
    """Raise BadOpArgument unless `mask` is None, or boolean or floating point on the query's device and expandable to
    `shape`, the shape of the scores."""
    if mask is None:
        return
    require(mask.dtype in (torch.bool, *DTYPES), op, "attn_mask.dtype", mask.dtype, "bool or a floating-point dtype")
    require(mask.device == query.device, op, "attn_mask.device", mask.device, f"that of query, {query.device}")
    sizes = tuple(mask.shape)
    fits = len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(sizes[::-1], shape[::-1], strict=False))
    require(fits, op, "attn_mask.shape", sizes, f"one that expands to that of the scores, {shape}")
