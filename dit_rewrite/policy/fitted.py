"""A basis whose weights were fitted to the values of one model, for one placement of the computed steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dit_rewrite.errors import BadParameter
from dit_rewrite.policy.core_strategies import is_number


@dataclass(frozen=True)
class Fitted:
    """Weights from a table: ``rows[i]`` are those of step i, for the last computed values, newest first.

    An empty row is a step that computes. The weights are valid only for values computed at the steps that the table
    computes; if a value is missing, or was computed at another step, there are no weights and the site computes. The
    order has no effect. Raises BadParameter.
    """

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rows = self.rows if isinstance(self.rows, tuple) and all(isinstance(row, tuple) for row in self.rows) else ()
        fits = rows and not rows[0] and all(is_number(weight) for row in rows for weight in row)
        if not fits or any(len(row) > len(self.computed_before(i)) for i, row in enumerate(rows)):
            allowed = "a tuple of numbers for each step, at most one for each earlier step with an empty tuple"
            raise BadParameter("Fitted", "rows", "…", allowed)

    @cached_property
    def computed(self) -> tuple[int, ...]:
        """The steps that compute."""
        return tuple(i for i, row in enumerate(self.rows) if not row)

    def computed_before(self, step: int) -> list[int]:
        """Return the computed steps before `step`, newest first."""
        return [i for i in reversed(self.computed) if i < step]

    def history(self, order: int) -> int:
        return max(2, *map(len, self.rows))  # a slot of one value is read without its weight

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        row = self.rows[int(place)] if place == int(place) and 0 <= place < len(self.rows) else ()
        if not row or list(places[: len(row)]) != self.computed_before(int(place))[: len(row)]:
            raise ValueError(f"the table has no weights at {place} for values computed at {places}")
        return list(row)
