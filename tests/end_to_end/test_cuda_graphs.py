"""CUDA graphs with a live cache, on whole models: each run equals the same run without graphs, bit for bit.

On a CPU a fake replays; test_cuda_graphs_cuda.py does the same on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sympy import Mod, Ne
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite import Policy, Reuse, Rule, ShareGuidance, Where, WindowResidual
from dit_rewrite.errors import BadArgument, GraphReason
from dit_rewrite.guards import step
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.policies import FORA, FirstBlockCache, SpeCa, TaylorSeer, TeaCache
from dit_rewrite.policy.strategies import Forecast, GuidanceDelta, ReuseTiles
from tests.helpers import fake_graphs, tiny
from tests.helpers.drawn import prepare
from tests.helpers.fake_graphs import FakeDevice
from tests.helpers.runs import interleaved
from tests.helpers.tiny import calls, condition, same

STEPS = 9
slow = pytest.mark.slow
LATER = Ne(Mod(step, 3), 0)


def rule(do: Any, **where: Any) -> Policy:
    """At two of three steps, do something at these places."""
    return Policy((Rule(LATER, do, Where(**where)),))


POLICIES: dict[str, tuple[Policy, str]] = {
    "fora": (FORA(3), "variants"),
    "fora, segments": (FORA(3), "segments"),
    "int8": (rule(Reuse(store="int8")), "variants"),
    "forecast": (TaylorSeer(3, order=2), "variants"),
    "forecast, segments": (TaylorSeer(3, order=2), "segments"),
    "output": (rule(Reuse(), span="output"), "variants"),
    "measured": (FirstBlockCache(0.08), "segments"),
    "measured, lag": (TeaCache(0.1, (1.0, 0.0), lag=1), "variants"),
    "verified": (SpeCa(0.5), "segments"),
    "window": (rule(WindowResidual(0.25), kinds=("self",)), "variants"),
    "tiles": (rule(ReuseTiles(0.5, tile=2), kinds=("mlp",)), "variants"),
    "shared": (rule(ShareGuidance("cond"), kinds=("self",)), "variants"),
    "difference": (rule(GuidanceDelta("cond", Forecast(1)), span="output"), "variants"),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return fake_graphs.install(monkeypatch)


def two_streams(model: RewrittenModule, first: int, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The outputs of a conditional and an unconditional call at each step."""
    streams = {"cond": calls(STEPS, first), "uncond": calls(STEPS, first, condition(first + 50))}
    return interleaved(model, streams, keep)


QUICK = ("fora, segments", "forecast", "measured", "verified", "shared")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=slow) for name in POLICIES])
def test_two_streams(device: FakeDevice, name: str) -> None:
    """The outputs themselves are compared, after later calls and trajectories. The last one captures nothing."""
    policy, lowering = POLICIES[name]
    model, options = tiny.build(), {"lowering": lowering, "disable_passes": ()}
    plain = tiny.rewritten(model, policy, **options)
    captured = tiny.rewritten(model, policy, cuda_graphs=True, **options)

    def keep(output: Tensor) -> Tensor:
        device.poison()
        return output

    expected = [output for seed in range(3) for output in two_streams(plain, seed, Tensor.clone)]
    found = [output for seed in range(2) for output in two_streams(captured, seed, keep)]
    before = captured.stats()
    found += two_streams(captured, 2, keep)
    assert same(found, expected)
    last = captured.stats().since(before)
    made, known = ([decision.strategies for decision in model.stats().decisions] for model in (captured, plain))
    assert made == known
    assert last.captures == 0 == sum(last.uncaptured.values())
    assert last.replays >= 2 * STEPS


class WithCondition(tiny.TinyDiT):
    """Also returns the projected condition, which is computed once per trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(tiny.WIDTH, tiny.WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        projected = self.project(condition)
        return super().forward(hidden_states, timestep, projected), projected


def test_an_output_that_is_hoisted(device: FakeDevice) -> None:
    """The caller may write to it, although no segment has computed it in this call."""
    captured = tiny.rewritten(prepare(WithCondition(), torch.float32), cuda_graphs=True)
    with torch.no_grad(), captured.trajectory(STEPS):
        found = [captured(**arguments)[1] for arguments in calls(STEPS)]
        expected = found[0].clone()
        for projected in found:
            assert torch.equal(projected, expected)
            projected.zero_()
    assert captured.stats().replays and captured.stats().hoists == 1


@slow
def test_inductor(device: FakeDevice) -> None:
    """Code that reuses its own buffers, and chooses the strides of what it returns."""
    model = tiny.build()
    plain = dit_rewrite.compile(twin(model), FORA(3), lowering="segments")
    captured = dit_rewrite.compile(twin(model), FORA(3), lowering="segments", cuda_graphs=True)
    for seed in range(2):
        expected = two_streams(plain, seed, Tensor.clone)
        assert same(two_streams(captured, seed, lambda output: (device.poison(), output)[1]), expected)
    assert captured.stats().replays > 2 * STEPS


def test_a_model_on_a_cpu() -> None:
    """It runs as without the option, and both `stats` and `explain` say why."""
    model = tiny.build()
    asked = tiny.rewritten(model, cuda_graphs=True)
    assert same(tiny.outputs(asked, calls(4)), tiny.fora(model, calls(4)))
    assert asked.stats().uncaptured == {GraphReason.NO_GPU: 4}
    for text in (str(asked.stats()), str(asked.explain())):
        assert f"4 times: {GraphReason.NO_GPU}" in text


def test_explain(device: FakeDevice) -> None:
    asked = tiny.rewritten(tiny.build(), cuda_graphs=True)
    with asked.trajectory(STEPS):
        tiny.outputs(asked, calls(STEPS))
    assert "captured  2 CUDA graphs" in str(asked.explain())
    assert "2 CUDA graphs captured, 5 replays" in str(asked.stats())


def test_restore_frees_the_graphs(device: FakeDevice) -> None:
    """Dynamo keeps the compiled call, but not the buffers of the graphs, nor the cache of the last trajectory."""
    asked = tiny.rewritten(tiny.build(), cuda_graphs=True)
    tiny.outputs(asked, calls(STEPS))
    backend = asked._backend
    assert backend.graphs is not None
    captured = [weakref.ref(each) for graphs in backend.graphs._alive() for each in graphs._all]
    assert len(captured) == 1 and asked.stats().graph_bytes == backend.graphs.bytes > 0
    dit_rewrite.restore(asked)
    assert backend.graphs.bytes == backend.session.cache_bytes() == 0
    assert [each() for each in captured] == [None]


def test_inductor_makes_no_graphs_of_its_own() -> None:
    for options in ({"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        with pytest.raises(BadArgument, match="cuda_graphs"):
            dit_rewrite.compile(tiny.build(), FORA(3), cuda_graphs=True, **options)
