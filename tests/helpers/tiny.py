"""A denoiser of two blocks that compiles in a second, trajectories for it, and FORA by module hooks.

Each block adds a self-attention and an MLP, both gated by the time and the condition: two sites of each kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from dit_rewrite import RewrittenModule, compile
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA
from dit_rewrite.policy.rules import Policy
from examples.stdit import sincos
from tests.helpers.broken import BrokenAttention
from tests.helpers.drawn import falling, latents, prepare
from tests.references.fora import ModuleCache, computes

WIDTH, CHANNELS = 16, 4
SITES = 4


class TinyBlock(nn.Module):
    """Pre-norm attention and MLP, each with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = BrokenAttention(WIDTH, 2)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.gates = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        first, second = self.gates(signal)[:, None].chunk(2, dim=-1)
        x = x + first * self.attn(self.norm(x))
        return x + second * self.mlp(self.norm(x))


class TinyDiT(nn.Module):
    """Two blocks over the tokens, with a time and a condition, one vector per sample each."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList(TinyBlock() for _ in range(layers))
        self.head = nn.Linear(WIDTH, CHANNELS)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        signal = sincos(timestep, WIDTH).to(hidden_states.dtype) + condition
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x, signal)
        return self.head(x)


class Patched(nn.Module):
    """The tiny denoiser of an image, which it cuts into patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.body = nn.Conv2d(3, CHANNELS, 2, 2), TinyDiT()

    def forward(self, latent: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.body(self.patches(latent).flatten(2).transpose(1, 2), timestep, condition)


def build(layers: int = 2) -> TinyDiT:
    """Return the model, seeded, in eval mode and without gradients."""
    model = TinyDiT(layers)
    prepare(model, torch.float32)
    return model


def rewritten(model: nn.Module, policy: Policy | None = None, **options: Any) -> RewrittenModule:
    """Compile a twin of the model with FORA(3) or another policy, and run its graphs in eager mode.

    There are no step tables by default, since rows that are computed in a batch may be rounded differently.
    """
    options.setdefault("disable_passes", ("step_tables",))
    return compile(twin(model), FORA(3) if policy is None else policy, backend="aot_eager", **options)


def condition(seed: int = 0) -> Tensor:
    """Return the condition of both samples."""
    return torch.randn(2, WIDTH, generator=Generator().manual_seed(1000 + seed))


def calls(steps: int, seed: int = 0, given: Tensor | None = None, tokens: int = 8) -> list[dict[str, Any]]:
    """Return the calls of a trajectory: a latent path, falling timesteps, one condition (`given`, or from the seed)."""
    given = condition(seed) if given is None else given
    path = latents((tokens, CHANNELS), steps, torch.float32, Generator().manual_seed(seed))
    return [
        {"hidden_states": latent, "timestep": timestep, "condition": given}
        for latent, timestep in zip(path, falling(steps), strict=True)
    ]


@torch.no_grad()
def outputs(model: Any, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """Return copies of a model's outputs at each call."""
    return [model(**arguments).clone() for arguments in inputs]


def fora(model: TinyDiT, inputs: list[dict[str, Any]], interval: int = 3) -> list[Tensor]:
    """Return the model's outputs under FORA, from the first call on."""
    results = []
    with torch.no_grad(), ModuleCache(part for b in model.blocks for part in (b.attn, b.mlp)) as cache:
        for step, arguments in enumerate(inputs):
            cache.reuse = not computes(step, len(inputs), interval, "start")
            results.append(model(**arguments))
    return results


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether two runs are equal bit for bit at every step."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def row(model: RewrittenModule, last: int) -> str:
    """Return the last calls in letters: C if all sites computed, R if all were reused, ? for a mixture."""
    letters = {frozenset({"compute"}): "C", frozenset({"reuse"}): "R"}
    recent = model.stats().decisions[-last:]
    return "".join(letters.get(frozenset(decision.strategies.values()), "?") for decision in recent)
