"""Branches that are computed for some tiles of tokens, on PixArt at toy size: values, FLOPs, and what is refused."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.errors import RefusalReason
from dit_rewrite.guards import step
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.policies import TileReuse
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import BlockwiseReuse, Forecast, GuidanceDelta, Reuse, ReuseTiles, ShareGuidance
from dit_rewrite.policy.where import Where
from tests.helpers import tiny
from tests.helpers.models import MODELS, output

STEPS, TOKENS, TILE = 6, 16, 4
CASE = MODELS["pixart_alpha"]


def rewritten(model: nn.Module, policy: Policy, **options: Any) -> RewrittenModule:
    compiled: RewrittenModule = dit_rewrite.compile(twin(model), policy, backend="aot_eager", **options)
    return compiled


@torch.no_grad()
def run(model: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    return [output(model(**arguments)).clone() for arguments in calls]


class Tiled:
    """A hook on a cross-attention that keeps its output, and lets one tile of each call through, in turn."""

    def __init__(self) -> None:
        self.held, self.turn = torch.empty(0), 0

    def __call__(self, module: nn.Module, inputs: Any, computed: Tensor) -> Tensor:
        if not self.held.numel():
            self.held = computed.clone()
            return computed
        tile = slice(self.turn * TILE, (self.turn + 1) * TILE)
        self.held[:, tile] = computed[:, tile]
        self.turn = (self.turn + 1) % (TOKENS // TILE)
        return self.held.clone()


def test_tiles_take_turns() -> None:
    """The outputs are those of an eager model whose attentions keep the other tiles' outputs."""
    model, calls = CASE.build(), CASE.inputs(STEPS)
    found = run(rewritten(model, TileReuse(0.25)), calls)
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.attn2.register_forward_hook(Tiled())
    expected = run(model, calls)
    assert all(torch.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(found, expected, strict=True))
    exact = run(CASE.build(), calls)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found[1:], exact[1:], strict=True))


@pytest.mark.parametrize("order", ["turns", "change"])
def test_all_tiles_are_exact(order: Literal["turns", "change"]) -> None:
    model, calls = CASE.build(), CASE.inputs(3)
    compiled = rewritten(model, TileReuse(1.0, order=order))
    assert all(map(torch.equal, run(compiled, calls), run(model, calls)))
    assert compiled.stats().reused == 6


@pytest.mark.parametrize("lowering", ["variants", "segments"])
@pytest.mark.parametrize("order", ["turns", "change"])
def test_verify(order: Literal["turns", "change"], lowering: str) -> None:
    """Against an interpreter that computes all tokens."""
    policy = TileReuse(0.25, order=order, kinds=("mlp",))
    found = dit_rewrite.verify(tiny.build(), tiny.calls(STEPS), policy, backend="aot_eager", lowering=lowering)
    assert found.passed and found.reused == 2 * (STEPS - 1)


def test_verify_pixart() -> None:
    policy = TileReuse(0.5, order="change", kinds=("cross", "mlp"))
    found = dit_rewrite.verify(CASE.build(), CASE.inputs(4), policy, backend="aot_eager", lowering="segments")
    assert found.passed and found.reused == 2 * 3 * 3


@pytest.mark.parametrize(("refresh", "share"), [(0.25, 0.25), (0.3, 0.5), (1.0, 1.0)])
def test_flops(refresh: float, share: float) -> None:
    """A step computes the projections and the attention of its share of the tokens: 4 of 16, or 2 tiles of 4."""
    model, calls = CASE.build(), CASE.inputs(2)
    compiled = rewritten(model, TileReuse(refresh))
    run(compiled, calls)
    (graph,) = compiled._backend.rewritten
    rows = [(reuse,) * len(graph.reached) for reuse in (False, True)]
    full, some = (cost.total_flops(graph.straight(row).gm.graph) for row in rows)
    projections, attention = 2 * 2 * TOKENS * 48 * 48 * 2, 2 * 2 * 2 * 3 * TOKENS * 6 * 16
    assert full - some == 3 * (projections + attention) * (1 - share)
    assert all(graph.found.sites[i].part is Part.TILES for i in graph.reached)


def test_what_mixes_tokens_is_refused() -> None:
    """Self-attention and joint attention compute, and the report says why."""
    model, calls = CASE.build(), CASE.inputs(3)
    compiled = rewritten(model, TileReuse(kinds=("self", "cross")))
    run(compiled, calls)
    (graph,) = compiled._backend.rewritten
    refused = {refusal.path for refusal in graph.found.refused if refusal.reason is RefusalReason.MIXES_TOKENS}
    assert refused == {f"transformer_blocks.{i}.attn1.tiles" for i in range(3)}
    assert str(RefusalReason.MIXES_TOKENS) in str(compiled.explain())
    joint = MODELS["sd3"]
    model, calls = joint.build(), joint.inputs(3)
    compiled = rewritten(model, TileReuse(kinds=("joint",)))
    assert all(map(torch.equal, run(compiled, calls), run(model, calls)))
    assert compiled.stats().reused == 0 and str(RefusalReason.MIXES_TOKENS) in str(compiled.explain())


def test_a_number_of_tokens_that_is_not_constant() -> None:
    """The tiles would be of another size in each call."""
    compiled = rewritten(tiny.build(), TileReuse(kinds=("mlp",)), dynamic=True)
    tiny.outputs(compiled, tiny.calls(3))
    assert compiled.stats().reused == 0 and str(RefusalReason.NO_TOKENS) in str(compiled.explain())


def test_each_picture_has_its_own_tiles() -> None:
    """A second trajectory begins anew, and gives the same as in a new model."""
    first, second = tiny.calls(4), tiny.calls(4, seed=1)
    compiled = rewritten(tiny.build(), TileReuse(0.5, 2, "change", ("mlp",)))
    found = [tiny.outputs(compiled, calls) for calls in (first, second, first)]
    alone = rewritten(tiny.build(), TileReuse(0.5, 2, "change", ("mlp",)))
    assert tiny.same(found[0], found[2]) and tiny.same(found[1], tiny.outputs(alone, second))
    assert not tiny.same(found[0], tiny.outputs(tiny.build(), first))


def test_through_inductor() -> None:
    """The slot is written in place by compiled code, in fp32, with no variant but the two."""
    calls = tiny.calls(9)
    models = [
        dit_rewrite.compile(tiny.build(1), TileReuse(0.25, 2, order, ("mlp",)), backend=backend)
        for order in ("turns", "change")
        for backend in ("inductor", "aot_eager")
    ]
    found = [tiny.outputs(model, calls) for model in models]
    for a, b in (found[:2], found[2:]):
        assert all(torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(a, b, strict=True))
    assert not torch.allclose(found[0][-1], found[2][-1], rtol=0, atol=1e-5)
    assert {(model.stats().reused, model.stats().late_variants) for model in models} == {(8, 0)}


@pytest.mark.parametrize(
    ("later", "reused"),
    [(Reuse(), 12), (Forecast(1), 12), (ShareGuidance("first"), 8)],
    ids=["reuse", "forecast", "share"],
)
def test_with_other_strategies_at_the_same_branch(later: Any, reused: int) -> None:
    """A slot of the whole branch has its own copy of a value that later tiles are written into."""
    kinds = Where(("self",) if isinstance(later, ShareGuidance) else ("mlp",))
    tiles = Rule((step > 0) & (step < 3), ReuseTiles(0.5), Where(("mlp",)))
    policy = Policy((tiles, Rule(step >= 3, later, kinds)))
    found = dit_rewrite.verify(tiny.build(), tiny.calls(5), policy, backend="aot_eager")
    assert found.passed and found.reused == reused


@pytest.mark.parametrize(("kind", "do"), [("mlp", ReuseTiles(0.5)), ("self", BlockwiseReuse(0.1))])
def test_within_half_of_a_batch(kind: str, do: Any) -> None:
    """State of the whole batch cannot be halved, so the rule for half of the model is the one that applies."""
    rules = (
        Rule((step > 0) & (step < 2), do, Where((kind,))),
        Rule(step >= 2, GuidanceDelta("first"), Where(span="output")),
    )
    case = MODELS["dit"]
    compiled = rewritten(case.build(), Policy(rules))
    run(compiled, case.inputs(3))
    assert compiled.stats().reused == 1 and str(RefusalReason.WITHIN_HALF) in str(compiled.explain())
