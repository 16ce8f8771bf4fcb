"""Naive reference of window attention with a residual in PyTorch; the ops run it on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dit_rewrite.kernels.common import scores
from dit_rewrite.kernels.window_attention.geometry import Window

ROWS = 128  # queries per block, so that the full score matrix is never allocated


def window_refresh(
    query: Tensor, key: Tensor, value: Tensor, window: Window, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return O = Attention(Q, K, V) and R = O - WindowAttention(Q, K, V) (DiTFastAttn, equation 1)."""
    out, residual = torch.empty_like(query), torch.empty_like(query)
    query, key, value, mask = _prepare(query, key, value, attn_mask, scale)
    for rows, seen in _blocks(query, window):
        block = scores.apply_mask(query[:, :, rows] @ key.mT, None if mask is None else mask[:, :, rows])
        full = _attend(block, value)
        out[:, :, rows] = full
        residual[:, :, rows] = full - _attend(block.masked_fill(~seen, -math.inf), value)
    return out, residual


def window_reuse(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, window: Window, attn_mask: Tensor | None,
    scale: float | None, subtract: bool = False,
) -> Tensor:  # fmt: skip
    """Return R + WindowAttention(Q, K, V) (DiTFastAttn, equation 2), or R - WindowAttention with `subtract`.

    A block skips keys outside all its windows.
    """
    out = torch.empty_like(query)
    query, key, value, mask = _prepare(query, key, value, attn_mask, scale)
    for rows, seen in _blocks(query, window):
        cols = seen.any(0).nonzero().squeeze(-1)
        block = query[:, :, rows] @ key[:, :, cols].mT
        block = scores.apply_mask(block, None if mask is None else mask[:, :, rows][..., cols])
        near = _attend(block.masked_fill(~seen[:, cols], -math.inf), value[:, :, cols])
        out[:, :, rows] = residual[:, :, rows].to(near.dtype) + (-near if subtract else near)
    return out


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Convert the operands to at least float32, scale the query, and expand the mask to the shape of the scores."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    return query.to(dtype) * scores.default_scale(query, scale), key.to(dtype), value.to(dtype), wide


def _blocks(query: Tensor, window: Window) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of queries, and which keys are in the window of each query."""
    tokens = torch.arange(query.shape[2], device=query.device)
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, window.sees(tokens[rows, None], tokens)


def _attend(block: Tensor, value: Tensor) -> Tensor:
    """Return softmax(scores) @ value; fully masked rows give 0."""
    return block.softmax(-1).masked_fill(scores.fully_masked_rows(block), 0) @ value
