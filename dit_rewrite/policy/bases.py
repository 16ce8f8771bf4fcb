"""How a forecast weights the last computed values of a site: the bases of the literature, as plain functions of places.

Each gives the weights w of "value = sum over k of w_k h_k", in float64, from the places of the computed values, newest
first, and the place of the step that forecasts. A place is a step, a noise level or its logarithm. The methods are
linear in the values, so that their recursions on tensors run here on vectors of weights.

Order 0 is reuse in every basis but `Magnitude`, and the weights add to 1 in every basis but that and `Chebyshev`, so
that a value that does not change is forecast as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args, runtime_checkable

from dit_rewrite.errors import BadParameter


@runtime_checkable
class Basis(Protocol):
    """A way to weight computed values. `places` has at least `order` + 1 entries, and at most as the history has."""

    def history(self, order: int) -> int:
        """How many computed values it reads at most."""
        ...

    def weights(self, places: Sequence[float], place: float, order: int) -> Sequence[float]:
        """The weights of the values that were computed at `places`; where there are fewer weights, the others are 0.

        Raises ZeroDivisionError or ValueError where these places have no weights, for instance where two coincide.
        """
        ...


class _Polynomial:
    def history(self, order: int) -> int:
        return order + 1


@dataclass(frozen=True)
class Taylor(_Polynomial):
    """The polynomial through the last `order` + 1 computed values (Lagrange), at any distances."""

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        return lagrange(places[: order + 1], place)


@dataclass(frozen=True)
class TaylorSeer(_Polynomial):
    """TaylorSeer's sum of differences (Liu et al. 2025, equation 3): sum over j of D_j k^j / j!.

    k is the distance from the newest value, and D_j its `differences`. Equal to `Taylor` up to order 1, and exact on
    straight lines. Above, the differences are not those of the polynomial through the values, so that the forecast is
    not exact on parabolas, even where the places are equally far apart.
    """

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        places = places[: order + 1]
        factors = [1.0]
        for j in range(1, len(places)):
            factors.append(factors[-1] * (place - places[0]) / j)
        return combine(factors, differences(places))


@dataclass(frozen=True)
class Hermite(_Polynomial):
    """HiCache (arXiv 2508.16984): TaylorSeer with s^j H_j(s k) in the place of k^j, s being `scale`.

    H_j are the physicists' Hermite polynomials, H_1(x) = 2x. The slope is 2 s^2 times that of TaylorSeer: half of it
    at the source's default of 0.5, all of it at 1 / sqrt(2), so that the forecast is not exact on straight lines.
    Unlike the other bases, it depends on the unit of the places: the source means steps, and from order 2 on a unit
    in which the distances are small gives large weights. Raises BadParameter.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        _require(self, "scale", _is_number(self.scale) and 0 < self.scale <= 1, "a number above 0, at most 1")

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        places = places[: order + 1]
        x = self.scale * (place - places[0])
        factors, power = [], 1.0  # power: s^j / j!
        before, polynomial = 0.0, 1.0
        for j in range(len(places)):
            factors.append(power * polynomial)
            power *= self.scale / (j + 1)
            before, polynomial = polynomial, 2 * x * polynomial - 2 * j * before
        return combine(factors, differences(places))


@dataclass(frozen=True)
class Chebyshev:
    """Spectrum (arXiv 2603.01623): a ridge fit of Chebyshev polynomials to all values that the history has, blended
    with an extrapolation of the last ones.

    The order of the forecast is the degree of the fit, 4 in the source. `ridge` is added to the diagonal of the normal
    equations, that of the constant too. `blend` is the share of the fit; the rest is `newton_forward` of
    `taylor_order`. `domain` is the interval of places that is mapped to [-1, 1]: the source has steps 0 to 50, however
    many there are. Where the places fill a small part of it, as noise levels do, the ridge keeps the fit from following
    even a straight line: give (0, number of steps), or the least and the greatest noise level. None is from the oldest
    of the values to the place forecast, which makes the weights independent of the unit.

    The weights do not add to 1, because of the ridge. The source keeps all computed values; here 8 are read
    unless the forecast's `history` says otherwise. With no more values than the degree, the degree falls; the source
    would leave that to the ridge, but its warm-up of 5 steps prevents it at degree 4. Raises BadParameter.
    """

    ridge: float = 0.1
    blend: float = 0.5
    taylor_order: int = 1
    domain: tuple[float, float] | None = (0, 50)

    def __post_init__(self) -> None:
        _require(self, "ridge", _is_number(self.ridge) and self.ridge > 0, "a number above 0")
        _require(self, "blend", _is_number(self.blend) and 0 <= self.blend <= 1, "a number from 0 to 1")
        _require(self, "taylor_order", type(self.taylor_order) is int and 1 <= self.taylor_order <= 3, "1, 2 or 3")
        ends = self.domain if isinstance(self.domain, tuple) else ()
        fits = self.domain is None or (len(ends) == 2 and all(map(_is_number, ends)) and ends[0] < ends[1])
        _require(self, "domain", fits, "(first, last) with first < last, or None")

    def history(self, order: int) -> int:
        return max(8, order + 1) if order else 1

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        if order == 0:
            return [1.0]
        if len(set(places)) < len(places):
            raise ValueError("two values were computed at one place")
        newton = newton_forward(places[: self.taylor_order + 1], place)
        newton += [0.0] * (len(places) - len(newton))
        return combine((self.blend, 1 - self.blend), (self._fit(places, place, order), newton))

    def _fit(self, places: Sequence[float], place: float, degree: int) -> list[float]:
        """x X' of the fit: x = row of `place` times the inverse of X'X + ridge, X having a row for each value."""
        low, high = (places[-1], place) if self.domain is None else self.domain
        *rows, row = (chebyshev((2 * at - low - high) / (high - low), degree) for at in (*places, place))
        columns = list(zip(*rows, strict=True))
        normal = [[_dot(a, b) for b in columns] for a in columns]
        for i, line in enumerate(normal):
            line[i] += self.ridge
        x = solve(normal, row)
        return [_dot(x, values) for values in rows]


Variant = Literal["paper", "cache-dit"]


@dataclass(frozen=True)
class BDF:
    """FoCa (arXiv 2508.16211): a BDF2 predictor with a Heun corrector, step by step on its own forecasts.

    F and F- are the values of the last two steps, computed or forecast; Y0 and Y1 the last two computed ones, h steps
    apart. With a step as the unit, equation 7 with F' = F - F- predicts 2 F - F-, equation 6 gives F - F- for its
    derivative, and equation 8 corrects: F + ((Y0 - Y1) / h + F - F-) / 2. The authors have no code published, and the
    paper leaves open what the derivative at the last computed step is, here (Y0 - Y1) / h, and whether the corrector
    starts at F, as equation 8 is written and done here, or at Y0. ``variant="cache-dit"`` is what cache-dit 1.5.3 does
    instead: Y0 + g (Y0 - Y1 + F - F-), g being e / 2 at the e-th step after Y0 up to the third, and 4.5 / e then. It
    does not divide by h, and goes too far where values are computed every few steps.

    Order 0 is reuse; above, the order does not matter. The recursion goes back to the last two adjacent steps that
    were computed, which may be the first ones. By default 4 values are read, and it starts at the oldest two: the
    paper's with the straight line between them, so that it is exact on straight lines; cache-dit's with reuse, as its
    code does at the start. The weights of the paper's grow with the interval, and with the values that are read. Places
    must be steps: of others, nobody knows how many lie between. Raises BadParameter.
    """

    variant: Variant = "paper"

    def __post_init__(self) -> None:
        allowed = get_args(Variant)
        _require(self, "variant", self.variant in allowed, " or ".join(f'"{name}"' for name in allowed))

    def history(self, order: int) -> int:
        return 4 if order else 1

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        if order == 0:
            return [1.0]
        now, *steps = _steps(place, places)
        ends, values = [now + 1, *steps], _units(len(steps))
        share = 1 / (steps[-2] - steps[-1]) if self.variant == "paper" else 1.0
        last = combine((share, 1 - share), (values[-1], values[-2]))  # of the step before the second computed one
        for n in reversed(range(len(steps) - 1)):
            before, last = last, values[n]
            for elapsed in range(1, ends[n] - steps[n]):
                factors = self._factors(elapsed, steps[n] - steps[n + 1])
                before, last = last, combine(factors, (last, before, values[n], values[n + 1]))
        return last

    def _factors(self, elapsed: int, gap: int) -> tuple[float, float, float, float]:
        """Of F, F-, Y0 and Y1."""
        if self.variant == "paper":
            return 1.5, -0.5, 0.5 / gap, -0.5 / gap
        g = elapsed / 2 if elapsed <= 3 else 4.5 / elapsed
        return g, -g, 1 + g, -g


@dataclass(frozen=True)
class Magnitude:
    """The newest value times the product of the ratios of the steps since it was computed.

    ``ratios[i]`` is how much larger the value of step i is than that of step i - 1, measured on runs that compute
    everything; MagCache (arXiv 2506.09045) publishes such tables, and takes them for its estimate of the error only.
    The order does not matter. Places must be steps of the table, which is of one number of steps. Raises BadParameter.
    """

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        table = self.ratios if isinstance(self.ratios, tuple) else ()
        fits = table and all(_is_number(ratio) and ratio > 0 for ratio in table)
        _require(self, "ratios", fits, "a tuple of numbers above 0, one for each step")

    def history(self, order: int) -> int:
        return 1

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        now, computed = _steps(place, places[:1])
        if not 0 <= computed < now < len(self.ratios):
            raise ValueError(f"the table of ratios does not have step {now}")
        return [math.prod(self.ratios[computed + 1 : now + 1])]


BASES: dict[str, Callable[[], Basis]] = {
    "taylor": Taylor,
    "taylorseer": TaylorSeer,
    "hermite": Hermite,
    "chebyshev": Chebyshev,
    "bdf": BDF,
}
KINDS: dict[str, type] = {**BASES, "magnitude": Magnitude}  # type: ignore[dict-item]  # those that can be saved


def lagrange(places: Sequence[float], place: float) -> list[float]:
    """The weights by which values at `places` give the polynomial through them at `place`."""
    return [math.prod((place - b) / (a - b) for j, b in enumerate(places) if j != i) for i, a in enumerate(places)]


def differences(places: Sequence[float]) -> list[list[float]]:
    """TaylorSeer's differences D_0, D_1, … of the newest value, as weights: D_0 is the value, and D_j+1 the change of
    D_j since the value before, divided by the distance of these two."""
    found, rows = [], _units(len(places))
    while rows:
        found.append(rows[0])
        gaps = [a - b for a, b in pairwise(places)]
        rows = [combine((1 / gap, -1 / gap), pair) for gap, pair in zip(gaps, pairwise(rows), strict=False)]
    return found


def newton_forward(places: Sequence[float], place: float) -> list[float]:
    """Spectrum's extrapolation: sum over j of binomial(k, j) times the j-th difference of the newest values.

    k is the distance in units of the last interval, to which the others are taken to be equal. From order 2 on it is
    not the polynomial through the values, which has binomial(k + j - 1, j).
    """
    k = (place - places[0]) / (places[0] - places[1])
    weights, binomial = [0.0] * len(places), 1.0
    for j in range(len(places)):
        weights = [w + binomial * (-1) ** i * math.comb(j, i) for i, w in enumerate(weights)]
        binomial *= (k - j) / (j + 1)
    return weights


def chebyshev(x: float, degree: int) -> list[float]:
    """T_0(x) to T_degree(x)."""
    values = [1.0, x]
    for _ in range(degree - 1):
        values.append(2 * x * values[-1] - values[-2])
    return values[: degree + 1]


def solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """The solution of a positive definite system: Gauss-Jordan elimination, which needs no pivoting there."""
    lines = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for i, line in enumerate(lines):
        line[:] = [a / line[i] for a in line]
        for other in lines:
            if other is not line:
                other[:] = combine((1.0, -other[i]), (other, line))
    return [line[-1] for line in lines]


def combine(factors: Sequence[float], vectors: Sequence[Sequence[float]]) -> list[float]:
    """The sum of the vectors, each times its factor."""
    return [_dot(factors, column) for column in zip(*vectors, strict=True)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _units(count: int) -> list[list[float]]:
    """The computed values themselves, as weights."""
    return [[float(i == k) for i in range(count)] for k in range(count)]


def _steps(place: float, places: Sequence[float]) -> list[int]:
    """This step and the computed ones, newest first. Raises ValueError where they are no steps in turn."""
    steps = [int(at) for at in (place, *places)]
    if steps != [place, *places] or any(a <= b for a, b in pairwise(steps)):
        raise ValueError("the places are no steps: give the forecast over='step'")
    return steps


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _require(basis: Basis, name: str, fits: object, allowed: str) -> None:
    if not fits:
        raise BadParameter(type(basis).__name__, name, getattr(basis, name), allowed)
