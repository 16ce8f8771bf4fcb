"""Inputs of window attention, its definition in float64, and the functions that compute it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from dit_rewrite.kernels.window_attention import window_refresh, window_reuse
from dit_rewrite.kernels.window_attention.geometry import make_window

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Ops = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]
WINDOWS: list[tuple[int, dict[str, Any]]] = [
    (50, {"window": (6,)}),
    (75, {"window": (0,)}),
    (61, {"window": (9,), "prefix": 5}),
    (63, {"window": (1, 2), "grid": (7, 9)}),
    (70, {"window": (1, 0), "grid": (7, 9), "prefix": 7}),
    (66, {"window": (0, 1, 1), "grid": (3, 4, 5), "prefix": 6}),
    (60, {"window": (2, 1, 4), "grid": (3, 4, 5)}),
    (60, {"window": (0, 3, 1), "grid": (1, 12, 5)}),
    (60, {"window": (2, 0, 0), "grid": (60, 1, 1)}),
    (61, {"window": (9,), "suffix": 5}),
    (96, {"window": (2, 3), "grid": (7, 9), "suffix": 33}),
    (70, {"window": (1, 0), "grid": (7, 7), "prefix": 17, "suffix": 4}),
    (100, {"window": (1, 2, 3), "grid": (3, 5, 5), "prefix": 16, "suffix": 9}),
]


def triton(block: tuple[int, int] | None = None) -> Ops:
    """Return the kernels as functions with the arguments of the ops; `block` is (queries, keys) of a tile."""
    from dit_rewrite.kernels.window_attention.launch import Tile, launch_refresh, launch_reuse

    tile = None if block is None else Tile(*block)

    def arguments(
        query: Tensor, window: Any, grid: Any = None, prefix: int = 0, attn_mask: Any = None, scale: Any = None,
        suffix: int = 0,
    ):  # fmt: skip
        return make_window("test", query.shape[2], window, grid, prefix, suffix), attn_mask, scale

    def refresh(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return launch_refresh(query, key, value, *arguments(query, *args, **kwargs), tile=tile)

    def reuse(
        query: Tensor, key: Tensor, value: Tensor, residual: Tensor, *args: Any, subtract: bool = False, **kwargs: Any
    ) -> Tensor:
        return launch_reuse(query, key, value, residual, *arguments(query, *args, **kwargs), subtract, tile=tile)

    return refresh, reuse


OPS = {"op": (window_refresh, window_reuse), "16x32": triton((16, 32))}


@functools.cache
def visible(
    tokens: int, window: tuple[int, ...], grid: tuple[int, ...] | None = None, prefix: int = 0, suffix: int = 0
) -> Tensor:
    """Return which keys are in the window of each query, from a loop over all pairs."""
    places = list(itertools.product(*map(range, grid or (tokens - prefix - suffix,))))
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        seen[prefix + i, prefix + j] = all(abs(x - y) <= w for x, y, w in zip(a, b, window, strict=True))
    return seen


def expected(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **where: Any
) -> tuple[Tensor, Tensor]:
    """Compute O and W in float64; fully masked rows are 0."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.where(attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    near = scores.where(visible(query.shape[2], **where).to(query.device), -math.inf)
    out, window = ((s.softmax(-1).where((s > -math.inf).any(-1, keepdim=True), 0) @ value) for s in (scores, near))
    return out, window


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def qkv(tokens: int, size: int = 16, batch: int = 1, heads: int = 2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v (batch, heads, tokens, size) as views of one fused projection."""
    query, key, value = random(batch, tokens, 3, heads, size, **options).unbind(2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def close(result: Tensor, reference: Tensor, tolerance: float) -> bool:
    return bool(((result.double() - reference).abs() <= tolerance * (1 + reference.abs())).all())
