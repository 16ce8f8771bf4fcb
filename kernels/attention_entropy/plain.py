"""The entropy of attention in plain PyTorch: the mathematics, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels import scores

ROWS = 128  # queries at a time: no matrix of all scores is made


def attention_entropy(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """The mean over all rows i that see a key of -sum_j A_ij log A_ij, where A = softmax(query key^T scale + mask)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    transposed = key.to(dtype).mT * scores.default_scale(query, scale)
    shape = (*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2])
    mask = None if attn_mask is None else attn_mask.expand(shape)
    sums = torch.zeros(2, dtype=torch.float64, device=query.device)
    for start in range(0, query.shape[-2], ROWS):
        rows = slice(start, start + ROWS)
        block = scores.masked(query[..., rows, :].to(dtype) @ transposed, None if mask is None else mask[..., rows, :])
        sums += _entropy_and_count(block.masked_fill(_later(block, start), -torch.inf) if is_causal else block)
    return (sums[0] / sums[1]).float()


def _later(block: Tensor, start: int) -> Tensor:
    """Which keys come after the query, the first row being query `start`."""
    return torch.ones_like(block, dtype=torch.bool).triu(start + 1)


def _entropy_and_count(block: Tensor) -> Tensor:
    """The sum of the rows' entropies in nats, and the number of rows that have one."""
    seen = ~scores.without_keys(block).squeeze(-1)
    entropies = torch.special.entr(block.softmax(-1)).sum(-1)  # entr(0) = 0
    return torch.stack([entropies.where(seen, 0).double().sum(), seen.double().sum()])
