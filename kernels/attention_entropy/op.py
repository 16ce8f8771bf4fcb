"""The op `dit_rewrite::attention_entropy`: plain PyTorch on a CPU, Triton on a GPU, opaque to the compiler."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_rewrite.kernels import checks
from dit_rewrite.kernels.attention_entropy import plain

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
    """How spread out attention is: the mean entropy of its rows in nats, as a 0-d float32 tensor.

    DQAR's equation 5, H = -sum_ij A_ij log A_ij with A = softmax(query key^T scale + attn_mask), divided by the number
    of rows: batch entries x heads x queries. It lies between 0 and log M. `query` (..., N, d) and `key` (..., M, d) and
    the other arguments are those of scaled dot product attention; `attn_mask` is boolean (True: seen) or added to the
    scores, and expands to (..., N, M). A row that sees no key has no distribution and is left out; with none left the
    result is NaN, and NaN in an input spreads. No matrix of all scores is made. Raises BadParameter for shapes, dtypes
    or devices that do not fit, and for `is_causal` beside a mask.
    """
    _check(query, key, attn_mask, is_causal, enable_gqa)
    return plain.attention_entropy(query, key, attn_mask, scale, is_causal, enable_gqa)


@attention_entropy.register_kernel("cuda")
def _cuda(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None,
    is_causal: bool = False, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    from dit_rewrite.kernels import tiles
    from dit_rewrite.kernels.attention_entropy import triton_kernel

    _check(query, key, attn_mask, is_causal, enable_gqa)
    run = triton_kernel.launch if tiles.supported(query) else plain.attention_entropy
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
    """The product of query and key; nothing is multiplied by values."""
    lead = max(query[:-2], key[:-2], key=math.prod)
    return 2 * math.prod(lead) * query[-2] * key[-2] * query[-1]


def _check(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> None:
    checks.real(NAME, "query", query)
    checks.same_kind(NAME, "key", key, "query", query)
    least = 3 if enable_gqa else 2
    for name, tensor in (("query", query), ("key", key)):
        checks.require(tensor.ndim >= least, NAME, f"{name}.ndim", tensor.ndim, f"{least} or more")
    checks.require(key.shape[-1] == query.shape[-1], NAME, "key.shape[-1]", key.shape[-1], "the head size of query")
    lead = _lead(query.shape[:-2], key.shape[:-2], enable_gqa)
    checks.require(
        lead is not None, NAME, "key.shape", tuple(key.shape), f"one that fits query's, {tuple(query.shape)}"
    )
    checks.require(not (is_causal and mask is not None), NAME, "is_causal", is_causal, "False beside attn_mask")
    checks.attention_mask(NAME, mask, query, (*(lead or ()), query.shape[-2], key.shape[-2]))


def _lead(query: tuple[int, ...], key: tuple[int, ...], enable_gqa: bool) -> tuple[int, ...] | None:
    """The batch dimensions and heads of the scores; None where those of query and key do not go together."""
    if enable_gqa:
        if not key[-1] or query[-1] % key[-1]:
            return None
        key = (*key[:-1], query[-1])
    try:
        return tuple(torch.broadcast_shapes(query, key))
    except RuntimeError:
        return None
