"""A model whose tensors change at known rates from step to step.

Channel 0 of the stream is the latent's number, which nothing writes to. MLP i adds ``rates[i]`` times that number to a
channel of its own. The attention, whose queries are zero so that it averages its values, has keys and values that are
that number times a rate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, TOKENS, HEADS = 8, 4, 2
RATES = (1.0, 0.5, 3.0)
KEY_RATE, VALUE_RATE = 2.0, 4.0


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(4))
        for layer, rate in ((self.q, 0.0), (self.k, KEY_RATE), (self.v, VALUE_RATE)):
            layer.weight.data.zero_()
            layer.weight.data[:, 0] = rate
        self.out.weight.data.zero_()
        self.out.weight.data[CHANNELS - 1, 0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, channel: int, rate: float) -> None:
        super().__init__()
        self.mlp = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.mlp.weight.data.zero_()
        self.mlp.weight.data[channel, 0] = rate

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Planted(nn.Module):
    """An attention block, and a block for each rate."""

    def __init__(self, rates: tuple[float, ...] = RATES) -> None:
        super().__init__()
        self.attn = _Attention()
        self.blocks = nn.ModuleList(_Block(1 + i, rate) for i, rate in enumerate(rates))
        self.eval().requires_grad_(False)

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        x = latent + self.attn(latent)
        for block in self.blocks:
            x = block(x)
        return x


def numbers(steps: int, seed: int = 0) -> list[float]:
    """The number of each step: it falls by 1, 2, 3, …, and by more for a larger seed."""
    falls = [(1 + seed) * step for step in range(steps)]
    return [10.0 * (1 + seed) * steps - sum(falls[: step + 1]) for step in range(steps)]


def planted_calls(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """The calls of a trajectory."""
    calls = []
    for step, number in enumerate(numbers(steps, seed)):
        latent = torch.zeros(2, TOKENS, CHANNELS)
        latent[..., 0] = number
        calls.append({"latent": latent, "timestep": torch.tensor([float(steps - step)] * 2)})
    return calls
