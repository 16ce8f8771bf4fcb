"""CachedAttention restricted to the condition's keys, where image and condition are one sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import dit_rewrite
from dit_rewrite.errors import RefusalReason
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.policies import CachedAttention
from tests.helpers.drawn import prepare
from tests.helpers.models import MODELS, output

INF = math.inf
KINDS = ("self", "joint", "parallel")
STEPS, TEXT, IMAGE = 4, 8, 12


class Unified(nn.Module):
    """Two layers of attention over (text, time, image); the text attends to itself alone, so that its keys stay."""

    def __init__(self, sees_image: bool = False) -> None:
        super().__init__()
        self.text, self.embed, self.head = nn.Linear(16, 32), nn.Linear(4, 32), nn.Linear(32, 4)
        self.qkv, self.out = (nn.ModuleList(nn.Linear(32, n) for _ in range(2)) for n in (96, 32))
        self.sees_image = sees_image
        prepare(self, torch.float32)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        time = (timestep / 1000)[:, None, None].expand(-1, 1, 32)
        x = torch.cat([self.text(text), time, self.embed(hidden_states)], 1)
        place = torch.arange(x.shape[1])
        mask = (place[:, None] >= TEXT) | (place < TEXT) | self.sees_image
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv(x).chunk(3, dim=-1))
            x = x + out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return self.head(x[:, TEXT + 1 :])


def calls() -> list[dict[str, Tensor]]:
    generator = Generator().manual_seed(1)
    shapes = ((IMAGE, 4), (IMAGE, 4), (TEXT, 16))
    start, move, text = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    return [
        {"hidden_states": start + 0.1 * i * move, "timestep": torch.full((2,), 900.0 - 200 * i), "text": text}
        for i in range(STEPS)
    ]


@torch.no_grad()
def run(model: nn.Module, inputs: list[dict[str, Any]], *given: Any, **options: Any) -> tuple[RewrittenModule, float]:
    """The rewritten model after a trajectory, and the largest relative error of its outputs."""
    policy = CachedAttention(*given, kinds=KINDS, keys="condition", **options)
    compiled = dit_rewrite.compile(twin(model), policy, backend="aot_eager")
    with compiled.trajectory(len(inputs)):
        found = [output(compiled(**arguments)).clone() for arguments in inputs]
    expected = [output(model(**arguments)) for arguments in inputs]
    errors = ((a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True))
    return compiled, max(float(error) for error in errors)


def kept(compiled: RewrittenModule) -> list[tuple[int, int]]:
    return [(blocks.kept, blocks.total) for blocks in compiled.stats().kept_blocks.values()]


PAIRS = 2 * 2 * (STEPS - 1)  # batch, heads and reusing steps, of one tile of queries


@pytest.mark.parametrize(("bound", "block", "blocks"), [("paper", 4, 2), ("sound", None, 1), ("sound", 3, 2)])
def test_only_the_conditions_blocks_are_kept(bound: str, block: int | None, blocks: int) -> None:
    """Also under the paper's bound, since the keys of this text do not move; the image's block is always recomputed.

    With it the second layer recomputes once: a step that reuses rounds the first layer's output otherwise than the one
    that computed, so that the keys move by a rounding.
    """
    compiled, error = run(Unified(), calls(), INF, block, bound, certify=True)
    again = PAIRS // (STEPS - 1) * blocks if bound == "paper" else 0
    assert kept(compiled) == [(PAIRS * blocks - less, PAIRS * (blocks + 1)) for less in (0, again)]
    assert error > 1e-4 and all(certificate.bound < INF for certificate in compiled.stats().certificates)
    compiled, error = run(Unified(), calls(), -INF, block, bound)
    assert kept(compiled) == [(0, PAIRS * (blocks + 1))] * 2 and error < 1e-5


def test_the_papers_bound_keeps_nothing_that_moved() -> None:
    """A text that attends to the image stays at the first layer alone."""
    compiled, _ = run(Unified(sees_image=True), calls(), INF, None, "paper")
    assert kept(compiled) == [(PAIRS, 2 * PAIRS), (0, 2 * PAIRS)]
    compiled, _ = run(Unified(sees_image=True), calls(), INF, None, "sound")
    assert kept(compiled) == [(PAIRS, 2 * PAIRS)] * 2


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_named_models(name: str) -> None:
    """The text stream of joint attention, behind the image in SD3 and before it in FLUX, in all blocks."""
    case = MODELS[name]
    model, inputs = case.build(), case.inputs(3)
    compiled, error = run(model, inputs, INF, 3)
    fractions = [blocks.fraction for blocks in compiled.stats().kept_blocks.values()]
    assert fractions == [pytest.approx(2 / 3)] * (3 if name == "sd3" else 4) and error > 1e-3
    assert run(model, inputs, 0.0, 3)[1] < 1e-5


def test_without_a_condition_the_strategy_is_refused() -> None:
    case = MODELS["dit"]
    compiled, error = run(case.build(), case.inputs(2), INF)
    assert error == 0 and kept(compiled) == []
    assert str(RefusalReason.NO_CONDITION_KEYS) in str(compiled.explain())
