"""The bases of forecasts: against the sources' recursions on real tensors, and on functions where each is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dit_rewrite.errors import BadParameter
from dit_rewrite.policy.bases import (
    BASES,
    BDF,
    Basis,
    Chebyshev,
    Hermite,
    Magnitude,
    Taylor,
    TaylorSeer,
    chebyshev,
)

AFFINE = [Taylor(), TaylorSeer(), Hermite(), Hermite(0.7), BDF(), BDF("cache-dit")]  # their weights add to 1
LOCAL = [Taylor(), TaylorSeer(), Hermite(), Chebyshev(), BDF(), BDF("cache-dit")]


def backwards(gaps: Sequence[float], start: float) -> list[float]:
    """Places at these distances from one another, newest first."""
    places = [start]
    for gap in gaps:
        places.insert(0, places[0] + gap)
    return places


GAPS = st.lists(st.integers(1, 6), min_size=1, max_size=6)
STEPS = st.builds(backwards, GAPS, st.integers(0, 20))
AHEAD = st.integers(1, 6)
NOISE = st.builds(backwards, st.lists(st.floats(-2, -0.05), min_size=1, max_size=5), st.floats(5, 10))


def features(count: int) -> torch.Tensor:
    """A vector of features for each computed value, newest first."""
    return torch.randn(count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def forecast(basis: Basis, places: Sequence[float], place: float, order: int, values: torch.Tensor) -> torch.Tensor:
    weights = basis.weights(places, place, min(order, len(places) - 1))
    return torch.tensor(weights, dtype=torch.float64) @ values[: len(weights)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(1.0, float(expected.abs().max())))


def taylorseer_factors(steps: Sequence[int], values: torch.Tensor, order: int) -> list[torch.Tensor]:
    """TaylorSeer's `derivative_approximation`, called at each computed step; returns the newest factors."""
    factors: list[torch.Tensor] = []
    before = None
    for step, value in zip(reversed(steps), values.flip(0), strict=True):
        updated = [value]
        for i in range(order):
            if i >= len(factors):
                break
            updated.append((updated[i] - factors[i]) / (step - before))
        factors, before = updated, step
    return factors


@given(STEPS, AHEAD, st.integers(0, 4))
def test_taylorseer_is_its_sources_recursion(steps: list[int], ahead: int, order: int) -> None:
    values = features(len(steps))
    factors = taylorseer_factors(steps, values, order)
    expected = sum(ahead**i / math.factorial(i) * factor for i, factor in enumerate(factors))
    close(forecast(TaylorSeer(), steps, steps[0] + ahead, order, values), expected)


HERMITE = [  # the physicists' polynomials, as tables have them
    lambda x: 1.0,
    lambda x: 2 * x,
    lambda x: 4 * x**2 - 2,
    lambda x: 8 * x**3 - 12 * x,
    lambda x: 16 * x**4 - 48 * x**2 + 12,
]


@given(STEPS, AHEAD, st.integers(0, 4), st.sampled_from([0.3, 0.5, 0.71, 1.0]))
def test_hermite_is_hicaches_formula(steps: list[int], ahead: int, order: int, scale: float) -> None:
    values = features(len(steps))
    expected = torch.zeros(16, dtype=torch.float64)
    for i, factor in enumerate(taylorseer_factors(steps, values, order)):
        expected += HERMITE[i](scale * ahead) / math.factorial(i) * scale**i * factor
    close(forecast(Hermite(scale), steps, steps[0] + ahead, order, values), expected)


def spectrum(steps: Sequence[int], now: int, values: torch.Tensor, degree: int, basis: Chebyshev) -> torch.Tensor:
    """Spectrum's forecaster: coefficients by Cholesky, blended with its `_local_taylor_discrete`."""
    t = torch.tensor(list(reversed(steps)), dtype=torch.float64)
    h = values.flip(0)

    def design(t: torch.Tensor) -> torch.Tensor:
        tau = (t - 25.0) * 2.0 / 50.0
        columns = [torch.ones_like(tau), tau]
        for _ in range(2, degree + 1):
            columns.append(2 * tau * columns[-1] - columns[-2])
        return torch.stack(columns[: degree + 1], dim=1)

    x = design(t)
    factor = torch.linalg.cholesky(x.T @ x + basis.ridge * torch.eye(degree + 1, dtype=torch.float64))
    fit = (design(torch.tensor([now], dtype=torch.float64)) @ torch.cholesky_solve(x.T @ h, factor))[0]
    k = (now - t[-1]) / (t[-1] - t[-2])
    local = h[-1] + k * (h[-1] - h[-2])
    if basis.taylor_order >= 2 and len(t) >= 3:
        local = local + 0.5 * k * (k - 1) * (h[-1] - 2 * h[-2] + h[-3])
    if basis.taylor_order >= 3 and len(t) >= 4:
        local = local + k * (k - 1) * (k - 2) / 6 * (h[-1] - 3 * h[-2] + 3 * h[-3] - h[-4])
    return (1 - basis.blend) * local + basis.blend * fit


FITS = st.builds(Chebyshev, st.sampled_from([1e-3, 0.1, 1.0]), st.sampled_from([0, 0.5, 1.0]), st.integers(1, 3))


@given(STEPS, AHEAD, st.integers(1, 4), FITS)
def test_chebyshev_is_spectrums_ridge_fit(steps: list[int], ahead: int, degree: int, basis: Chebyshev) -> None:
    degree, values = min(degree, len(steps) - 1), features(len(steps))
    expected = spectrum(steps, steps[0] + ahead, values, degree, basis)
    close(forecast(basis, steps, steps[0] + ahead, degree, values), expected)


def foca_of_cache_dit(steps: Sequence[int], now: int, values: torch.Tensor) -> torch.Tensor:
    """cache-dit's FoCaState, called at each step from the first computed one on."""
    computed = dict(zip(steps, values, strict=True))
    current = previous = full = full_before = full_step = None
    for step in range(steps[-1], now + 1):
        if step in computed:
            full_before, full, full_step = full, computed[step], step
            previous, current = current, full
        elif full_before is not None:
            elapsed, slopes = step - full_step, full - full_before + current - previous
            result = full + min(elapsed, 3) / 2 * slopes
            if elapsed > 3:
                result = 3 / elapsed * result + (1 - 3 / elapsed) * full
            previous, current = current, result
    return current


@given(STEPS, AHEAD)
def test_bdf_of_cache_dit_is_its_loop(steps: list[int], ahead: int) -> None:
    values = features(len(steps))
    expected = foca_of_cache_dit(steps, steps[0] + ahead, values)
    close(forecast(BDF("cache-dit"), steps, steps[0] + ahead, 1, values), expected)


def foca_of_the_paper(steps: Sequence[int], now: int, values: torch.Tensor) -> torch.Tensor:
    """Equations 7, 6 and 8 with h = 1, at each step; the first two computed steps are adjacent."""
    computed = dict(zip(steps, values, strict=True))
    older, last = computed[steps[-1]], computed[steps[-2]]
    full = last - older
    for step in range(steps[-2] + 1, now + 1):
        if step in computed:
            before = max(s for s in steps if s < step)
            full = (computed[step] - computed[before]) / (step - before)
            older, last = last, computed[step]
        else:
            predicted = 4 / 3 * last - 1 / 3 * older + 2 / 3 * (last - older)
            derivative = (3 * predicted - 4 * last + older) / 2
            older, last = last, last + (full + derivative) / 2
    return last


@given(GAPS, AHEAD)
def test_bdf_is_the_papers_equations(gaps: list[int], ahead: int) -> None:
    steps = backwards([1, *gaps], 0)
    values = features(len(steps))
    close(forecast(BDF(), steps, steps[0] + ahead, 1, values), foca_of_the_paper(steps, int(steps[0]) + ahead, values))


@pytest.mark.parametrize("basis", AFFINE, ids=str)
@given(steps=STEPS, ahead=AHEAD, order=st.integers(0, 4))
def test_weights_add_to_one(basis: Basis, steps: list[int], ahead: int, order: int) -> None:
    weights = basis.weights(steps, steps[0] + ahead, min(order, len(steps) - 1))
    assert abs(math.fsum(weights) - 1) < 1e-12 * max(1, math.fsum(map(abs, weights)))


def test_weights_of_a_ridge_fit_do_not_add_to_one() -> None:
    steps = [9, 7, 4, 3, 2, 1, 0]
    assert sum(Chebyshev(blend=1).weights(steps, 10, 4)) < 0.99
    assert sum(Chebyshev(blend=0).weights(steps, 10, 4)) == pytest.approx(1)


def polynomial(coefficients: Sequence[float], place: float) -> float:
    return sum(c * place**i for i, c in enumerate(coefficients))


def error(basis: Basis, places: Sequence[float], place: float, order: int, coefficients: Sequence[float]) -> float:
    """The error of the forecast of a polynomial, relative to the terms of the sum."""
    weights = basis.weights(places, place, order)
    terms = [w * polynomial(coefficients, at) for w, at in zip(weights, places, strict=False)]
    return (sum(terms) - polynomial(coefficients, place)) / max(1.0, sum(map(abs, terms)))


COEFFICIENTS = st.lists(st.floats(-1, 1), min_size=1, max_size=5)


@given(NOISE, st.floats(0.05, 2), COEFFICIENTS)
def test_taylor_is_exact_on_polynomials_at_any_distances(
    places: list[float], ahead: float, coefficients: list[float]
) -> None:
    order = len(places) - 1
    assert abs(error(Taylor(), places, places[0] - ahead, order, coefficients[: order + 1])) < 1e-9


def test_taylor_is_not_exact_above_its_order() -> None:
    assert abs(error(Taylor(), [7, 5, 4], 9, 1, [0, 0, 1])) > 0.01


@pytest.mark.parametrize("basis", [TaylorSeer(), BDF()], ids=str)
@given(steps=STEPS, ahead=AHEAD, order=st.integers(1, 4), line=st.tuples(st.floats(-1, 1), st.floats(-1, 1)))
def test_exact_on_straight_lines(
    basis: Basis, steps: list[int], ahead: int, order: int, line: tuple[float, float]
) -> None:
    assert abs(error(basis, steps, steps[0] + ahead, min(order, len(steps) - 1), line)) < 1e-9


@given(st.integers(1, 6), AHEAD)
def test_taylorseer_misses_a_parabola_by_half_an_interval_of_slope(h: int, k: int) -> None:
    """Even at equal distances: an error of k h for the square, since k^2 / 2 replaces k (k + h) / 2."""
    weights = TaylorSeer().weights([2 * h, h, 0], 2 * h + k, 2)
    found = weights[0] * 4 * h * h + weights[1] * h * h
    assert found == pytest.approx((2 * h + k) ** 2 - k * h)


def test_taylorseer_is_taylor_up_to_order_1() -> None:
    assert TaylorSeer().weights([7, 4], 9, 1) == pytest.approx(Taylor().weights([7, 4], 9, 1))
    assert TaylorSeer().weights([7, 4, 2], 9, 2) != pytest.approx(Taylor().weights([7, 4, 2], 9, 2))


def test_hermite_halves_the_slope_at_its_default_scale() -> None:
    assert Hermite().weights([6, 3], 8, 1) == pytest.approx([1 + 1 / 3, -1 / 3])
    assert Hermite(1 / math.sqrt(2)).weights([6, 3], 8, 1) == pytest.approx([1 + 2 / 3, -2 / 3])


def test_bdf_of_cache_dit_does_not_divide_by_the_interval() -> None:
    assert BDF("cache-dit").weights([3, 0], 4, 1) == [2, -1]
    assert BDF("paper").weights([3, 0], 4, 1) == pytest.approx([4 / 3, -1 / 3])


def test_bdf_reads_back_to_two_adjacent_steps() -> None:
    for variant in ("paper", "cache-dit"):
        assert BDF(variant).weights([5, 4, 2, 0], 7, 1)[2:] == [0, 0]
        assert BDF(variant).weights([6, 4, 2, 0], 7, 1)[3] != 0


@given(st.floats(-2, 2), st.integers(0, 8))
def test_chebyshev_polynomials(x: float, degree: int) -> None:
    values = chebyshev(x, degree)
    assert len(values) == degree + 1
    if abs(x) <= 1:
        assert values == pytest.approx([math.cos(m * math.acos(x)) for m in range(degree + 1)], abs=1e-9)


@given(STEPS, AHEAD)
def test_a_fit_without_ridge_is_the_polynomial_through_the_values(steps: list[int], ahead: int) -> None:
    assume(len(steps) <= 4)
    order, place = len(steps) - 1, steps[0] + ahead
    expected = Taylor().weights(steps, place, order)
    scale = max(map(abs, expected))
    found = Chebyshev(ridge=1e-14, blend=1, domain=None).weights(steps, place, order)
    assert found == pytest.approx(expected, abs=1e-5 * scale)


@given(STEPS, AHEAD, st.floats(-3, 3).filter(lambda scale: abs(scale) > 1e-2), st.floats(-5, 5))
def test_a_fit_without_domain_knows_no_unit(steps: list[int], ahead: int, scale: float, shift: float) -> None:
    basis, order, place = Chebyshev(domain=None), min(4, len(steps) - 1), steps[0] + ahead
    expected = basis.weights(steps, place, order)
    found = basis.weights([scale * at + shift for at in steps], scale * place + shift, order)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("domain, follows", [((0, 50), False), ((0, 1), True), (None, True)], ids=str)
def test_a_fit_follows_noise_levels_where_they_fill_its_domain(
    domain: tuple[float, float] | None, follows: bool
) -> None:
    places = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    weights = Chebyshev(blend=1, domain=domain).weights(places, 0.25, 4)
    of_reuse = places[0] - 0.25
    assert (abs(sum(w * at for w, at in zip(weights, places, strict=True)) - 0.25) < of_reuse) == follows


@pytest.mark.parametrize("basis", LOCAL, ids=str)
def test_order_0_is_reuse(basis: Basis) -> None:
    assert basis.history(0) == 1
    assert list(basis.weights([7, 4, 2], 9, 0)) == [1]
    assert list(basis.weights([7], 9, 0)) == [1]


@pytest.mark.parametrize("basis", [Taylor(), TaylorSeer(), Hermite()], ids=str)
def test_a_basis_reads_no_more_than_its_order_takes(basis: Basis) -> None:
    """With fewer values the order is lower, and further values that a slot keeps have no weight."""
    for order in range(5):
        assert basis.history(order) == order + 1
        assert basis.weights([9, 8, 6, 3, 1, 0], 11, order) == basis.weights([9, 8, 6, 3, 1][: order + 1], 11, order)


def test_a_fit_reads_all_values_of_its_history() -> None:
    assert Chebyshev().history(4) == 8
    assert Chebyshev().history(8) == 9
    assert all(Chebyshev().weights(range(12, 0, -1), 14, 4))


@pytest.mark.parametrize("basis", LOCAL, ids=str)
def test_values_of_one_place_have_no_weights(basis: Basis) -> None:
    for places in ([4, 4, 2], [4, 2, 2]):
        with pytest.raises((ZeroDivisionError, ValueError)):
            basis.weights(places, 6, 2)


def test_a_fit_has_no_weights_either_where_the_ridge_would_give_some() -> None:
    with pytest.raises(ValueError):
        Chebyshev(blend=1).weights([4, 2, 1, 1], 6, 2)


@pytest.mark.parametrize("basis", [*LOCAL, Chebyshev(domain=None)], ids=str)
def test_large_gaps_stay_finite(basis: Basis) -> None:
    for places in ([1001, 1000, 3, 2, 1], [1000, 3, 2, 1, 0], [4, 3, 2, 1, 0]):
        assert all(map(math.isfinite, basis.weights(places, 1999, 4)))


@pytest.mark.parametrize("variant", ["paper", "cache-dit"])
def test_bdf_takes_steps_alone(variant: str) -> None:
    for places, place in (([0.5, 1.0], 2), ([2, 1], 2.5), ([1, 2], 0), ([2, 1], 2)):
        with pytest.raises(ValueError, match="over='step'"):
            BDF(variant).weights(places, place, 1)


def test_magnitude_is_the_product_of_the_ratios_since() -> None:
    basis = Magnitude((1.0, 1.25, 0.5, 3.0))
    assert basis.history(3) == 1
    assert basis.weights([1, 0], 2, 1) == [0.5]
    assert basis.weights([0.0], 3.0, 0) == [1.875]


@pytest.mark.parametrize("computed, now", [(2, 4), (9, 10), (-1, 1), (0.5, 2), (2, 2), (2, 1)])
def test_magnitude_has_no_weights_beyond_its_table(computed: float, now: float) -> None:
    with pytest.raises(ValueError):
        Magnitude((1.0, 1.25, 0.5, 3.0)).weights([computed], now, 0)


@pytest.mark.parametrize(
    "make, name",
    [
        *((lambda v=v: Hermite(v), "scale") for v in (0, -0.5, 1.5, math.nan, True, "a")),
        *((lambda v=v: Chebyshev(ridge=v), "ridge") for v in (0, -1, math.inf, None)),
        *((lambda v=v: Chebyshev(blend=v), "blend") for v in (-0.1, 1.1, math.nan)),
        *((lambda v=v: Chebyshev(taylor_order=v), "taylor_order") for v in (0, 4, 1.0, True)),
        *((lambda v=v: Chebyshev(domain=v), "domain") for v in (50, (0,), (1, 1), (2, 1), (0, math.inf), [0, 50])),
        *((lambda v=v: BDF(v), "variant") for v in ("heun", None)),
        *((lambda v=v: Magnitude(v), "ratios") for v in ((), [1.0], (1.0, 0), (1.0, math.nan), 1.0)),
    ],
)
def test_parameters_out_of_range(make, name: str) -> None:
    with pytest.raises(BadParameter, match=f"{name}="):
        make()


def test_the_names_give_bases_that_can_be_compared_and_hashed() -> None:
    assert set(BASES) == {"taylor", "taylorseer", "hermite", "chebyshev", "bdf"}
    for make in BASES.values():
        assert isinstance(make(), Basis)
        assert make() == make() and hash(make()) == hash(make())
