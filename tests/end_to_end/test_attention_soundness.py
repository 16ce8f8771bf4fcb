"""Blockwise reuse must prove that the mask and the keys and values are the same in every call before it relies on
them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import dit_rewrite
from dit_rewrite import BlockwiseReuse, Policy, Rule, Where
from dit_rewrite.errors import RefusalReason
from dit_rewrite.guards import step
from dit_rewrite.module import twin

POLICY = Policy((Rule(step > 0, BlockwiseReuse(0.05, 4), Where(("cross",))),))
STEPS, TEXT = 4, 12


class Masked(nn.Module):
    """Cross-attention under a mask that hides the first text tokens; if it `moves`, the time decides how many."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moves = moves
        self.embed, self.query, self.key_value = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(16, 64)
        self.out = nn.Linear(32, 4)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        q, k, v = (
            y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (self.query(x), *self.key_value(text).chunk(2, -1))
        )
        time = timestep if self.moves else torch.full_like(timestep, 500.0)
        mask = (torch.arange(TEXT) >= (time[:, None] * TEXT / 1000).floor())[:, None, None]
        return self.out(x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def calls() -> list[dict[str, Tensor]]:
    generator = Generator().manual_seed(1)
    start, move, text = (torch.randn(2, n, c, generator=generator) for n, c in ((8, 4), (8, 4), (TEXT, 16)))
    return [
        {"hidden_states": start + 0.001 * i * move, "timestep": torch.full((2,), 900.0 - 200 * i), "text": text}
        for i in range(STEPS)
    ]


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_a_mask_that_stays_is_reused_under() -> None:
    """A mask that depends only on the time's shape is trajectory-invariant; reused blocks leave a small error."""
    model = Masked(moves=False)
    plain = copy.deepcopy(model)
    rewritten = dit_rewrite.compile(twin(model), POLICY, backend="aot_eager")
    with rewritten.trajectory(STEPS):
        errors = [largest_error(rewritten(**kwargs), plain(**kwargs)) for kwargs in calls()]
    assert errors[0] == 0 and 0 < max(errors) < 1e-3
    assert rewritten.stats().reused == 2 * (STEPS - 1), "the core and its state"


@torch.no_grad()
def test_a_mask_that_depends_on_the_step_is_refused() -> None:
    model = Masked(moves=True)
    plain = copy.deepcopy(model)
    rewritten = dit_rewrite.compile(twin(model), POLICY, backend="aot_eager")
    with pytest.warns(UserWarning, match="reaches no site"), rewritten.trajectory(STEPS):
        errors = [largest_error(rewritten(**kwargs), plain(**kwargs)) for kwargs in calls()]
    assert max(errors) == 0
    assert RefusalReason.MOVING_MASK in {refusal.reason for refusal in rewritten.explain().refused}


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_text_that_is_replaced_in_a_named_stream_is_attended_to(in_place: bool) -> None:
    """The keys and values of the old text are not used again, whether its tensor was replaced or overwritten in
    place."""
    model = Masked(moves=False)
    plain = copy.deepcopy(model)
    rewritten = dit_rewrite.compile(twin(model), POLICY, backend="aot_eager")
    errors = []
    with rewritten.trajectory(STEPS), rewritten.cache_context("cond"):
        for i, kwargs in enumerate(calls()):
            if i == 2:
                other = torch.randn(2, TEXT, 16, generator=Generator().manual_seed(7))
                kwargs["text"] = kwargs["text"].copy_(other) if in_place else other
            elif i == 3:
                kwargs["text"] = kwargs["text"] if in_place else other
            errors.append(largest_error(rewritten(**kwargs), plain(**kwargs)))
    assert errors[2] == 0 and max(errors) < 1e-3
    assert rewritten.stats().reused == 2 * 2
