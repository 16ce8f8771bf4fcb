"""The residual O - W with window attention W by a kernel of another library: FlexAttention or FlashAttention."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_rewrite.kernels.window_attention.geometry import make_window, window_flops

if __name__ != "dit_rewrite.kernels.window_attention.libraries":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")

Window = tuple[int, ...]


def available(query: Tensor, window: Sequence[int], prefix: int, suffix: int, masked: bool) -> tuple[str, ...]:
    """Return the libraries that have the window attention of this query: none for a mask of the scores.

    FlashAttention has windows over a sequence without text, in 16 bits. Whether a library runs it on the device at
    hand is only known when it does.
    """
    if masked:
        return ()
    sequence = len(window) == 1 and not (prefix or suffix) and query.dtype in (torch.float16, torch.bfloat16)
    flash = sequence and importlib.util.find_spec("flash_attn") is not None
    return ("flex", "flash") if flash else ("flex",)


def version(by: str) -> str:
    """Return the version of a library that is available."""
    return torch.__version__ if by == "flex" else importlib.metadata.version("flash_attn")


@torch.library.custom_op(
    "dit_rewrite::window_residual",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor full, str by, SymInt[] window, SymInt[]? grid=None, "
    "SymInt prefix=0, float? scale=None, SymInt suffix=0) -> Tensor",
)
def window_residual(
    query: Tensor, key: Tensor, value: Tensor, full: Tensor, by: str, window: Sequence[int],
    grid: Sequence[int] | None = None, prefix: int = 0, scale: float | None = None, suffix: int = 0,
) -> Tensor:  # fmt: skip
    """Return `full` - W as `window_reuse` does with `subtract`, with W by the library `by`: "flex" or "flash".

    W has the dtype of the query before it is subtracted, where `window_reuse` subtracts in float32.
    """
    out = torch.empty_like(query)
    if by == "flash":
        make_window("window_residual", query.shape[2], window, grid, prefix, suffix)
        near = _flash(query, key, value, window[0], scale)
    else:
        axes = None if grid is None else tuple(grid)
        run = _flex(query.shape[2], tuple(window), axes, prefix, suffix, scale, query.device)
        near = run(query, key, value)
    return torch.sub(full, near, out=out)


@window_residual.register_fake
def _fake(query: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(query)


@register_flop_formula(torch.ops.dit_rewrite.window_residual)
def _flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], full: Sequence[int], by: str,
    window: Sequence[int], grid: Sequence[int] | None = None, prefix: int = 0, scale: float | None = None,
    suffix: int = 0, *args: object, **kwargs: object,
) -> int:  # fmt: skip
    return window_flops(query, key, window, grid, prefix, suffix)


def _flash(query: Tensor, key: Tensor, value: Tensor, reach: int, scale: float | None) -> Tensor:
    attention = importlib.import_module("flash_attn").flash_attn_func
    turned = (tensor.transpose(1, 2) for tensor in (query, key, value))  # its tensors are (B, N, H, d)
    found: Tensor = attention(*turned, softmax_scale=scale, window_size=(reach, reach))
    return found.transpose(1, 2)


@functools.cache  # never freed: a captured CUDA graph may read the block mask where it is
def _flex(
    tokens: int, window: Window, grid: Window | None, prefix: int, suffix: int, scale: float | None,
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
    """Return window attention by FlexAttention: compiled on a GPU; on a CPU, where it serves tests, as it is."""
    from dit_rewrite.kernels.window_attention.flex import flex_window

    return flex_window(tokens, window, grid, prefix, str(device), suffix, scale, compiled=device.type == "cuda")
