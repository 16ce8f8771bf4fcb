"""Sizes that depend on data, through Inductor: text tokens selected by a mask, packed sequences, routed tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import dit_rewrite
from dit_rewrite.errors import RefusalReason
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA

WIDTH, TOKENS, TEXT = 16, 8, 10


class Block(nn.Module):
    """Attention and an MLP, both gated by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gates = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        first, second = self.gates(time)[:, None].chunk(2, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + first * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + second * self.mlp(self.norm(x))


def selected(model: Selecting, x: Tensor, text: Tensor, mask: Tensor, time: Tensor) -> Tensor:
    """Only the valid text tokens of one prompt follow the latent's tokens."""
    y = torch.cat([x[:1], text[:1][mask[:1]][None]], 1)
    for block in model.blocks:
        y = block(y, time[:1])
    return y[:, :TOKENS].expand(2, -1, -1)


def reordered(model: Selecting, x: Tensor, text: Tensor, mask: Tensor, time: Tensor) -> Tensor:
    """Valid tokens first, then the others, zeroed: a length that sums two counts and differs between samples."""
    ordered = [torch.cat([part[m], torch.zeros_like(part[~m])]) for part, m in zip(text, mask, strict=True)]
    y = torch.cat([x, torch.stack(ordered)], 1)
    for block in model.blocks:
        y = block(y, time)
    return y[:, :TOKENS]


def packed(model: Selecting, x: Tensor, text: Tensor, mask: Tensor, time: Tensor) -> Tensor:
    """The valid latent tokens of all samples in one sequence."""
    valid = mask[:, :TOKENS]
    y = x[valid][None]
    for block in model.blocks:
        y = block(y, time[:1])
    return torch.zeros_like(x).masked_scatter(valid[..., None], y[0])


def routed(model: Selecting, x: Tensor, text: Tensor, mask: Tensor, time: Tensor) -> Tensor:
    """Each token goes through one of two experts; the latent decides how many go through each."""
    for block in model.blocks:
        x = block(x, time)
        flat = x.flatten(0, 1)
        found, choice = torch.zeros_like(flat), flat[:, 0] > 0
        for scale, chosen in ((1.0, choice), (1.5, ~choice)):
            index = chosen.nonzero().squeeze(1)
            found = found.index_copy(0, index, scale * block.mlp(flat[index]))
        x = x + found.view_as(x)
    return x


def ragged(model: Selecting, x: Tensor, text: Tensor, mask: Tensor, time: Tensor) -> Tensor:
    """Only the latent's large tokens are processed, behind the text: the length of the stream differs between steps."""
    valid = x[..., 0] > 0
    y = torch.cat([text[:1], x[valid][None]], 1)
    for block in model.blocks:
        y = block(y, time[:1])
    return torch.zeros_like(x).masked_scatter(valid[..., None], y[0, TEXT:])


class Selecting(nn.Module):
    """Two blocks; `mode` selects the tokens that they process."""

    def __init__(self, mode: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.embed, self.time, self.caption = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(6, WIDTH)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 4)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        time = self.time(timestep[:, None] / 1000)
        return self.head(self.mode(self, self.embed(hidden_states), self.caption(text), mask, time))


def calls(steps: int) -> list[dict[str, Tensor]]:
    generator = Generator().manual_seed(1)
    start, move = (torch.randn(2, TOKENS, 4, generator=generator) for _ in range(2))
    text = torch.randn(2, TEXT, 6, generator=generator)
    mask = torch.arange(TEXT) < torch.tensor([[6], [7]])
    return [
        {"hidden_states": start + 0.05 * i * move, "timestep": torch.full((2,), 900.0 - 100 * i), "text": text,
         "mask": mask}
        for i in range(steps)
    ]  # fmt: skip


def run(mode: Callable[..., Tensor], **options: Any) -> tuple[Any, list[float]]:
    """The model after four steps of FORA(2), and its relative error at each step."""
    model = Selecting(mode)
    plain = copy.deepcopy(model)
    rewritten = dit_rewrite.compile(twin(model), FORA(2), **options)
    errors = []
    with torch.no_grad(), rewritten.trajectory(4):
        for kwargs in calls(4):
            expected = plain(**kwargs)
            errors.append(float((rewritten(**kwargs) - expected).abs().max() / expected.abs().max()))
    return rewritten, errors


@pytest.mark.parametrize(
    ("mode", "lowering"),
    [
        (selected, "variants"),
        (reordered, "segments"),
        pytest.param(selected, "segments", marks=pytest.mark.slow),
        pytest.param(reordered, "variants", marks=pytest.mark.slow),
    ],
)
def test_a_value_is_reused_whose_size_is_a_sum_of_counts(mode: Callable[..., Tensor], lowering: str) -> None:
    model, errors = run(mode, lowering=lowering)
    assert (model.stats().computed, model.stats().reused) == (2 * 4, 2 * 4)
    assert errors[0] < 1e-6 and errors[2] < 1e-6
    assert 1e-4 < errors[1] < 0.1 and 1e-4 < errors[3] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mode", [packed, routed])
def test_a_value_is_reused_whose_size_is_a_count_or_that_only_passes_one(mode: Callable[..., Tensor]) -> None:
    model, errors = run(mode, lowering="variants")
    sites = {packed: 4, routed: 6}[mode]
    assert (model.stats().computed, model.stats().reused) == (2 * sites, 2 * sites)
    assert errors[0] < 1e-6 and errors[2] < 1e-6


def test_a_value_is_refused_whose_size_the_latent_decides() -> None:
    """The token counts differ from step to step: no value of one step fits another."""
    with pytest.warns(UserWarning, match="reaches no site"):
        model, errors = run(ragged, backend="aot_eager")
    assert max(errors) == 0
    assert model.stats().reused == 0
    assert [refusal.reason for refusal in model.explain().refused].count(RefusalReason.MOVING_SIZE) == 4
