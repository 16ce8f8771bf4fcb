"""Place the computed steps of a trajectory: a dynamic programme over the errors of forecasts between them.

All errors are computed from the inner products of the values that a model gave at the steps of full runs (the Gram
matrix), so that no placement needs a run. With values v_i and weights w_k of the computed steps a_k before step i,

    |v_i - sum_k w_k v_(a_k)|^2  =  G[i, i] - 2 w . G[a, i] + w . G[a, a] w.

The weights that minimise it solve a small linear system. The objective is the sum over the forecast steps of the error,
relative to the mean size of the values, times the step's `influence` on the final image. It is exact for the values of
full runs, and neglects that a forecast changes the inputs of later steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-6  # of the diagonal's mean; consecutive values are nearly parallel


class Placement(NamedTuple):
    """The steps that compute, in order, and the objective that the dynamic programme predicts for them."""

    predicted: float
    computed: tuple[int, ...]


def fit_weights(gram: Tensor, step: int, anchors: Sequence[int]) -> list[float]:
    """Return the least-squares weights of the values at `anchors` for the value at `step`."""
    among = list(anchors)
    matrix = gram[among][:, among]
    ridge = RIDGE * matrix.diagonal().mean() * torch.eye(len(among), dtype=gram.dtype)
    weights: list[float] = torch.linalg.solve(matrix + ridge, gram[among, step]).tolist()
    return weights


def anchors_of(step: int, computed: Sequence[int], depth: int) -> list[int]:
    """Return the last `depth` computed steps before `step`, newest first."""
    return [i for i in reversed(computed) if i < step][:depth]


def squared_error(gram: Tensor, step: int, anchors: Sequence[int], weights: Sequence[float]) -> float:
    """Return the squared error of a weighted sum of the values at `anchors` for the value at `step`."""
    among, w = list(anchors), torch.tensor(weights, dtype=gram.dtype)
    error = gram[step, step] - 2 * w @ gram[among, step] + w @ gram[among][:, among] @ w
    return max(0.0, float(error))


def predict(
    gram: Tensor, influence: Tensor, rows: Sequence[Sequence[float]], computed: Sequence[int], power: float = 1.0
) -> float:
    """Return the objective of a table of weights, whose empty rows are the computed steps."""
    scale = float(gram.diagonal().mean())
    total = 0.0
    for step, row in enumerate(rows):
        if row:
            error = squared_error(gram, step, anchors_of(step, computed, len(row)), row)
            total += (float(influence[step]) * math.sqrt(error / scale)) ** power
    return total


def gap_costs(gram: Tensor, influence: Tensor, power: float = 1.0, begins: Sequence[int] = (0,)) -> Tensor:
    """Return the cost of the steps between two computed ones, with the best weights of two values.

    ``costs[a, b, c]`` is the sum over the steps after `a` and before `c`, which are forecast from the values at `a` and
    at `b` before it. ``b`` = number of steps means that `a` is the only value, and ``c`` = number of steps the end.

    At the steps `begins`, of which the first is 0, a denoiser begins, which has no value of the one before: these steps
    compute, and forecasts read no values from before them.
    """
    steps = len(gram)
    costs = torch.full((steps, steps + 1, steps + 1), math.inf, dtype=gram.dtype)
    scale = gram.diagonal().mean()
    for a in range(steps):
        for b in (steps, *range(a)):
            anchors = [a] if b == steps else [a, b]
            matrix = gram[anchors][:, anchors]
            ridge = RIDGE * matrix.diagonal().mean() * torch.eye(len(anchors), dtype=gram.dtype)
            right = gram[anchors][:, a + 1 :]
            weights = torch.linalg.solve(matrix + ridge, right)
            left = gram.diagonal()[a + 1 :] - 2 * (weights * right).sum(0) + (weights * (matrix @ weights)).sum(0)
            each = (influence[a + 1 :] * (left.clamp_min(0) / scale).sqrt()) ** power
            costs[a, b, a + 1] = 0.0
            costs[a, b, a + 2 :] = each.cumsum(0)
    for begin in begins[1:]:
        costs[:begin, :, begin + 1 :] = math.inf
        costs[begin:, :begin] = costs[begin:, steps:]
    return costs


def place(costs: Tensor, most: int) -> list[Placement]:
    """Return the placement of least cost for each number of computed steps from 1 to `most`. Step 0 always computes.

    The state of the dynamic programme is the last computed step and the one before it.
    """
    steps = len(costs)
    values = torch.full((steps, steps + 1), math.inf, dtype=costs.dtype)
    values[0, steps] = 0.0
    layers: list[Tensor] = []  # layers[n][c, a]: the step before a, for the best n + 2 computed steps that end in a, c
    found: list[Placement] = []
    for _ in range(min(most, steps)):
        ends = values + costs[:, :, steps]
        last = divmod(int(ends.argmin()), steps + 1)
        found.append(Placement(float(ends.min()), _path(layers, *last)))
        best = (values[:, :, None] + costs[:, :, :steps]).min(dim=1)  # over the step before, for (a, c)
        layers.append(best.indices.T)
        values = torch.full_like(values, math.inf)
        values[:, :steps] = best.values.T
    return found


def _path(layers: Sequence[Tensor], last: int, before: int) -> tuple[int, ...]:
    """Follow the dynamic programme back from its last two computed steps."""
    path = [last]
    for layer in reversed(layers):
        last, before = before, int(layer[last, before])
        path.append(last)
    return tuple(reversed(path))


def every(count: int, steps: int) -> tuple[int, ...]:
    """Return `count` evenly spaced steps from the first on, with as many forecasts after the last as between others."""
    return tuple(i * steps // count for i in range(count))


def even(count: int, steps: int) -> tuple[int, ...]:
    """Return `count` evenly spaced steps, the first and, if there are two, the last among them."""
    return tuple(round(i * (steps - 1) / max(count - 1, 1)) for i in range(count))
