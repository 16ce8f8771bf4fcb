"""The same window attention by FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dit_rewrite.kernels.window_attention.geometry import make_window


def flex_window(
    tokens: int, window: Sequence[int], grid: Sequence[int] | None = None, prefix: int = 0, device: str = "cuda",
    suffix: int = 0, scale: float | None = None, compiled: bool = True,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
    """Return a function of query, key and value, each (B, H, N, d), that computes window attention W."""
    shape = make_window("flex_window", tokens, window, grid, prefix, suffix)

    def visible(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return shape.sees(row, col)

    mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
    run: Callable[..., Tensor] = flex_attention
    if compiled:
        run = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda query, key, value: run(query, key, value, block_mask=mask, scale=scale)
