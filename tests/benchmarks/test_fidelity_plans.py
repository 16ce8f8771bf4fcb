"""The search of plans for the fidelity benchmark forecasts as the policy does, and its plans are rows."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("diffusers")

import dit_rewrite  # noqa: E402
from benchmarks.fidelity import plans as fidelity_plans  # noqa: E402
from benchmarks.fidelity.plans import Pictures, Toy, moved, weights_of  # noqa: E402
from benchmarks.fidelity.rows import PLANS  # noqa: E402
from benchmarks.timing import RESULTS  # noqa: E402
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images  # noqa: E402
from dit_rewrite.policies import StepMask  # noqa: E402


def test_a_plan_forecasts_as_the_policy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity_plans, "STEPS", 6)
    toy, labels, plan = Toy(), torch.arange(2), (0, 1, 3)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    full, outputs = toy.run(noise, labels)
    assert torch.equal(full, sample_images(toy.denoiser, labels, steps=6, guidance=GUIDANCE, seed=5))
    assert torch.equal(toy.run(noise, labels, given=outputs[:3])[0], full)
    policy = StepMask(computed=plan, num_steps=6, order=2, basis="taylorseer")
    model = dit_rewrite.compile(Toy().denoiser, policy, backend="aot_eager")
    forecast = sample_images(model, labels, steps=6, guidance=GUIDANCE, seed=5)
    found = toy.errors(Pictures(noise, labels, full), plan)
    expected = fidelity_plans.relative_errors(forecast, full)
    assert expected.min() > 0.01 and torch.allclose(found, expected, rtol=1e-3)


def test_weights_read_the_last_computed_values() -> None:
    weights = weights_of((0, 1, 4))
    assert [len(row) for row in weights[:7]] == [0, 0, 2, 2, 0, 3, 3]
    assert weights[2] == pytest.approx((2, -1)) and sum(weights[5]) == pytest.approx(1)


def test_one_step_is_moved_at_a_time() -> None:
    plans = list(moved((0, 1, 5)))
    assert (0, 1, 4) in plans and (0, 2, 5) in plans and (0, 3, 5) in plans
    assert all(len(plan) == 3 and plan[0] == 0 and len({*plan} & {0, 1, 5}) == 2 for plan in plans)


def test_plans_of_the_results_are_rows() -> None:
    found = json.loads((RESULTS / "fidelity_plans.json").read_text(encoding="utf-8"))["plans"]["18"]
    assert {tuple(found["placed"]), tuple(found["computed"])} <= set(PLANS)
