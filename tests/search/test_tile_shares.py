"""Shares of tiles by branch: what is chosen on planted layers, what it costs, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dit_rewrite
from dit_rewrite.errors import BadParameter, NotCalibrated
from dit_rewrite.module import twin
from dit_rewrite.passes.analysis import cost
from dit_rewrite.policies import TileReuse
from dit_rewrite.policy.rules import Policy
from dit_rewrite.search.tile_shares import FACTORS, UNIFORM, TileShares, calibrate_tiles, choose
from tests.helpers import tiny

STEPS, LAYERS, TOKENS, SHARE = 8, 4, 16, 0.25
CALLS = tiny.calls(STEPS, tokens=TOKENS)


def planted(still: tuple[int, ...] = (0, 2)) -> Any:
    """A model of some blocks whose MLPs always give the same."""
    model = tiny.build(LAYERS)
    for layer in still:
        torch.nn.init.zeros_(model.blocks[layer].mlp[2].weight)
    return model


def sampling(steps: int = STEPS) -> Callable[[Any], None]:
    return lambda denoiser: tiny.outputs(denoiser, CALLS[:steps])


def calibrated(model: Any, **more: Any) -> TileShares:
    return calibrate_tiles(model, sampling(), SHARE, 2, kinds=("mlp",), backend="aot_eager", **more)


def run(model: Any, policy: Policy) -> tuple[list[Tensor], int]:
    """The outputs under a policy, and the FLOPs of a reusing step."""
    compiled = dit_rewrite.compile(twin(model), policy, backend="aot_eager")
    outputs = tiny.outputs(compiled, CALLS)
    (graph,) = compiled._backend.rewritten
    return outputs, cost.total_flops(graph.straight((True,) * len(graph.reached)).gm.graph)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return sum(float((a - b).norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", ["turns", "change"])
def test_still_branches_leave_their_share_to_the_others(order: str) -> None:
    """At no more FLOPs; the measure is that of the branches, and on these layers the outputs are closer too."""
    model = planted()
    found = calibrated(model, order=order)
    shares = [found.shares[f"blocks.{i}.mlp"] for i in range(LAYERS)]
    assert shares[0] == shares[2] == SHARE * min(FACTORS) and min(shares[1], shares[3]) > SHARE
    assert 0 < found.error < found.uniform
    exact = tiny.outputs(model, CALLS)
    ours, flops = run(model, found.policy)
    theirs, most = run(model, TileReuse(SHARE, 2, order, ("mlp",)))
    assert flops <= most and distance(ours, exact) < distance(theirs, exact)
    assert found.policy.name.endswith("by branch")


def test_the_measure_is_that_of_the_slots() -> None:
    """One branch, whose output no later one reads: its error is that of tiles by hand."""
    model = tiny.build(1)
    seen: list[Tensor] = []
    model.blocks[0].mlp.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    tiny.outputs(model, CALLS)
    held, errors, turn = seen[0].clone(), [], 0
    for value in seen[1:]:  # tiles of 2 tokens, 2 of 8 a step
        held[:, turn : turn + 4] = value[:, turn : turn + 4]
        turn = (turn + 4) % TOKENS
        errors.append(float((held - value).square().mean()))
    found = calibrated(tiny.build(1))
    assert found.shares == {"blocks.0.mlp": SHARE} and found.error == found.uniform
    assert found.uniform == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_weights() -> None:
    """A branch whose error is said not to matter gets the least share."""
    weights = {f"blocks.{i}.mlp": 1.0 for i in range(LAYERS)} | {"blocks.1.mlp": 0.0}
    found = calibrated(tiny.build(LAYERS), weights=weights)
    shares = [found.shares[f"blocks.{i}.mlp"] for i in range(LAYERS)]
    assert shares[1] == min(shares) == SHARE * min(FACTORS) and sorted(shares)[1] > shares[1]


TABLES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.floats(0, 10), min_size=len(FACTORS), max_size=len(FACTORS))), min_size=1
)


@given(TABLES)
def test_never_worse_than_equal_shares(branches: list[tuple[int, list[float]]]) -> None:
    """Whatever the errors, also where a greater share has a greater one, and at no more than the same cost."""
    costs = [[size * factor for factor in FACTORS] for size, _ in branches]
    errors = [row for _, row in branches]
    picked = choose(errors, costs)
    assert sum(c[i] for c, i in zip(costs, picked, strict=True)) <= sum(c[UNIFORM] for c in costs) * (1 + 1e-6)
    assert sum(e[i] for e, i in zip(errors, picked, strict=True)) <= sum(e[UNIFORM] for e in errors)


def test_by_hand() -> None:
    """Two branches of cost 1, errors 1 / share and 9 / share: shares of 1/2 and 3/2 are best."""
    errors = [[weight / factor for factor in FACTORS] for weight in (1, 9)]
    assert [FACTORS[i] for i in choose(errors, [list(FACTORS)] * 2)] == [0.5, 1.5]


def test_refusals() -> None:
    with pytest.raises(BadParameter, match=r"calibrate_tiles: kinds=\('self',\)"):
        calibrate_tiles(tiny.build(1), sampling(2), kinds=("self",), backend="aot_eager")
    with pytest.raises(NotCalibrated, match="needs values of 2 steps, but saw 1"):
        calibrate_tiles(tiny.build(1), sampling(1), kinds=("mlp",), backend="aot_eager")
    with pytest.raises(BadParameter, match="refresh=0"):
        calibrate_tiles(tiny.build(1), sampling(2), 0)
