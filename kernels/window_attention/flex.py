"""The same window attention by FlexAttention, for comparison on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dit_rewrite.kernels.window_attention.geometry import make_window


def flex_window(
    tokens: int, window: Sequence[int], grid: Sequence[int] | None = None, prefix: int = 0, device: str = "cuda"
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a compiled function of query, key and value, each (B, H, N, d), that computes window attention W."""
    shape = make_window("flex_window", tokens, window, grid, prefix)

    def visible(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return shape.sees(row, col)

    mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask)
