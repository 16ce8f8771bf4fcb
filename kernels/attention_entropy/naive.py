"""Naive reference of the attention entropy in PyTorch; the op runs it on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels.common import scores

ROWS = 128  # queries per block, so that the full score matrix is never allocated


def attention_entropy(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """Return the mean of -sum_j A_ij log A_ij over all rows i with at least one unmasked key, in nats.

    A = softmax(query key^T scale + mask). The result is a 0-d float32 tensor.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    transposed = key.to(dtype).mT * scores.default_scale(query, scale)
    shape = (*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2])
    mask = None if attn_mask is None else attn_mask.expand(shape)
    sums = torch.zeros(2, dtype=torch.float64, device=query.device)
    for start in range(0, query.shape[-2], ROWS):
        rows = slice(start, start + ROWS)
        block = scores.apply_mask(
            query[..., rows, :].to(dtype) @ transposed, None if mask is None else mask[..., rows, :]
        )
        sums += _entropy_and_count(block.masked_fill(_later(block, start), -torch.inf) if is_causal else block)
    return (sums[0] / sums[1]).float()


def _later(block: Tensor, start: int) -> Tensor:
    """Return the causal mask of a block whose first row is query `start`: True for keys after the query."""
    return torch.ones_like(block, dtype=torch.bool).triu(start + 1)


def _entropy_and_count(block: Tensor) -> Tensor:
    """Return the sum of the row entropies in nats and the number of rows that are not fully masked, float64 (2,)."""
    seen = ~scores.fully_masked_rows(block).squeeze(-1)
    entropies = torch.special.entr(block.softmax(-1)).sum(-1)  # entr(0) = 0
    return torch.stack([entropies.where(seen, 0).double().sum(), seen.double().sum()])
