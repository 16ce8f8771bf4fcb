"""Lowered by Inductor, reuse 0 equals torch.compile of the untouched model bit for bit."""

from __future__ import annotations

import pytest
import torch
from sympy import Eq, Mod, Ne

import dit_rewrite
from dit_rewrite import Compute, Policy, Rule, Where
from dit_rewrite.guards import age, layer, step, streak
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.policies import FORA
from dit_rewrite.runtime.session import Observation
from tests.helpers import tiny
from tests.helpers.models import MODELS, output

QUICK = ("dit", "sd3")


def verified(name: str, dtype: torch.dtype) -> dit_rewrite.Verification:
    case = MODELS[name]
    return dit_rewrite.verify(case.build(dtype), case.inputs(4, dtype), FORA(2), backend="inductor")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_reuse_0_is_exact_in_fp32(name: str) -> None:
    """Reuse 0 equals plain torch.compile bit for bit; the replay is within rounding of the interpreter."""
    result = verified(name, torch.float32)
    assert result.reuse0.exact
    assert result.replay.within
    assert result.sites == sum(MODELS[name].sites.values())
    assert result.reused == result.sites * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_reuse_0_in_bf16_is_exact_or_no_further_from_float64_than_eager(name: str) -> None:
    """Promise 2 in low precision; models that are not exact are listed."""
    result = verified(name, torch.bfloat16)
    assert result.reuse0.within
    assert result.reuse0.exact or result.notes


def test_a_reused_step_is_lowered_without_what_it_skips() -> None:
    """FORA through Inductor: reused steps omit the skipped modules, and nothing compiles after the first call."""
    case = MODELS["dit"]
    model = dit_rewrite.compile(case.build(), FORA(3), fullgraph=True)
    with torch.no_grad(), model.trajectory(num_steps=6):
        outputs = [output(model(**kwargs)) for kwargs in case.inputs(6)]
    stats = model.stats()
    assert (stats.variants, stats.late_variants, stats.recompiles, stats.graph_breaks) == (2, 0, 0, 0)
    assert (stats.computed, stats.reused) == (6 * 2, 6 * 4)
    assert all(out.isfinite().all() for out in outputs)
    assert model.explain().graph_diff().splitlines()[0].startswith("# nodes: ")


@torch.no_grad()
def test_many_rows_through_inductor_equal_the_guarded_graph_run_as_it_is() -> None:
    """Rows that differ between sites: each variant is within rounding of the guarded graph under its row."""
    mixed = Rule(Ne(Mod(step * 7 + layer * 3 + age, 5), 0) & (streak < 2))
    attention = Rule(Eq(Mod(step, 2), 0), do=Compute(), where=Where(("attention",)))
    model = dit_rewrite.compile(tiny.build(), Policy((attention, mixed)))
    seen: list[Observation] = []
    model._backend.session.observer = seen.append
    with model.trajectory(num_steps=8):
        tiny.outputs(model, tiny.calls(8))
    (graph,) = model.explain().rewritten
    gm, sites = graph.guarded.gm, graph.guarded.sites
    opaque_attention.unmark(gm)
    held: list[torch.Tensor | None] = [None] * sum(len(site.values) for site in sites)
    for observation in seen:
        decisions = list(observation.record.row) + [False] * (len(sites) - len(observation.record.row))
        expected, *held = gm(*observation.args, *decisions, *held)
        torch.testing.assert_close(observation.outputs[0], expected, rtol=1e-4, atol=1e-5)
    assert len({observation.record.row for observation in seen}) >= 4
