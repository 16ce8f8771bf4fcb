"""CUDA graphs with a live cache on a GPU: each run is the same as without graphs, by Inductor and Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

pytest.importorskip("diffusers")

import dit_rewrite  # noqa: E402
from dit_rewrite import Policy, Rule, ShareGuidance, Where, WindowResidual  # noqa: E402
from dit_rewrite.errors import GraphReason  # noqa: E402
from dit_rewrite.module import RewrittenModule, twin  # noqa: E402
from dit_rewrite.policies import FORA, FirstBlockCache, TaylorSeer  # noqa: E402
from tests.end_to_end.test_cuda_graphs import LATER  # noqa: E402
from tests.helpers.models import MODELS, output  # noqa: E402
from tests.helpers.runs import interleaved  # noqa: E402

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
STEPS = 9
CLOSE = 1e-4  # of the largest element, in fp32
POLICIES: dict[str, tuple[Policy, str]] = {
    "fora": (FORA(3), "variants"),
    "segments": (FORA(3), "segments"),
    "forecast": (TaylorSeer(3, order=2), "segments"),
    "measured": (FirstBlockCache(0.08), "segments"),
    "window": (Policy((Rule(LATER, WindowResidual(0.25), Where(("self",))),)), "variants"),
    "shared": (Policy((Rule(LATER, ShareGuidance("cond"), Where(("self",))),)), "variants"),
}


def inputs(name: str, steps: int, seed: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tree_map_only(Tensor, lambda t: t.cuda(), MODELS[name].inputs(steps, seed=seed))
    return found


def two_streams(model: RewrittenModule, name: str, seed: int) -> list[Tensor]:
    """The outputs themselves of a conditional and an unconditional call at each step, read when all are made."""
    return interleaved(model, {"cond": inputs(name, STEPS, seed), "uncond": inputs(name, STEPS, seed + 50)}, output)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two runs are equal but for rounding: a library may choose other kernels during a capture."""
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= CLOSE * b.abs().max() for a, b in pairs)


def pair(name: str, policy: Policy, **options: Any) -> tuple[RewrittenModule, RewrittenModule]:
    torch._dynamo.reset()
    model = MODELS[name].build().cuda()
    plain = dit_rewrite.compile(twin(model), policy, **options)
    return plain, dit_rewrite.compile(twin(model), policy, cuda_graphs=True, **options)


@pytest.mark.parametrize("model", ["dit", "sd3"])
@pytest.mark.parametrize("policy", POLICIES)
def test_trajectories(model: str, policy: str) -> None:
    """Three trajectories of two streams; the last one captures nothing, and what it needs is in the graphs."""
    given, lowering = POLICIES[policy]
    plain, captured = pair(model, given, lowering=lowering)
    expected = [out for seed in range(3) for out in two_streams(plain, model, seed)]
    found = [out for seed in range(2) for out in two_streams(captured, model, seed)]
    before = captured.stats()
    found += two_streams(captured, model, 2)
    assert equal(found, expected)
    last = captured.stats().since(before)
    assert last.captures == 0 == sum(last.uncaptured.values())
    assert last.replays >= 2 * STEPS


def test_shapes_and_queues() -> None:
    """Another batch, and calls in another CUDA stream, have graphs of their own; the first ones still serve."""
    plain, captured = pair("dit", FORA(3), lowering="variants", dynamic=False)
    side = torch.cuda.Stream()
    for turn in range(3):
        for batch, queue in ((2, None), (1, None), (2, side)):
            given = [tree_map_only(Tensor, lambda t: t[:batch], call) for call in inputs("dit", STEPS, turn)]  # noqa: B023
            torch.cuda.synchronize()
            with torch.cuda.stream(queue), torch.no_grad(), plain.trajectory(STEPS), captured.trajectory(STEPS):
                expected = [output(plain(**call)) for call in given]
                found = [output(captured(**call)) for call in given]
            torch.cuda.synchronize()
            assert equal(found, expected)
        if turn == 1:
            before = captured.stats()
    assert captured.stats().captures == before.captures >= 3 * 2


def test_weights_that_move() -> None:
    """The model leaves the GPU and comes back: its weights may be elsewhere then, and are read there."""
    plain, captured = pair("dit", FORA(3), lowering="variants")
    for turn in range(3):
        assert equal(two_streams(captured, "dit", turn), two_streams(plain, "dit", turn))
        for model in (plain, captured):
            model.cpu()
            taken = [torch.empty(1 << 20, device="cuda") for _ in range(8)]
            model.cuda()
            del taken
    assert set(captured.stats().uncaptured) <= {GraphReason.WARM_UP, GraphReason.MOVED_WEIGHTS}
