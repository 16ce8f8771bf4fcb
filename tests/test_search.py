"""The search over compiled pieces: what it ran is what the plan's policy runs; thresholds, interruptions, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite
from dit_rewrite.errors import BadParameter, BadTrajectory, PlanMismatch
from dit_rewrite.plan import Choice, Plan
from dit_rewrite.policies import DiTFastAttn, parse
from dit_rewrite.search import greedy_plan
from dit_rewrite.serialise import from_json, to_json
from tests.models import MODELS, output

STEPS = 5
CASE = MODELS["dit"]
SETTINGS: dict[str, Any] = {"steps": STEPS, "conditional": "first", "window": 0.25, "backend": "aot_eager"}


class Sampler:
    """Calls the model once a step; keeps what it returned. Each call's latent depends on the output before."""

    def __init__(self, seed: int, steps: int = STEPS, told: int | None = STEPS) -> None:
        self.inputs, self.told, self.outputs = CASE.inputs(steps, seed=seed), told, list[Tensor]()

    def __call__(self, model: Any) -> None:
        self.outputs = []
        if self.told is None:
            self._loop(model)
            return
        with model.trajectory(num_steps=self.told):
            self._loop(model)

    def _loop(self, model: Any) -> None:
        for arguments in self.inputs:
            latent = arguments["hidden_states"]
            moved = latent if not self.outputs else latent + 0.05 * self.outputs[-1][:, : latent.shape[1]]
            self.outputs.append(output(model(**{**arguments, "hidden_states": moved})).clone())


def search(samplers: list[Sampler], delta: float, **more: Any) -> Plan:
    torch.compiler.reset()
    return greedy_plan(CASE.build(), samplers, delta, **{**SETTINGS, **more})


def test_the_policy_runs_what_the_search_ran() -> None:
    """Two trajectories side by side: the outputs that the samplers went on with are, bit for bit, the policy's."""
    samplers = [Sampler(0), Sampler(1)]
    plan = search(samplers, 0.4)
    assert plan.table[0] == (Choice.FULL,) * 3
    assert len({choice for row in plan.table for choice in row}) >= 3, "a plan of several choices"
    assert plan.sites == tuple(f"transformer_blocks.{i}.attn1" for i in range(3))
    searched = [list(sampler.outputs) for sampler in samplers]
    torch.compiler.reset()
    model = dit_rewrite.compile(CASE.build(), DiTFastAttn(plan), backend="aot_eager", lowering="segments")
    for sampler, expected in zip(samplers, searched, strict=True):
        with torch.no_grad():
            sampler(model)
        assert all(map(torch.equal, sampler.outputs, expected))
        assert len(sampler.outputs) == len(expected) == STEPS
    assert model.stats().misses == {}
    # at most |S| (|M| + 1) / 2 attempts, a reference and the step itself, against |S| |M|; the first step only itself
    assert 0 < plan.work <= (STEPS * (4 * (3 + 1) / 2 + 2)) / (4 * 3 * STEPS)


def test_thresholds() -> None:
    """Nothing passes a threshold of zero; everything passes one above the largest loss, and the cheapest is taken."""
    assert search([Sampler(0)], 0.0).counts[Choice.FULL] == 3 * STEPS
    cheapest = search([Sampler(0)], 100.0)
    assert cheapest.counts == {**dict.fromkeys(Choice, 0), Choice.FULL: 3, Choice.AST: 3 * (STEPS - 1)}
    assert cheapest.evaluations == 3 * (STEPS - 1)


def test_without_guidance() -> None:
    """Fewer candidates: windows alone."""
    plan = search([Sampler(0)], 100.0, strategies=(Choice.WA_RS,), conditional=None)
    assert plan.counts[Choice.WA_RS] == 3 * (STEPS - 1)
    assert (plan.conditional, plan.window) == (None, 0.25)


def test_a_place_that_refuses_a_choice() -> None:
    """Cross-attention has no window: what it cannot do is never chosen there."""
    case = MODELS["pixart_alpha"]

    def sample(model: Any) -> None:
        with model.trajectory(num_steps=3):
            for arguments in case.inputs(3):
                model(**arguments)

    torch.compiler.reset()
    settings = {**SETTINGS, "steps": 3, "kinds": ("self", "cross"), "strategies": (Choice.WA_RS, Choice.AST)}
    plan = greedy_plan(case.build(), [sample], 100.0, **settings)
    chosen = {site: plan.table[1][i] for i, site in enumerate(plan.sites)}
    assert {choice for site, choice in chosen.items() if site.endswith("attn1")} == {Choice.WA_RS}
    assert {choice for site, choice in chosen.items() if site.endswith("attn2")} == {Choice.AST}


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    """The sampler fails in its fourth call; a second search replays what was found, and finds the same."""
    whole = search([Sampler(0)], 0.4)

    class Failing(Sampler):
        def _loop(self, model: Any) -> None:
            self.inputs = self.inputs[:3]
            super()._loop(model)
            raise ConnectionError

    path = tmp_path / "plan.json"
    with pytest.raises(ConnectionError):
        search([Failing(0)], 0.4, path=path)
    assert not path.exists()
    resumed = search([Sampler(0)], 0.4, path=path)
    assert resumed.table == whole.table
    assert resumed.evaluations == whole.evaluations
    assert Plan.load(path) == resumed
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: search([Sampler(0)], 0.1, conditional=None), BadParameter, "conditional=None"),
        (lambda: search([Sampler(0, told=None)], 0.1), BadTrajectory, "searched within told trajectories"),
        (lambda: search([Sampler(0, steps=2)], 0.1), BadTrajectory, "has ended before its steps were done"),
    ],
    ids=["no half", "not told", "too short"],
)
def test_refusals(build: Callable[[], Plan], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()


def test_a_plan_of_another_model_or_length(tmp_path: Path) -> None:
    """A policy of a plan, from a file and through JSON too, knows what it was made for."""
    plan = search([Sampler(0)], 0.4, path=tmp_path / "plan.json")
    policy = parse(f"ditfastattn:plan={tmp_path / 'plan.json'}")
    assert policy == DiTFastAttn(plan) == from_json(to_json(policy))
    with pytest.raises(PlanMismatch, match="another model"):
        dit_rewrite.compile(MODELS["pixart_alpha"].build(), policy)
    model = dit_rewrite.compile(CASE.build(), policy, backend="aot_eager")
    with pytest.raises(PlanMismatch, match=f"{STEPS} steps, not 9"), model.trajectory(num_steps=9):
        pass
