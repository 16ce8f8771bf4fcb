"""Forecast bases of the literature: they map the places of a site's last computed values to forecast weights.

A forecast is sum_k w_k h_k, where h_k are the last computed values, newest first. A basis computes the weights w in
float64 from the places of these values and the place of the current step. A place is a step, a noise level or its
logarithm. All bases are linear in the values, so a recursion that a paper defines on tensors runs here on vectors of
weights.

Order 0 is reuse in every basis except `Magnitude`. The weights add up to 1, so that a constant value is forecast
exactly, in every basis except `Magnitude` and `Chebyshev`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args, runtime_checkable

from dit_rewrite.errors import BadParameter
from dit_rewrite.policy.core_strategies import is_number


@runtime_checkable
class Basis(Protocol):
    """Interface of a basis. `places` has at least `order` + 1 entries, and at most as many as the history keeps."""

    def history(self, order: int) -> int:
        """Return the maximum number of computed values that `weights` reads."""
        ...

    def weights(self, places: Sequence[float], place: float, order: int) -> Sequence[float]:
        """Return the weights of the values computed at `places`. If it returns fewer weights, the others are 0.

        Raises ZeroDivisionError or ValueError if the weights are undefined, for example if two places coincide.
        """
        ...


class _Polynomial:
    def history(self, order: int) -> int:
        return order + 1


@dataclass(frozen=True)
class Taylor(_Polynomial):
    """The Lagrange polynomial through the last `order` + 1 computed values; the places need not be evenly spaced."""

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        return lagrange(places[: order + 1], place)


@dataclass(frozen=True)
class TaylorSeer(_Polynomial):
    """TaylorSeer's sum of differences (Liu et al. 2025, equation 3): sum over j of D_j k^j / j!.

    k is the distance from the newest value, and D_j are its `differences`. This equals `Taylor` up to order 1, so it is
    exact for straight lines. From order 2 on, the differences are not those of the interpolating polynomial, so the
    forecast is not exact for parabolas, even if the places are evenly spaced.
    """

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        places = places[: order + 1]
        factors = [1.0]
        for j in range(1, len(places)):
            factors.append(factors[-1] * (place - places[0]) / j)
        return combine(factors, differences(places))


@dataclass(frozen=True)
class Hermite(_Polynomial):
    """HiCache (arXiv 2508.16984): TaylorSeer with s^j H_j(s k) instead of k^j, where s is `scale`.

    H_j are the physicists' Hermite polynomials, H_1(x) = 2x. The slope is 2 s^2 times TaylorSeer's: half of it at the
    source's default scale of 0.5, and equal at 1 / sqrt(2). Below that scale the forecast is not exact for straight
    lines. Unlike the other bases, this one depends on the unit of the places. The source uses steps; from order 2 on,
    a unit with small distances gives large weights. Raises BadParameter.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        _require(self, "scale", _is_finite(self.scale) and 0 < self.scale <= 1, "a number above 0, at most 1")

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
    """Spectrum (arXiv 2603.01623): a ridge fit of Chebyshev polynomials to all values in the history, blended with an
    extrapolation of the last ones.

    The order of the forecast is the degree of the fit; the source uses 4. `ridge` is added to the diagonal of the
    normal equations, including the constant's entry. `blend` is the weight of the fit; the rest is `newton_forward` of
    `taylor_order`. `domain` is the interval of places that is mapped to [-1, 1]. The source uses steps 0 to 50 for any
    number of steps. If the places fill only a small part of the domain, as noise levels do, the ridge prevents the fit
    from following even a straight line; give (0, number of steps), or (smallest, largest noise level). None uses the
    interval from the oldest value to the current step, which makes the weights independent of the unit.

    The weights do not add up to 1, because of the ridge. The source keeps all computed values; this basis reads 8
    unless the forecast's `history` says otherwise. If there are no more values than the degree, the degree falls. The
    source relies on the ridge in that case, but its warm-up of 5 steps prevents it at degree 4. Raises BadParameter.
    """

    ridge: float = 0.1
    blend: float = 0.5
    taylor_order: int = 1
    domain: tuple[float, float] | None = (0, 50)

    def __post_init__(self) -> None:
        _require(self, "ridge", _is_finite(self.ridge) and self.ridge > 0, "a number above 0")
        _require(self, "blend", _is_finite(self.blend) and 0 <= self.blend <= 1, "a number from 0 to 1")
        _require(self, "taylor_order", type(self.taylor_order) is int and 1 <= self.taylor_order <= 3, "1, 2 or 3")
        ends = self.domain if isinstance(self.domain, tuple) else ()
        fits = self.domain is None or (len(ends) == 2 and all(map(_is_finite, ends)) and ends[0] < ends[1])
        _require(self, "domain", fits, "(first, last) with first < last, or None")

    def history(self, order: int) -> int:
        return max(8, order + 1) if order else 1

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        if order == 0:
            return [1.0]
        if len(set(places)) < len(places):
            raise ValueError("two values were computed at the same place")
        newton = newton_forward(places[: self.taylor_order + 1], place)
        newton += [0.0] * (len(places) - len(newton))
        return combine((self.blend, 1 - self.blend), (self._fit(places, place, order), newton))

    def _fit(self, places: Sequence[float], place: float, degree: int) -> list[float]:
        """Return x X', where x is the row of `place` times the inverse of X'X + ridge, and X has a row per value."""
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
    """FoCa (arXiv 2508.16211): a BDF2 predictor with a Heun corrector, applied step by step to its own forecasts.

    F and F- are the values of the last two steps, computed or forecast; Y0 and Y1 are the last two computed values, h
    steps apart. With a step as the unit, equation 7 with F' = F - F- predicts 2 F - F-, equation 6 gives F - F- as its
    derivative, and equation 8 corrects the prediction to F + ((Y0 - Y1) / h + F - F-) / 2. The authors published no
    code, and the paper leaves two points open: the derivative at the last computed step, which is (Y0 - Y1) / h here,
    and whether the corrector starts at F, as in equation 8 and here, or at Y0. ``variant="cache-dit"`` follows
    cache-dit 1.5.3: Y0 + g (Y0 - Y1 + F - F-), where g is e / 2 at the e-th step after Y0 for e <= 3, and 4.5 / e
    after that. It does not divide by h, so it overshoots if values are computed only every few steps.

    Order 0 is reuse; all orders above 0 are equal. The recursion depends on all values back to the last two adjacent
    steps that were computed, which may be the first two of the trajectory. This basis reads at most 4 values and
    starts from the oldest two: the "paper" variant with the line through them, so it is exact for straight lines; the
    "cache-dit" variant with reuse, as cache-dit does at the first step. The weights of the "paper" variant grow with
    the interval and with the number of values. Places must be steps, because the recursion needs the number of steps
    between them. Raises BadParameter.
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
        last = combine((share, 1 - share), (values[-1], values[-2]))  # value of the step before the second computed one
        for n in reversed(range(len(steps) - 1)):
            before, last = last, values[n]
            for elapsed in range(1, ends[n] - steps[n]):
                factors = self._factors(elapsed, steps[n] - steps[n + 1])
                before, last = last, combine(factors, (last, before, values[n], values[n + 1]))
        return last

    def _factors(self, elapsed: int, gap: int) -> tuple[float, float, float, float]:
        """Return the factors of F, F-, Y0 and Y1."""
        if self.variant == "paper":
            return 1.5, -0.5, 0.5 / gap, -0.5 / gap
        g = elapsed / 2 if elapsed <= 3 else 4.5 / elapsed
        return g, -g, 1 + g, -g


@dataclass(frozen=True)
class Magnitude:
    """The newest value times the product of the magnitude ratios of the steps since it was computed.

    ``ratios[i]`` is the magnitude of the value at step i divided by that at step i - 1, measured on runs that compute
    every step. MagCache (arXiv 2506.09045) publishes such tables, but uses them only to estimate the error. The order
    has no effect. Places must be steps, and the table is valid for one number of steps only. Raises BadParameter.
    """

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        table = self.ratios if isinstance(self.ratios, tuple) else ()
        fits = table and all(_is_finite(ratio) and ratio > 0 for ratio in table)
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
KINDS: dict[str, type] = {**BASES, "magnitude": Magnitude}  # type: ignore[dict-item]  # bases that can be saved


def lagrange(places: Sequence[float], place: float) -> list[float]:
    """Return the weights that evaluate the polynomial through the values at `places` at `place`."""
    return [math.prod((place - b) / (a - b) for j, b in enumerate(places) if j != i) for i, a in enumerate(places)]


def differences(places: Sequence[float]) -> list[list[float]]:
    """Return TaylorSeer's differences D_0, D_1, … of the newest value, as weights. D_0 is the value, and D_j+1 the
    change of D_j since the previous value, divided by the distance of the two places."""
    found, rows = [], _units(len(places))
    while rows:
        found.append(rows[0])
        gaps = [a - b for a, b in pairwise(places)]
        rows = [combine((1 / gap, -1 / gap), pair) for gap, pair in zip(gaps, pairwise(rows), strict=False)]
    return found


def newton_forward(places: Sequence[float], place: float) -> list[float]:
    """Return the weights of Spectrum's extrapolation: sum over j of binomial(k, j) times the j-th difference.

    k is the distance from the newest value in units of the last interval; all intervals are assumed equal. From order 2
    on this is not the interpolating polynomial, which has binomial(k + j - 1, j).
    """
    k = (place - places[0]) / (places[0] - places[1])
    weights, binomial = [0.0] * len(places), 1.0
    for j in range(len(places)):
        weights = [w + binomial * (-1) ** i * math.comb(j, i) for i, w in enumerate(weights)]
        binomial *= (k - j) / (j + 1)
    return weights


def chebyshev(x: float, degree: int) -> list[float]:
    """Return the Chebyshev polynomials T_0(x) to T_degree(x)."""
    values = [1.0, x]
    for _ in range(degree - 1):
        values.append(2 * x * values[-1] - values[-2])
    return values[: degree + 1]


def solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Solve a positive definite system by Gauss-Jordan elimination, which needs no pivoting in this case."""
    lines = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for i, line in enumerate(lines):
        line[:] = [a / line[i] for a in line]
        for other in lines:
            if other is not line:
                other[:] = combine((1.0, -other[i]), (other, line))
    return [line[-1] for line in lines]


def combine(factors: Sequence[float], vectors: Sequence[Sequence[float]]) -> list[float]:
    """Return the linear combination of `vectors` with `factors`."""
    return [_dot(factors, column) for column in zip(*vectors, strict=True)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _units(count: int) -> list[list[float]]:
    """Return the unit vectors: the computed values themselves, as weights."""
    return [[float(i == k) for i in range(count)] for k in range(count)]


def _steps(place: float, places: Sequence[float]) -> list[int]:
    """Return the current and the computed steps, newest first. Raises ValueError unless they are falling integers."""
    steps = [int(at) for at in (place, *places)]
    if steps != [place, *places] or any(a <= b for a, b in pairwise(steps)):
        raise ValueError("the places are not steps: use over='step'")
    return steps


def _is_finite(value: object) -> bool:
    return is_number(value) and -math.inf < value < math.inf


def _require(basis: Basis, name: str, fits: object, allowed: str) -> None:
    if not fits:
        raise BadParameter(type(basis).__name__, name, getattr(basis, name), allowed)
