"""Statistics over prompts that take constant memory: mean and variance by Welford's method, merged by that of Chan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

GUIDANCE = 0  # the distance of the conditional and the unconditional tensor of one step

MEASURES = ("l1", "variance", "relative_l1", "cosine", "mse")


class Row(NamedTuple):
    """The key of a line of the statistics.

    ``distance`` is the number of steps between the compared tensors, or `GUIDANCE`. ``head`` is None for all heads
    together. ``stream`` is that of the call, or "cond" and "uncond" for the halves of a batch.
    """

    site: str
    kind: str
    layer: int
    quantity: str
    modality: str
    stream: str
    head: int | None
    distance: int


def measures(moments: Tensor) -> Tensor:
    """Return the `MEASURES` of moments (see `passes.rewrite.tap.MOMENTS`), of any shape (..., 6).

    l1: the mean of |x - y|. variance: the variance of |x - y| among the elements. relative_l1: the sum of |x - y| over
    that of |y|. cosine: the cosine of the angle between x and y. mse: the mean of (x - y)².
    """
    distance, spread, size, product, square, reference = moments.double().unbind(-1)
    cosine = product / (square * reference).sqrt()
    return torch.stack([distance, spread, distance / size, cosine, spread + distance.square()], dim=-1)


@dataclass
class Table:
    """Count, mean and sum of squared deviations of each measure, by row and step: tensors (rows, steps, measures).

    A value that is not finite, such as the cosine of a zero tensor, is not counted.
    """

    rows: list[Row] = field(default_factory=list)
    count: Tensor = field(default_factory=lambda: _empty(0, 0))
    mean: Tensor = field(default_factory=lambda: _empty(0, 0))
    squares: Tensor = field(default_factory=lambda: _empty(0, 0))

    def __post_init__(self) -> None:
        self._index = {row: i for i, row in enumerate(self.rows)}

    @property
    def steps(self) -> int:
        return int(self.count.shape[1])

    def index(self, row: Row) -> int:
        return self._index[row]

    def __contains__(self, row: Row) -> bool:
        return row in self._index

    def add(self, profile: Mapping[Row, Tensor]) -> None:
        """Add one observation: the measures (steps, measures) of each row."""
        self.merge(Table.of(profile))

    @classmethod
    def of(cls, profile: Mapping[Row, Tensor]) -> Table:
        """Return the table of a single observation."""
        steps = max((int(values.shape[0]) for values in profile.values()), default=0)
        mean = torch.full((len(profile), steps, len(MEASURES)), math.nan, dtype=torch.float64)
        for i, values in enumerate(profile.values()):
            mean[i, : values.shape[0]] = values
        seen = mean.isfinite()
        return cls(list(profile), seen.double(), mean.where(seen, 0.0), torch.zeros_like(mean))

    def merge(self, other: Table) -> None:
        """Add the observations of another table."""
        rows = list(dict.fromkeys([*self.rows, *other.rows]))
        steps = max(self.steps, other.steps)
        mine, theirs = self._widened(rows, steps), other._widened(rows, steps)
        count = mine[0] + theirs[0]
        apart, share = theirs[1] - mine[1], torch.where(count > 0, theirs[0] / count, 0.0)
        mean = mine[1] + apart * share
        squares = mine[2] + theirs[2] + apart.square() * mine[0] * share
        self.rows, self.count, self.mean, self.squares = rows, count, mean, squares
        self.__post_init__()

    def _widened(self, rows: list[Row], steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and squares for more rows and steps."""
        own = [i for i, row in enumerate(rows) if row in self._index]
        order = [self._index[rows[i]] for i in own]
        found = []
        for values in (self.count, self.mean, self.squares):
            wide = _empty(len(rows), steps)
            if own:
                wide[own, : self.steps] = values[order]
            found.append(wide)
        return found[0], found[1], found[2]

    @property
    def means(self) -> Tensor:
        """The means, NaN where nothing was observed."""
        return self.mean.where(self.count > 0, math.nan)

    @property
    def deviations(self) -> Tensor:
        """The standard deviations over the observations, NaN for fewer than two."""
        return torch.where(self.count > 1, (self.squares / (self.count - 1)).sqrt(), math.nan)

    def select(self, rows: Iterable[Row]) -> list[int]:
        """Return the indices of rows."""
        return [self._index[row] for row in rows]


def _empty(rows: int, steps: int) -> Tensor:
    return torch.zeros(rows, steps, len(MEASURES), dtype=torch.float64)
