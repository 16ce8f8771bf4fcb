"""The ops `window_refresh` and `window_reuse`: plain PyTorch on a CPU, Triton on a GPU, opaque to the compiler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_rewrite.kernels import checks
from dit_rewrite.kernels.window_attention import plain
from dit_rewrite.kernels.window_attention.geometry import Window, make_window, window_flops

if __name__ != "dit_rewrite.kernels.window_attention.op":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")

_WHERE = "SymInt[] window, SymInt[]? grid=None, SymInt prefix=0, Tensor? attn_mask=None, float? scale=None"


@torch.library.custom_op(
    "dit_rewrite::window_refresh",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor query, Tensor key, Tensor value, {_WHERE}) -> (Tensor, Tensor)",
)
def window_refresh(
    query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], grid: Sequence[int] | None = None,
    prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention O, and the residual R = O - W that window attention W leaves of it (DiTFastAttn, equation 1).

    `query`, `key` and `value` are (B, H, N, d) of one dtype and device, with any strides; so are O and R, which lie in
    memory as `query` does. Sums are in float32 (float64 for float64). Of the N tokens, the first `prefix` (text, in
    joint attention) see all and are seen by all. The others are a sequence, or with `grid` (H, W) or (T, H, W), rows of
    a grid in that order; a query sees the keys whose distance on each axis is at most `window` (one number an axis).
    `attn_mask` (boolean, True: seen, or added to the scores; expands to (B, H, N, N)) and `scale` (1/sqrt(d) by
    default) are those of scaled dot product attention and hold for O and W. A row that sees no key has O = 0; one whose
    window alone is masked throughout has W = 0 and R = O. Raises BadParameter where arguments do not fit each other.
    """
    shape = _check("window_refresh", query, key, value, None, window, grid, prefix, attn_mask)
    return plain.window_refresh(query, key, value, shape, attn_mask, scale)


@torch.library.custom_op(
    "dit_rewrite::window_reuse",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor residual, {_WHERE}) -> Tensor",
)
def window_reuse(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Window attention plus a residual of an earlier step, W + R (DiTFastAttn, equation 2).

    The arguments are those of `window_refresh`, and `residual` what it returned: shape, dtype and device of `query`.
    Keys outside the window are neither read nor multiplied, but for those that share a tile with one inside.
    """
    shape = _check("window_reuse", query, key, value, residual, window, grid, prefix, attn_mask)
    return plain.window_reuse(query, key, value, residual, shape, attn_mask, scale)


@window_refresh.register_kernel("cuda")
def _refresh_cuda(
    query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], grid: Sequence[int] | None = None,
    prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from dit_rewrite.kernels import tiles
    from dit_rewrite.kernels.window_attention import triton_kernel

    shape = _check("window_refresh", query, key, value, None, window, grid, prefix, attn_mask)
    run = triton_kernel.launch_refresh if tiles.supported(query) else plain.window_refresh
    return run(query, key, value, shape, attn_mask, scale)


@window_reuse.register_kernel("cuda")
def _reuse_cuda(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    from dit_rewrite.kernels import tiles
    from dit_rewrite.kernels.window_attention import triton_kernel

    shape = _check("window_reuse", query, key, value, residual, window, grid, prefix, attn_mask)
    run = triton_kernel.launch_reuse if tiles.supported(query) else plain.window_reuse
    return run(query, key, value, residual, shape, attn_mask, scale)


@window_refresh.register_fake
def _refresh_fake(
    query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], grid: Sequence[int] | None = None,
    prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check("window_refresh", query, key, value, None, window, grid, prefix, attn_mask)
    return torch.empty_like(query), torch.empty_like(query)


@window_reuse.register_fake
def _reuse_fake(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    _check("window_reuse", query, key, value, residual, window, grid, prefix, attn_mask)
    return torch.empty_like(query)


@register_flop_formula(torch.ops.dit_rewrite.window_refresh)
def _refresh_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, *args: object, **kwargs: object,
) -> int:  # fmt: skip
    """Attention in full, and the window's scores once more with the values: the scores are shared."""
    return 4 * math.prod(query) * key[2] + window_flops(query, key, window, grid, prefix) // 2


@register_flop_formula(torch.ops.dit_rewrite.window_reuse)
def _reuse_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], residual: Sequence[int], window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, *args: object, **kwargs: object,
) -> int:  # fmt: skip
    return window_flops(query, key, window, grid, prefix)


def _check(
    where: str, query: Tensor, key: Tensor, value: Tensor, residual: Tensor | None, window: Sequence[int],
    grid: Sequence[int] | None, prefix: int, mask: Tensor | None,
) -> Window:  # fmt: skip
    checks.real(where, "query", query)
    checks.require(query.ndim == 4, where, "query.ndim", query.ndim, "4: (batch, heads, tokens, head size)")
    for name, tensor in (("key", key), ("value", value), ("residual", residual)):
        if tensor is not None:
            checks.same_kind(where, name, tensor, "query", query)
            checks.same_shape(where, name, tensor, "query", query)
    checks.attention_mask(where, mask, query, (*query.shape[:3], query.shape[2]))
    return make_window(where, query.shape[2], window, grid, prefix)
