"""How a forecast weights the last computed values of a site: the bases of the literature, as plain functions of places.

Each gives the weights w of "value = sum over k of w_k h_k", in float64, from the places of the computed values, newest
first, and the place of the step that forecasts. A place is a step, a noise level or its logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Basis(Protocol):
    """A way to weight computed values. `places` has one to `order` + 1 entries, or as many as the history has."""

    def history(self, order: int) -> int:
        """How many computed values it reads at most."""
        ...

    def weights(self, places: Sequence[float], place: float, order: int) -> Sequence[float]:
        """The weight of each of the values that were computed at `places`. May raise ZeroDivisionError."""
        ...


@dataclass(frozen=True)
class Taylor:
    """The polynomial through the last `order` + 1 computed values (Lagrange), at any distances."""

    def history(self, order: int) -> int:
        return order + 1

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        return lagrange(places[: order + 1], place)


@dataclass(frozen=True)
class TaylorSeer:
    """TaylorSeer's sum of differences (Liu et al. 2025, equation 3): each difference is divided by the last interval.

    Equal to `Taylor` up to order 1. Above, the differences are not those of the polynomial through the values.
    """

    def history(self, order: int) -> int:
        return order + 1

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        places = places[: order + 1]
        count = len(places)
        difference = [[float(i == k) for i in range(count)] for k in range(count)]  # of order 0: the values themselves
        total, factor = [0.0] * count, 1.0
        for j in range(count):
            factor *= (place - places[0]) / j if j else 1.0
            total = [t + factor * d for t, d in zip(total, difference[0], strict=True)]
            difference = [
                [(a - b) / (places[k] - places[k + 1]) for a, b in zip(difference[k], difference[k + 1], strict=True)]
                for k in range(len(difference) - 1)
            ]
        return total


def lagrange(places: Sequence[float], place: float) -> list[float]:
    """The weights by which values at `places` give the polynomial through them at `place`."""
    weights = []
    for i, at in enumerate(places):
        weight = 1.0
        for j, other in enumerate(places):
            weight *= (place - other) / (at - other) if j != i else 1.0
        weights.append(weight)
    return weights


BASES: dict[str, Callable[[], Basis]] = {"taylor": Taylor, "taylorseer": TaylorSeer}
