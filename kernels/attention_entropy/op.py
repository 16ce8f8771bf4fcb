"""Registration of `dit_rewrite::attention_entropy`: the naive reference on a CPU, Triton on CUDA."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_rewrite.kernels.attention_entropy import naive
from dit_rewrite.kernels.common import checks

if __name__ != "dit_rewrite.kernels.attention_entropy.op":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")

NAME = "attention_entropy"


@torch.library.custom_op(
    "dit_rewrite::attention_entropy",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor query, Tensor key, Tensor? attn_mask=None, float? scale=None, bool is_causal=False, "
    "bool enable_gqa=False) -> Tensor",
)
def attention_entropy(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None,
    is_causal: bool = False, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Return the mean entropy of the attention rows in nats, as a 0-d float32 tensor between 0 and log M.

    This is equation 5 of DQAR, H = -sum_ij A_ij log A_ij with A = softmax(query key^T scale + attn_mask), divided by
    the number of rows (batch x heads x queries).

    query: (..., N, d) float16, bfloat16, float32 or float64. key: (..., M, d), same dtype and device.
    attn_mask: bool (True takes part) or floating point (added to the scores); expands to (..., N, M).
    scale: defaults to 1/sqrt(d). is_causal, enable_gqa: as for `scaled_dot_product_attention`.

    Fully masked rows are left out of the mean; if all rows are, the result is NaN. NaN and inf in an input propagate
    to a result of NaN. The full score matrix is never allocated. Raises BadOpArgument if shapes, dtypes or devices do
    not match, or if `is_causal` is combined with `attn_mask`.
    """
    _check(query, key, attn_mask, is_causal, enable_gqa)
    return naive.attention_entropy(query, key, attn_mask, scale, is_causal, enable_gqa)


@attention_entropy.register_kernel("cuda")
def _cuda(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None,
    is_causal: bool = False, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    from dit_rewrite.kernels.attention_entropy import triton_kernel
    from dit_rewrite.kernels.common import tiles

    _check(query, key, attn_mask, is_causal, enable_gqa)
    run = triton_kernel.launch if tiles.supported(query) else naive.attention_entropy
    return run(query, key, attn_mask, scale, is_causal, enable_gqa)


@attention_entropy.register_fake
def _fake(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None,
    is_causal: bool = False, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    _check(query, key, attn_mask, is_causal, enable_gqa)
    return query.new_empty((), dtype=torch.float32)


@register_flop_formula(torch.ops.dit_rewrite.attention_entropy)
def _flops(query: tuple[int, ...], key: tuple[int, ...], *args: object, **kwargs: object) -> int:
    """Count the FLOPs of the product of query and key; entropy needs no values."""
    lead = max(query[:-2], key[:-2], key=math.prod)
    return 2 * math.prod(lead) * query[-2] * key[-2] * query[-1]


def _check(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> None:
    checks.require_floating_point(NAME, "query", query)
    checks.require_same_dtype_and_device(NAME, "key", key, "query", query)
    least = 3 if enable_gqa else 2
    for name, tensor in (("query", query), ("key", key)):
        checks.require(tensor.ndim >= least, NAME, f"{name}.ndim", tensor.ndim, f"{least} or more")
    checks.require(key.shape[-1] == query.shape[-1], NAME, "key.shape[-1]", key.shape[-1], "the head size of query")
    lead = _lead(query.shape[:-2], key.shape[:-2], enable_gqa)
    checks.require(
        lead is not None, NAME, "key.shape", tuple(key.shape), f"compatible with query, {tuple(query.shape)}"
    )
    checks.require(not (is_causal and mask is not None), NAME, "is_causal", is_causal, "False beside attn_mask")
    checks.require_attention_mask(NAME, mask, query, (*(lead or ()), query.shape[-2], key.shape[-2]))


def _lead(query: tuple[int, ...], key: tuple[int, ...], enable_gqa: bool) -> tuple[int, ...] | None:
    """Return the leading dimensions (batch, heads) of the scores, or None if query and key do not broadcast."""
    if enable_gqa:
        if not key[-1] or query[-1] % key[-1]:
            return None
        key = (*key[:-1], query[-1])
    try:
        return tuple(torch.broadcast_shapes(query, key))
    except RuntimeError:
        return None
