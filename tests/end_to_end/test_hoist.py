"""Ops that depend only on the conditioning run once per trajectory: exactly, and again when the conditioning
changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite
from dit_rewrite.errors import RefusalReason
from dit_rewrite.module import twin
from dit_rewrite.passes.rewrite.printing import op_counts
from dit_rewrite.policies import FORA, Never
from dit_rewrite.policy.rules import Policy
from tests.helpers.models import MODELS, output

PIXART = MODELS["pixart_sigma"]
# 3 blocks: K and V of the text in each, and the caption projection's two linears before them
PROJECTIONS = 3 * 2 + 2


def pixart(policy: Policy | None = None, **options: Any) -> tuple[Any, Any]:
    model = PIXART.build()
    return model, dit_rewrite.compile(twin(model), policy or Never(), backend="aot_eager", **options)


def run(model: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    return [output(model(**kwargs)).clone() for kwargs in calls]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("policy", [Never(), FORA(2)], ids=str)
def test_text_projections_leave_every_variant(policy: Policy) -> None:
    """K, V and the caption projection run in the prologue: once per trajectory, and in no step."""
    _, hoisting = pixart(policy)
    _, plain = pixart(policy, disable_passes=("hoist",))
    calls = PIXART.inputs(4)
    for model in (hoisting, plain):
        for _ in range(2):
            with model.trajectory(num_steps=4):
                found = run(model, calls)
    with plain.trajectory(num_steps=4):
        assert same(found, run(plain, calls))
    (ours,), (theirs,) = hoisting.explain().rewritten, plain.explain().rewritten
    computing = min(ours.variants)
    linears = [
        op_counts(variant.gm)["aten.addmm"] for variant in (ours.variants[computing], theirs.variants[computing])
    ]
    assert linears[1] - linears[0] == PROJECTIONS == op_counts(ours.hoisted.prologue)["aten.addmm"]
    assert hoisting.stats().hoists == 2
    assert plain.stats().hoists == 0
    assert theirs.hoisted is None


@torch.no_grad()
def test_hoisting_equals_the_untouched_model() -> None:
    """The policy only hoists, and the outputs are bit-equal."""
    model, rewritten = pixart()
    calls = PIXART.inputs(4)
    assert same(run(rewritten, calls), run(model, calls))


@torch.no_grad()
@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "inferred"])
def test_conditioning_changed_in_place_midway_is_noticed(explicit: bool) -> None:
    """The text is overwritten between two steps: the next steps are computed from the new text."""
    model, rewritten = pixart()
    calls = PIXART.inputs(4)
    with rewritten.trajectory(num_steps=4) if explicit else torch.no_grad():
        before = run(rewritten, calls[:2])
        assert rewritten.stats().hoists == 1
        assert same(before, run(model, calls[:2]))
        calls[0]["encoder_hidden_states"].add_(1.0)
        assert same(run(rewritten, calls[2:]), run(model, calls[2:]))
    assert rewritten.stats().hoists == 2


@torch.no_grad()
def test_each_stream_has_its_own() -> None:
    """Two prompts in one trajectory: one prologue each, and neither reads the other's text."""
    model, rewritten = pixart()
    streams = {"cond": PIXART.inputs(3, seed=0), "uncond": PIXART.inputs(3, seed=1)}
    with rewritten.trajectory(num_steps=3):
        for step in range(3):
            for name, calls in streams.items():
                with rewritten.cache_context(name):
                    assert same(run(rewritten, calls[step : step + 1]), run(model, calls[step : step + 1]))
    assert rewritten.stats().hoists == 2


@pytest.mark.parametrize(("explicit", "hoists"), [(True, 1), (False, 3)], ids=["explicit", "inferred"])
def test_inference_tensors_are_trusted_in_explicit_trajectories_only(explicit: bool, hoists: int) -> None:
    """They have no version counter: outside an explicit trajectory the prologue runs at every call."""
    with torch.inference_mode():
        model, rewritten = pixart()
        calls = PIXART.inputs(3)
        expected = run(model, calls)
        with rewritten.trajectory(num_steps=3) if explicit else torch.no_grad():
            assert same(run(rewritten, calls), expected)
    assert rewritten.stats().hoists == hoists


@torch.no_grad()
def test_conditioning_made_anew_at_each_call_is_computed_anew() -> None:
    """Equal content in other tensors proves nothing for hoisting: only identity does."""
    model, rewritten = pixart()
    calls = [
        {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].clone()} for kwargs in PIXART.inputs(3)
    ]
    with rewritten.trajectory(num_steps=3):
        assert same(run(rewritten, calls), run(model, calls))
    assert rewritten.stats().hoists == 3


@torch.no_grad()
def test_what_is_hoisted_is_reported_and_held() -> None:
    """The report names the modules, their FLOPs and bytes; the cache keeps the bytes as long as the trajectory
    lasts."""
    _, rewritten = pixart()
    run(rewritten, PIXART.inputs(2))
    (line,) = [line for line in str(rewritten.explain()).splitlines() if line.startswith("hoisted")]
    assert "transformer_blocks.2.attn2" in line
    assert rewritten.stats().cache_bytes == rewritten.explain().rewritten[0].hoisted.bytes > 0


class Refined(torch.nn.Module):
    """A residual branch on the text alone, then one on the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.refine, self.branch = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        text = text + self.refine(text)
        x = hidden_states + timestep[:, None, None] * text.mean(1, keepdim=True)
        return x + self.branch(x)


@torch.no_grad()
def test_a_branch_of_the_conditioning_is_hoisted_and_no_site() -> None:
    """A policy does not apply to ops that run once anyway, and the report says so."""
    model = Refined().eval().requires_grad_(False)
    rewritten = dit_rewrite.compile(twin(model), FORA(2), backend="aot_eager")
    text = torch.randn(2, 3, 8)
    calls = [{"hidden_states": torch.randn(2, 4, 8), "timestep": torch.full((2,), 0.5), "text": text}]
    assert torch.equal(rewritten(**calls[0]), model(**calls[0]))
    assert [str(place.site.kind) for place in rewritten.explain().sites] == ["mlp"]
    assert [refusal.reason for refusal in rewritten.explain().refused].count(RefusalReason.TRAJECTORY_INVARIANT) == 1


class Waved(torch.nn.Module):
    """Tokens scaled by the cosine of a projection of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.branch = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = hidden_states * self.project(text).cos() + timestep[:, None, None]
        return x + self.branch(x)


@torch.no_grad()
def test_products_are_handed_over_and_what_follows_them_is_not() -> None:
    """The cosine stays in every step: a kernel of its own could round it differently."""
    rewritten = dit_rewrite.compile(Waved().eval().requires_grad_(False), FORA(2), backend="aot_eager")
    rewritten(torch.randn(2, 4, 8), torch.full((2,), 0.5), torch.randn(2, 4, 8))
    (graph,) = rewritten.explain().rewritten
    assert op_counts(graph.hoisted.prologue)["aten.addmm"] == 1
    assert op_counts(graph.hoisted.prologue)["aten.cos"] == 0
    assert all(op_counts(variant.gm)["aten.cos"] == 1 for variant in graph.variants.values())
