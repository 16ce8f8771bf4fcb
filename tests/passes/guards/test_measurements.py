"""Measurements and the names of their symbols determine each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_rewrite.errors import BadParameter, UnknownSymbol
from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.measurements import ERRORS, PROBES, Measurement, blocks, measurement
from dit_rewrite.passes.guards.satisfiability import verdict
from dit_rewrite.passes.guards.symbols import Predicate, drift, similarity, step
from dit_rewrite.policy.guard_text import guard_text, parse_guard

COEFFICIENTS = st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5), min_size=1, max_size=6)
BLOCKS = ("first_2_blocks", "first_10_blocks", "behind_first_2_blocks")
KINDS = [(statistic, probe) for statistic in ("similarity", "drift") for probe in (*PROBES, *BLOCKS)]
KINDS.remove(("drift", "output"))
NEITHER = [("advance", probe) for probe in (*PROBES, *BLOCKS) if probe != "output"]  # have neither rescale nor filter
NEITHER += [("forecast_error", probe) for probe in ERRORS]
RESCALES = st.none() | st.just("rate") | COEFFICIENTS
MEASUREMENTS = (
    st.tuples(st.sampled_from(KINDS), RESCALES, st.sampled_from([None, "sea"]))
    .filter(lambda asked: asked[:2] != (("similarity", "output"), "rate"))
    .map(lambda asked: Measurement.of(*asked[0], *asked[1:]))
    | st.sampled_from(NEITHER).map(lambda asked: Measurement.of(*asked))
    | st.sampled_from(ERRORS).map(lambda of: Measurement.of("forecast_error", of, elementwise=True))
)


@settings(max_examples=200, deadline=None)
@given(MEASUREMENTS, MEASUREMENTS)
def test_names_and_measurements(one: Measurement, other: Measurement) -> None:
    """A name gives its measurement, and different measurements have different names."""
    assert measurement(one.name) == one
    assert (one.name == other.name) == (one == other) == (one.symbol == other.symbol)
    guard = (one.symbol < 0.5) & (step > 1)
    assert symbols.check(guard) == guard
    assert parse_guard(guard_text(guard)) == guard
    assert symbols.measured(symbols.mentions(guard)) == {one.name}


@pytest.mark.parametrize(
    "name",
    ["drift(self,rescale=(1.0,))", "drift(self, rescale=(1,))", "drift(self, rescale=None)", "drift( self)", "drift"],
)
def test_another_spelling_is_no_name(name: str) -> None:
    """A symbol whose name is spelled differently is not a guard symbol."""
    assert measurement(name) is None
    with pytest.raises(UnknownSymbol):
        symbols.check(sympy.Symbol(name, real=True) < 1)


@pytest.mark.parametrize("value", [(), 2.0, "rat", (math.nan,), (math.inf,), (True,), ("2",), (1.0,) * 17, (10**400,)])
def test_what_cannot_rescale(value: Any) -> None:
    with pytest.raises(BadParameter, match="rescale"):
        drift("self", rescale=value)


@pytest.mark.parametrize("probe", [f"first_{n}_blocks" for n in ("0", "1", "02", "x", "99999")])
def test_names_of_first_blocks(probe: str) -> None:
    """A number of blocks has one spelling, and one block is called "first_block"."""
    assert [blocks(name) for name in ("first_block", *BLOCKS, "latent")] == [
        (1, False),
        (2, False),
        (10, False),
        (2, True),
        None,
    ]
    assert blocks("behind_first_block") == (1, True)
    with pytest.raises(BadParameter, match="or such as first_8_blocks"):
        similarity(probe)


@pytest.mark.parametrize(
    ("statistic", "given"),
    [
        ("advance", {"probe": "output"}),
        ("advance", {"probe": "verified"}),
        ("advance", {"rescale": "rate"}),
        ("advance", {"filter": "sea"}),
        ("advance", {"elementwise": True}),
        ("drift", {"elementwise": True}),
        ("drift", {"probe": "verified"}),
        ("forecast_error", {"probe": "latent"}),
        ("forecast_error", {"probe": "self", "rescale": (1.0,)}),
        ("forecast_error", {"probe": "self", "filter": "sea"}),
        ("forecast_error", {"probe": "self", "elementwise": 1}),
    ],
)
def test_options_of_other_statistics(statistic: str, given: dict[str, Any]) -> None:
    """Each statistic has its own options; text with another option is not a measurement."""
    with pytest.raises(BadParameter, match=f"{list(given)[-1]}="):
        Measurement.of(statistic, **{"probe": "self", **given})
    assert measurement("advance(self, elementwise=True)") is measurement("forecast_error(latent)") is None


def test_the_output_has_no_drift() -> None:
    """Drift needs a change at every step, and reused steps have no output."""
    assert similarity("output").name == "similarity(output)"
    with pytest.raises(BadParameter, match="reused steps have no output"):
        drift("output")
    with pytest.raises(BadParameter, match="the probe is the output itself"):
        similarity("output", rescale="rate")
    assert measurement("drift(output)") is None


def test_a_polynomial_may_be_negative() -> None:
    """A negative change is invalid; a polynomial of a change may have any finite value."""
    plain, rescaled = drift("self"), drift("self", rescale=(2.0, -1.0))
    for symbol, expected in ((plain, False), (rescaled, True)):
        predicate = Predicate.of(symbol < 0.5)
        assert predicate.holds({symbol.name: -0.5}) is expected
        assert not predicate.holds({symbol.name: math.nan})
        assert not predicate.holds({symbol.name: -math.inf})
        assert not predicate.holds({})
        assert predicate.measured == (symbol.name,)
    assert (plain < 0) == sympy.false
    assert verdict(rescaled < 0) is None
