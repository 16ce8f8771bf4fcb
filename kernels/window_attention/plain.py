"""Window attention with a residual in plain PyTorch: the mathematics, and what runs on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dit_rewrite.kernels import scores
from dit_rewrite.kernels.window_attention.geometry import Window

ROWS = 128  # queries at a time: no matrix of all scores is made


def window_refresh(
    query: Tensor, key: Tensor, value: Tensor, window: Window, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """DiTFastAttn's equation 1: O = Attention(Q, K, V), W = WindowAttention(Q, K, V), R = O - W."""
    out, residual = torch.empty_like(query), torch.empty_like(query)
    query, key, value, mask = _prepare(query, key, value, attn_mask, scale)
    for rows, seen in _blocks(query, window):
        block = scores.masked(query[:, :, rows] @ key.mT, None if mask is None else mask[:, :, rows])
        full = _attend(block, value)
        out[:, :, rows] = full
        residual[:, :, rows] = full - _attend(block.masked_fill(~seen, -math.inf), value)
    return out, residual


def window_reuse(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Window, attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """DiTFastAttn's equation 2: O' = WindowAttention(Q, K, V) + R. Keys that no row of a block sees are left out."""
    out = torch.empty_like(query)
    query, key, value, mask = _prepare(query, key, value, attn_mask, scale)
    for rows, seen in _blocks(query, window):
        cols = seen.any(0).nonzero().squeeze(-1)
        block = query[:, :, rows] @ key[:, :, cols].mT
        block = scores.masked(block, None if mask is None else mask[:, :, rows][..., cols])
        near = _attend(block.masked_fill(~seen[:, cols], -math.inf), value[:, :, cols])
        out[:, :, rows] = near + residual[:, :, rows].to(near.dtype)
    return out


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Operands in float32 at least, the query scaled; the mask as it expands to the scores."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    return query.to(dtype) * scores.default_scale(query, scale), key.to(dtype), value.to(dtype), wide


def _blocks(query: Tensor, window: Window) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries, and which keys each of them sees."""
    tokens = torch.arange(query.shape[2], device=query.device)
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, window.sees(tokens[rows, None], tokens)


def _attend(block: Tensor, value: Tensor) -> Tensor:
    """softmax(scores) @ value; zero for a row that sees no key."""
    return block.softmax(-1).masked_fill(scores.without_keys(block), 0) @ value
