"""The op `dit_rewrite::relative_l1`: plain PyTorch on a CPU, Triton on a GPU, opaque to the compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels import checks
from dit_rewrite.kernels.relative_l1 import plain

if __name__ != "dit_rewrite.kernels.relative_l1.op":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")


@torch.library.custom_op(
    "dit_rewrite::relative_l1",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor current, Tensor reference) -> Tensor",
)
def relative_l1(current: Tensor, reference: Tensor) -> Tensor:
    """How much a tensor changed: sum |current - reference| / sum |reference|, as a 0-d float32 tensor.

    Both tensors have one shape, dtype and device; any strides. Sums are in float32 (float64 for float64), in an order
    that does not change from run to run. Without proof of similarity there is none: 0/0 (an empty tensor too) is NaN,
    x/0 is inf, and NaN and inf in an input spread. Raises BadParameter where shape, dtype or device differ.
    """
    _check(current, reference)
    return plain.relative_l1(current, reference)


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
    checks.real("relative_l1", "current", current)
    checks.same_kind("relative_l1", "reference", reference, "current", current)
    checks.same_shape("relative_l1", "reference", reference, "current", current)
