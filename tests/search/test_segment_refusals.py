"""Searches that are interrupted, and samplers and models that are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite
from dit_rewrite.errors import BadParameter, BadTrajectory, FunctionFailed, NoSites, PlanMismatch
from dit_rewrite.policies import DiTFastAttn, parse
from dit_rewrite.policy.plan import Plan
from dit_rewrite.policy.serialise import from_json, to_json
from dit_rewrite.search.segment_runner import greedy_plan
from tests.helpers import tiny
from tests.helpers.broken import broken_blocks
from tests.helpers.models import MODELS
from tests.helpers.searches import (
    CASE,
    SETTINGS,
    STEPS,
    WITHOUT_ASC,
    Conditioned,
    Sampler,
    Tiny,
    sampling,
    search,
)


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    """The sampler fails in its fourth call; a second search replays the finished steps, and finds the same plan."""
    whole = search([Tiny(0)], 0.4)

    class Failing(Tiny):
        def _loop(self, model: Any) -> None:
            self.inputs = self.inputs[:3]
            super()._loop(model)
            raise ConnectionError

    path = tmp_path / "plan.json"
    with pytest.raises(FunctionFailed, match="ConnectionError"):
        search([Failing(0)], 0.4, path=path)
    assert not path.exists()
    for others, says in (
        ({}, "inputs: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"),
        ({"conditional": "second"}, "conditional: 'first' there, 'second' here; inputs:"),
    ):
        with pytest.raises(PlanMismatch, match=rf"another search \({says}"):
            search([Tiny(1)], 0.4, path=path, **others)
    with pytest.raises(PlanMismatch, match="inputs: "):
        search([Conditioned(0)], 0.4, path=path)
    resumed = search([Tiny(0)], 0.4, path=path)
    assert resumed.table == whole.table
    assert resumed.evaluations == whole.evaluations
    assert Plan.load(path) == resumed
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: search([Tiny(0)], 0.1, conditional=None), BadParameter, "conditional=None"),
        (lambda: search([Tiny(0, told=None)], 0.1), BadTrajectory, "searched only in explicit trajectories"),
        (lambda: search([Tiny(0, steps=2)], 0.1), BadTrajectory, "ended before the last step"),
    ],
    ids=["no half", "not told", "too short"],
)
def test_refusals(build: Callable[[], Plan], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()


def guided(*names: Sequence[str | None]) -> Callable[[Any], None]:
    """Guidance in several calls a step, told apart by their conditioning. `names` has the names of each step's calls,
    None without one; the last holds for the other steps."""

    def sample(model: Any) -> None:
        with model.trajectory(num_steps=3):
            for step, arguments in enumerate(tiny.calls(3)):
                for place, name in enumerate(names[min(step, len(names) - 1)]):
                    with nullcontext() if name is None else model.cache_context(name):
                        model(**{**arguments, "condition": tiny.condition(7 + place)})

    return sample


def restarted(model: Any) -> None:
    sampling(tiny.calls(3)[:1])(model)
    sampling(tiny.calls(3))(model)


def resized(model: Any) -> None:
    sampling([*tiny.calls(3)[:2], *tiny.calls(3, tokens=12)[2:]])(model)


@pytest.mark.parametrize(
    ("samplers", "says"),
    [
        ([guided((None, None))], "called more than once at step 0: .*Give both halves of the guidance in one batch"),
        ([guided(("a", None))], "called more than once at step 0: .*name each call"),
        ([guided(("a", "a"))], "called more than once at step 0: "),
        ([guided(("a",), ("a", "b"))], "called more than once at step 1: "),
        ([guided(("a", "b"), ("a", "b", "c"))], "At step 1 the denoiser was called for the stream 'c' instead of 'a'"),
        ([guided(("a", "b"), ("a",))], "At step 2 the denoiser was called for the stream 'a' instead of 'b'"),
        ([guided(("a", "b"), ("b", "a"))], "At step 1 the denoiser was called for the stream 'b' instead of 'a'"),
        ([guided((None,), ("a",))], "At step 1 .* called for the stream 'a' with other arguments instead of one"),
        ([guided(("a", "b")), guided(("b", "a"))], "At step 0 the denoiser was called for the stream 'a' instead of"),
        ([restarted], "call for step 1 belongs to step 0 of another trajectory"),
        ([resized], "At step 2 the denoiser was compiled again, for other shapes"),
        ([sampling(tiny.calls(3)), sampling(tiny.calls(3, tokens=12))], "At step 0 the denoiser was compiled again"),
    ],
)
def test_samplers_that_call_otherwise(samplers: list[Any], says: str) -> None:
    """The error names the fault and says what to do."""
    with pytest.raises(BadTrajectory, match=says):
        greedy_plan(tiny.build(), samplers, 0.1, **{**SETTINGS, **WITHOUT_ASC, "steps": 3})


class Halves(torch.nn.Module):
    """Two denoisers in sequence, whose call Dynamo never sees: two whole graphs a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny.build(), tiny.build()

    @torch._dynamo.disable(recursive=False)
    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.second(self.first(hidden_states, timestep, condition), timestep, condition)


def test_a_model_without_branches() -> None:
    """The error is the same as that of `compile`."""
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(NoSites, match="Linear has no residual branch"):
        greedy_plan(model, [sampling([{"input": torch.ones(2, 4)}] * 3)], 0.1, **{**SETTINGS, "steps": 3})


@pytest.mark.parametrize("build", [broken_blocks(2).build, lambda: Halves().eval().requires_grad_(False)])
def test_a_model_of_several_graphs_is_refused(build: Callable[[], torch.nn.Module]) -> None:
    calls = tiny.calls(3) if not hasattr(build(), "time") else broken_blocks(2).inputs(3)
    with pytest.raises(BadTrajectory, match=r"several graphs \(graph breaks\).*fullgraph=True"):
        greedy_plan(build(), [sampling(calls)], 0.1, **{**SETTINGS, "steps": 3})


def test_a_plan_of_another_model_or_length(tmp_path: Path) -> None:
    """A policy of a plan checks the model and length that the plan was made for, also from a file and through JSON."""
    plan = search([Sampler(0)], 0.4, path=tmp_path / "plan.json")
    policy = parse(f"ditfastattn:plan={tmp_path / 'plan.json'}")
    assert policy == DiTFastAttn(plan) == from_json(to_json(policy))
    with pytest.raises(PlanMismatch, match="another model"):
        dit_rewrite.compile(MODELS["pixart_alpha"].build(), policy)
    model = dit_rewrite.compile(CASE.build(), policy, backend="aot_eager")
    with pytest.raises(PlanMismatch, match=f"{STEPS} steps, not 9"), model.trajectory(num_steps=9):
        pass
