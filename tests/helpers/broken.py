"""A model with a graph break in each block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from examples.stdit import sincos
from tests.helpers.drawn import assemble, falling, latents, prepare
from tests.helpers.models import Case


class BrokenAttention(nn.Module):
    """Self-attention. The graph break is in its block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class BrokenBlock(nn.Module):
    """Pre-norm attention and MLP with a graph break between them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = BrokenAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        torch._dynamo.graph_break()
        return x + self.mlp(self.norm2(x))


class BrokenTransformer(nn.Module):
    """Identical blocks, each with a graph break; the timestep is added to the tokens."""

    def __init__(self, layers: int, channels: int = 8, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.time = nn.Linear(width, width)
        self.blocks = nn.ModuleList(BrokenBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        time = sincos(timestep, self.time.in_features).to(hidden_states.dtype)
        x = self.embed(hidden_states) + self.time(time)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def broken_blocks(layers: int = 6) -> Case:
    """Identical pre-norm blocks with a graph break in each, so that captured graphs serve several blocks."""

    def build(dtype: torch.dtype = torch.float32) -> nn.Module:
        return prepare(BrokenTransformer(layers), dtype)

    def calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
        generator = Generator().manual_seed(seed)
        return assemble({}, hidden_states=latents((16, 8), steps, dtype, generator), timestep=falling(steps))

    return Case("broken_blocks", build, calls, {"self": layers, "mlp": layers})
