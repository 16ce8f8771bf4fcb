"""The dynamic programme against all placements, and fitted weights against least squares."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dit_rewrite.search.placement import anchors_of, even, fit_weights, gap_costs, place, predict, squared_error

STEPS = 8


def gram_of(values: Tensor) -> Tensor:
    return values @ values.T


def drifting(seed: int, steps: int = STEPS) -> Tensor:
    """Values of a random walk with drift, one row per step."""
    noise = torch.randn(steps, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(0) + torch.arange(steps, dtype=torch.float64)[:, None]


def influence_of(seed: int, steps: int = STEPS) -> Tensor:
    return torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1


def objective(gram: Tensor, influence: Tensor, computed: tuple[int, ...], power: float) -> float:
    """The objective of a placement with the best weights of two values, step by step."""
    rows = [
        () if step in computed else fit_weights(gram, step, anchors_of(step, computed, 2)) for step in range(len(gram))
    ]
    return predict(gram, influence, rows, computed, power)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_dynamic_programme_is_exhaustive_search(seed: int, power: float) -> None:
    gram, influence = gram_of(drifting(seed)), influence_of(seed)
    found = place(gap_costs(gram, influence, power), STEPS)
    assert [len(p.computed) for p in found] == list(range(1, STEPS + 1))
    for count, placement in enumerate(found, 1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
        best = min(objective(gram, influence, computed, power) for computed in every)
        assert placement.predicted == pytest.approx(best, abs=1e-9)
        assert objective(gram, influence, placement.computed, power) == pytest.approx(best, abs=1e-9)


def test_planted_jumps_are_computed() -> None:
    """Values that jump to new directions at steps 3 and 5: these compute, whatever comes between."""
    values = torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1, 1, 2, 2, 2]]
    found = place(gap_costs(gram_of(values), torch.ones(8, dtype=torch.float64)), 4)
    assert found[2].computed == (0, 3, 5)
    assert found[2].predicted == pytest.approx(0, abs=1e-2) and found[1].predicted > 1


def test_influence_decides_between_equal_jumps() -> None:
    values = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]]
    for heavy, computed in ((2, (0, 2)), (4, (0, 4))):
        influence = torch.full((6,), 0.01, dtype=torch.float64)
        influence[heavy : heavy + 2] = 1.0
        assert place(gap_costs(gram_of(values), influence), 2)[1].computed == computed


def test_a_straight_line_needs_two_values() -> None:
    line = torch.arange(1.0, 9, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2]) + torch.tensor([3.0, -1])
    gram = gram_of(line)
    assert place(gap_costs(gram, torch.ones(8, dtype=torch.float64)), 2)[1].predicted < 0.05
    assert fit_weights(gram, 5, [1, 0]) == pytest.approx([5, -4], abs=1e-2)


def test_fitted_weights_are_least_squares() -> None:
    values = drifting(5)
    weights = fit_weights(gram_of(values), 6, [4, 3, 1])
    expected = torch.linalg.lstsq(values[[4, 3, 1]].T, values[6][:, None]).solution[:, 0]
    assert weights == pytest.approx(expected.tolist(), rel=1e-3)
    left = values[6] - torch.tensor(weights, dtype=torch.float64) @ values[[4, 3, 1]]
    found = squared_error(gram_of(values), 6, [4, 3, 1], weights)
    assert math.sqrt(found) == pytest.approx(float(left.norm()), rel=1e-6)


def test_anchors_and_even_steps() -> None:
    assert anchors_of(6, (0, 2, 5, 6, 7), 2) == [5, 2] and anchors_of(1, (0, 2), 3) == [0]
    assert even(5, 50) == (0, 12, 24, 37, 49) and even(1, 50) == (0,)
