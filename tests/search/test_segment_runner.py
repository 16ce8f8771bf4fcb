"""The search over compiled segments: the plan's policy runs the searched row; windows of grids, parallel blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rewrite
from dit_rewrite.errors import BadParameter, RefusalReason
from dit_rewrite.policies import DiTFastAttn
from dit_rewrite.policy.plan import Choice, Plan
from dit_rewrite.policy.strategies import WindowResidual
from dit_rewrite.search.segment_runner import greedy_plan
from tests.helpers.image_models import build_flux, flux_calls
from tests.helpers.models import MODELS
from tests.helpers.searches import (
    CASE,
    SETTINGS,
    STEPS,
    WITHOUT_ASC,
    Guided,
    Sampler,
    Tiny,
    sampling,
    search,
)


def test_the_policy_runs_what_the_search_ran() -> None:
    """Two trajectories side by side: the outputs that the samplers used equal the policy's, bit for bit."""
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


def test_guidance_in_two_calls(tmp_path: Path) -> None:
    """Each stream has choices of its own, and the plan's policy runs what the search ran, bit for bit."""
    samplers = [Guided(0), Guided(1)]
    plan = search(samplers, 0.25, **WITHOUT_ASC, path=tmp_path / "plan.json")
    assert (plan.streams, len(plan.sites), plan.steps) == (("cond", "uncond"), 3, STEPS)
    assert plan.table[0] == (Choice.FULL,) * 6
    first, second = ([row[i : i + 3] for row in plan.table] for i in (0, 3))
    assert first != second and all(len(set(sum(half, ()))) > 1 for half in (first, second)), "two plans of some choices"
    assert plan.attention[0] >= 1 > min(plan.attention)
    assert 0 < plan.work <= (2 * (3 + 1) / 2 + 2) / (2 * 3)
    searched = [list(sampler.outputs) for sampler in samplers]
    torch.compiler.reset()
    policy = DiTFastAttn(tmp_path / "plan.json")
    model = dit_rewrite.compile(CASE.build(), policy, backend="aot_eager", lowering="segments")
    for sampler, expected in zip(samplers, searched, strict=True):
        with torch.no_grad():
            sampler(model)
        assert len(expected) == 2 * STEPS and all(map(torch.equal, sampler.outputs, expected))
    assert model.stats().misses == {}


def test_half_a_batch_is_not_shared_between_calls() -> None:
    with pytest.raises(BadParameter, match="conditional='first'.*without ASC: each step has calls of its own for co"):
        search([Guided(0)], 0.1)


def test_thresholds() -> None:
    """Nothing passes a threshold of zero; everything passes one above the largest loss, and the cheapest is taken."""
    assert search([Tiny(0)], 0.0).counts[Choice.FULL] == 2 * STEPS
    cheapest = search([Tiny(0)], 100.0)
    assert cheapest.counts == {**dict.fromkeys(Choice, 0), Choice.FULL: 2, Choice.AST: 2 * (STEPS - 1)}
    assert cheapest.evaluations == 2 * (STEPS - 1)


def test_without_guidance() -> None:
    """Fewer candidates: windows alone."""
    plan = search([Tiny(0)], 100.0, strategies=(Choice.WA_RS,), conditional=None)
    assert plan.counts[Choice.WA_RS] == 2 * (STEPS - 1)
    assert (plan.conditional, plan.window) == (None, 0.25)


def test_a_place_that_refuses_a_choice() -> None:
    """Cross-attention has no window: a choice that a site refuses is never in its plan."""
    case = MODELS["pixart_alpha"]
    settings = {**SETTINGS, "steps": 3, "kinds": ("self", "cross"), "strategies": (Choice.WA_RS, Choice.AST)}
    plan = greedy_plan(case.build(), [sampling(case.inputs(3))], 100.0, **settings)
    chosen = {site: plan.table[1][i] for i, site in enumerate(plan.sites)}
    assert {choice for site, choice in chosen.items() if site.endswith("attn1")} == {Choice.WA_RS}
    assert {choice for site, choice in chosen.items() if site.endswith("attn2")} == {Choice.AST}

    assert plan.evaluations == 3 * 2 * (3 - 1), "a refused choice is not even tried"
    assert plan.notes == (f"WA-RS refused at 3: {RefusalReason.OTHER_TOKENS}",)


# --- grids, parallel blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), "latent"], ids=str)
def test_windows_of_a_grid(tmp_path: Path, grid: Any) -> None:
    """Rows and columns have separate reaches; the plan's policy runs the searched row."""
    sampler = Sampler(0, steps=3, told=3)
    settings = {**SETTINGS, "steps": 3, "strategies": (Choice.WA_RS,), "window": (1, 2), "grid": grid, "metric": "mse"}
    plan = greedy_plan(CASE.build(), [sampler], 100.0, **settings, path=tmp_path / "plan.json")
    assert (plan.window, plan.grid, plan.counts[Choice.WA_RS]) == ((1, 2), grid, 3 * 2)
    assert (plan.metric, Plan.load(tmp_path / "plan.json")) == ("mse", plan)
    first, reused = plan.attention[0], plan.attention[-1]
    assert first > 1 > plan.attention[1] == reused > 0, "equation 1 takes a window more, and equation 2 one alone"
    assert plan.attention_share == pytest.approx(sum(plan.attention) / 3)
    expected = list(sampler.outputs)
    torch.compiler.reset()
    policy = DiTFastAttn(tmp_path / "plan.json")
    assert {rule.do for rule in policy.rules if rule.parts} == {WindowResidual((1, 2), grid)}
    assert policy.name == "DiTFastAttn(delta=100.0, metric=mse)"
    model = dit_rewrite.compile(CASE.build(), policy, backend="aot_eager", lowering="segments")
    with torch.no_grad():
        sampler(model)
    assert all(map(torch.equal, sampler.outputs, expected))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": (1, 1)}, r"greedy_plan: window=\(1, 1\).*one for each axis of grid=None"),
        ({"window": (1, 1), "grid": (2, 2, 4)}, r"greedy_plan: window=\(1, 1\).*of grid=\(2, 2, 4\)"),
        ({"window": 4}, "greedy_plan: window=4"),
        ({"window": None}, "greedy_plan: window=None"),
        ({"grid": (4, 0)}, "greedy_plan: grid="),
        ({"grid": (3, 3)}, rf"greedy_plan: grid=\(3, 3\).*an attention \({RefusalReason.OTHER_GRID}\)"),
        ({"grid": "latent", "window": (1, 1, 1)}, rf"greedy_plan: grid='latent'.*\({RefusalReason.OTHER_AXES}\)"),
        ({"metric": "lpips"}, "search: metric='lpips'.*relative_error, relative_l2, mse, psnr, ssim, cosine"),
        ({"conditional": "cond"}, "greedy_plan: conditional='cond'"),
        ({"strategies": ["AST", 3]}, "greedy_plan: strategies="),
        ({"kinds": ("cross",)}, r"greedy_plan: kinds=\('cross',\).*kinds of the model's branches: self, mlp"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(changes: dict[str, Any], says: str) -> None:
    """The error comes before any step is searched."""
    with pytest.raises(BadParameter, match=says):
        search([Tiny(0)], 0.1, **changes)


def test_parallel_blocks_are_searched_too() -> None:
    """Those of FLUX have attention and MLP in one projection: AST reuses both, a window replaces the attention only."""
    settings = {**SETTINGS, "steps": 2, "conditional": None}
    joint = parallel = 1
    for choice, kinds in ((Choice.AST, None), (Choice.WA_RS, None), (Choice.AST, ("joint",))):
        torch.compiler.reset()
        more = {"strategies": (choice,), **({} if kinds is None else {"kinds": kinds})}
        plan = greedy_plan(build_flux(layers=1), [sampling(flux_calls(2), 2)], 100.0, **settings, **more)
        if kinds is None:
            assert plan.counts[choice] == joint + parallel == len(plan.sites)
            assert plan.notes == ()
        else:
            assert plan.counts[choice] == joint == len(plan.sites)
            assert plan.notes == (f"{parallel} parallel not searched (kinds: joint)",)
