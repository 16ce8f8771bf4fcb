"""Registration of `dit_rewrite::cosine_distance`: the naive reference on a CPU, Triton on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels.common import checks
from examples.extend.cosine_distance import naive


@torch.library.custom_op(
    "dit_rewrite::cosine_distance", mutates_args=(), device_types="cpu", schema="(Tensor a, Tensor b) -> Tensor"
)
def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - <a, b> / (|a| |b|) as a 0-d float32 tensor.

    Both tensors have the same shape, floating-point dtype and device, and any strides. The distance from a tensor of
    zeros is NaN, and NaN in an input propagates. Raises BadOpArgument if shape, dtype or device differ.
    """
    _check(a, b)
    return naive.cosine_distance(a, b)


@cosine_distance.register_kernel("cuda")
def _cuda(a: Tensor, b: Tensor) -> Tensor:
    from examples.extend.cosine_distance import triton_kernel

    _check(a, b)
    return triton_kernel.launch(a, b)


@cosine_distance.register_fake
def _fake(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    return a.new_empty((), dtype=torch.float32)


def _check(a: Tensor, b: Tensor) -> None:
    checks.require_floating_point("cosine_distance", "a", a)
    checks.require_same_dtype_and_device("cosine_distance", "b", b, "a", a)
    checks.require_same_shape("cosine_distance", "b", b, "a", a)
