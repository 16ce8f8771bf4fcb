"""Registration of `window_refresh` and `window_reuse`: the naive reference on a CPU, Triton on CUDA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_rewrite.kernels.common import checks
from dit_rewrite.kernels.window_attention import naive
from dit_rewrite.kernels.window_attention.geometry import Window, make_window, window_flops

if __name__ != "dit_rewrite.kernels.window_attention.op":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")

_SHARED = (
    "SymInt[] window, SymInt[]? grid=None, SymInt prefix=0, Tensor? attn_mask=None, float? scale=None, SymInt suffix=0"
)


@torch.library.custom_op(
    "dit_rewrite::window_refresh",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor query, Tensor key, Tensor value, {_SHARED}) -> (Tensor, Tensor)",
)
def window_refresh(
    query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], grid: Sequence[int] | None = None,
    prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return full attention O and the residual R = O - W, where W is window attention (DiTFastAttn, equation 1).

    query, key, value: (B, H, N, d) of the same floating-point dtype and device, any strides. O and R have the shape,
    dtype and memory layout of `query`. Sums are taken in float32 (float64 for float64).
    window: the largest distance at which a query attends to a key, one number per axis of the grid.
    grid: (H, W) or (T, H, W) of the N - prefix grid tokens in row-major order; None for a sequence.
    prefix, suffix: number of tokens before and after the grid (the text in joint attention). They attend to all tokens,
    and all tokens attend to them.
    attn_mask: bool (True takes part) or floating point (added to the scores); expands to (B, H, N, N). The mask and
    `scale`, 1/sqrt(d) by default, apply to O and to W.

    A fully masked row gives O = 0; a row whose window is fully masked gives W = 0 and R = O. Raises BadOpArgument if
    the arguments conflict.
    """
    shape = _check("window_refresh", query, key, value, None, window, grid, prefix, attn_mask, suffix)
    return naive.window_refresh(query, key, value, shape, attn_mask, scale)


@torch.library.custom_op(
    "dit_rewrite::window_reuse",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor residual, {_SHARED}, bool subtract=False) -> Tensor",
)
def window_reuse(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
    suffix: int = 0, subtract: bool = False,
) -> Tensor:  # fmt: skip
    """Return the residual of an earlier step plus window attention, R + W (DiTFastAttn, equation 2).

    With `subtract`, return `residual` - W: the residual R itself, if `residual` is full attention (equation 1).
    `residual` is the second result of `window_refresh`, with the shape, dtype and device of `query`; the other
    arguments are those of `window_refresh`. Tiles of keys outside the window are not loaded. Raises BadParameter.
    """
    shape = _check("window_reuse", query, key, value, residual, window, grid, prefix, attn_mask, suffix)
    return naive.window_reuse(query, key, value, residual, shape, attn_mask, scale, subtract)


@window_refresh.register_kernel("cuda")
def _refresh_cuda(
    query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], grid: Sequence[int] | None = None,
    prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from dit_rewrite.kernels.common import tiles
    from dit_rewrite.kernels.window_attention import launch

    shape = _check("window_refresh", query, key, value, None, window, grid, prefix, attn_mask, suffix)
    run = launch.launch_refresh if tiles.supported(query) else naive.window_refresh
    return run(query, key, value, shape, attn_mask, scale)


@window_reuse.register_kernel("cuda")
def _reuse_cuda(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
    suffix: int = 0, subtract: bool = False,
) -> Tensor:  # fmt: skip
    from dit_rewrite.kernels.common import tiles
    from dit_rewrite.kernels.window_attention import launch

    shape = _check("window_reuse", query, key, value, residual, window, grid, prefix, attn_mask, suffix)
    run = launch.launch_reuse if tiles.supported(query) else naive.window_reuse
    return run(query, key, value, residual, shape, attn_mask, scale, subtract)


@window_refresh.register_fake
def _refresh_fake(
    query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], grid: Sequence[int] | None = None,
    prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check("window_refresh", query, key, value, None, window, grid, prefix, attn_mask, suffix)
    return torch.empty_like(query), torch.empty_like(query)


@window_reuse.register_fake
def _reuse_fake(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: Tensor | None = None, scale: float | None = None,
    suffix: int = 0, subtract: bool = False,
) -> Tensor:  # fmt: skip
    _check("window_reuse", query, key, value, residual, window, grid, prefix, attn_mask, suffix)
    return torch.empty_like(query)


@register_flop_formula(torch.ops.dit_rewrite.window_refresh)
def _refresh_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: object = None,
    scale: float | None = None, suffix: int = 0, *args: object, **kwargs: object,
) -> int:  # fmt: skip
    """Count full attention plus the product of the window's weights with the values; O and W share the scores."""
    return 4 * math.prod(query) * key[2] + window_flops(query, key, window, grid, prefix, suffix) // 2


@register_flop_formula(torch.ops.dit_rewrite.window_reuse)
def _reuse_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], residual: Sequence[int], window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, attn_mask: object = None,
    scale: float | None = None, suffix: int = 0, *args: object, **kwargs: object,
) -> int:  # fmt: skip
    return window_flops(query, key, window, grid, prefix, suffix)


def _check(
    where: str, query: Tensor, key: Tensor, value: Tensor, residual: Tensor | None, window: Sequence[int],
    grid: Sequence[int] | None, prefix: int, mask: Tensor | None, suffix: int,
) -> Window:  # fmt: skip
    checks.require_floating_point(where, "query", query)
    checks.require(query.ndim == 4, where, "query.ndim", query.ndim, "4: (batch, heads, tokens, head size)")
    for name, tensor in (("key", key), ("value", value), ("residual", residual)):
        if tensor is not None:
            checks.require_same_dtype_and_device(where, name, tensor, "query", query)
            checks.require_same_shape(where, name, tensor, "query", query)
    checks.require_attention_mask(where, mask, query, (*query.shape[:3], query.shape[2]))
    return make_window(where, query.shape[2], window, grid, prefix, suffix)
