"""Every named model through the compiler: its sites, and FORA against the reference by module hooks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import dit_rewrite
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA
from tests.helpers.broken import broken_blocks
from tests.helpers.models import MODELS, Case, output
from tests.references.fora import fora_outputs

STEPS = 12
BROKEN = broken_blocks()


def kinds(model: dit_rewrite.RewrittenModule) -> Counter[str]:
    """How many sites of each kind the report names."""
    return Counter(str(place.site.kind) for place in model.explain().sites)


@torch.no_grad()
def told(model: dit_rewrite.RewrittenModule, inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The outputs of an explicit trajectory, copied."""
    with model.trajectory(num_steps=len(inputs)):
        return [output(model(**arguments)).clone() for arguments in inputs]


@pytest.mark.parametrize("case", MODELS.values(), ids=lambda case: case.name)
def test_sites_and_fora_equal_the_reference(case: Case) -> None:
    model, inputs = case.build(), case.inputs(STEPS)
    for anchor, computed in (("start", 4), ("paper", 5)):  # 0, 3, 6, 9; and 0, then t = 9, 6, 3, 0: steps 2, 5, 8, 11
        torch.compiler.reset()
        compiled = dit_rewrite.compile(twin(model), FORA(3, anchor=anchor), backend="aot_eager")
        found = told(compiled, inputs)
        expected = fora_outputs(case.name, model, inputs, interval=3, anchor=anchor)
        different = [step for step in range(STEPS) if not torch.equal(found[step], expected[step])]
        assert different == []
        assert kinds(compiled) == case.sites
        stats = compiled.stats()
        sites = sum(case.sites.values())
        assert (stats.computed, stats.reused) == (computed * sites, (STEPS - computed) * sites)
        assert (stats.late_variants, stats.recompiles) == (0, 0)
        if case.name == "omnigen":  # a break of the model's own: its rotary embedding branches on a tensor
            assert stats.graph_breaks > 0
        else:
            assert (stats.variants, stats.graph_breaks) == (2, 0)
        assert not stats.misses


@pytest.mark.parametrize("case", [MODELS["dit"], MODELS["mochi"]], ids=lambda case: case.name)
def test_fora_watched_equals_the_reference(case: Case) -> None:
    """The same for an inferred trajectory: falling and rising timesteps."""
    model, inputs = case.build(), case.inputs(7)
    compiled = dit_rewrite.compile(twin(model), FORA(3), backend="aot_eager")
    with torch.no_grad():
        found = [output(compiled(**arguments)).clone() for arguments in inputs]
    assert all(map(torch.equal, found, fora_outputs(case.name, model, inputs, interval=3)))
    assert compiled.stats().reused == 4 * sum(case.sites.values())


@pytest.mark.parametrize("anchor", ["start", "paper"])
def test_blocks_behind_breaks_equal_the_reference(anchor: str) -> None:
    """Six identical blocks share two graphs: each graph has six occurrences, with their own slots."""
    model, inputs = BROKEN.build(), BROKEN.inputs(STEPS)
    compiled = dit_rewrite.compile(twin(model), FORA(3, anchor=anchor), backend="aot_eager")
    found = told(compiled, inputs)
    assert all(map(torch.equal, found, fora_outputs(BROKEN.name, model, inputs, interval=3, anchor=anchor)))
    assert kinds(compiled) == {"self": 6, "mlp": 6}
    stats = compiled.stats()
    computed = {"start": 4, "paper": 5}[anchor]
    assert (stats.computed, stats.reused) == (computed * 12, (STEPS - computed) * 12)
    assert (stats.recompiles, stats.late_variants) == (0, 0)
    assert stats.graph_breaks > 0
    assert not stats.misses
