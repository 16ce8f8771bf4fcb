"""Registration of `dit_rewrite::relative_l1`: the naive reference on a CPU, Triton on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels.common import checks
from dit_rewrite.kernels.relative_l1 import naive

if __name__ != "dit_rewrite.kernels.relative_l1.op":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")


@torch.library.custom_op(
    "dit_rewrite::relative_l1",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor current, Tensor reference) -> Tensor",
)
def relative_l1(current: Tensor, reference: Tensor) -> Tensor:
    """Return sum |current - reference| / sum |reference| as a 0-d float32 tensor.

    Both tensors have the same shape, floating-point dtype and device, and any strides. Sums are taken in float32
    (float64 for float64 inputs) and in a fixed order, so the result is deterministic. 0/0 (also of empty tensors) is
    NaN, x/0 is inf, and NaN and inf in an input propagate, so that no comparison with a threshold takes such tensors
    for similar. Raises BadOpArgument if shape, dtype or device differ.
    """
    _check(current, reference)
    return naive.relative_l1(current, reference)


@relative_l1.register_kernel("cuda")
def _cuda(current: Tensor, reference: Tensor) -> Tensor:
    from dit_rewrite.kernels.relative_l1 import triton_kernel

    _check(current, reference)
    return triton_kernel.launch(current, reference)


@relative_l1.register_fake
def _fake(current: Tensor, reference: Tensor) -> Tensor:
    _check(current, reference)
    return current.new_empty((), dtype=torch.float32)


def _check(current: Tensor, reference: Tensor) -> None:
    checks.require_floating_point("relative_l1", "current", current)
    checks.require_same_dtype_and_device("relative_l1", "reference", reference, "current", current)
    checks.require_same_shape("relative_l1", "reference", reference, "current", current)
