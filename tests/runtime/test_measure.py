"""Measurements, against an independent implementation of their definitions on lists of numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_rewrite.runtime.measure import Measured, Meter, Tracked

SIMILARITY, DRIFT = Measured("similarity(self)", "similarity", 1), Measured("drift(self)", "drift", 1)
NUM_INPUTS = 1  # wire 0 is an input, wire 1 is computed


def distance(now: Tensor, before: Tensor) -> Tensor:
    return (now - before).abs().sum() / before.abs().sum()


def change(now: Sequence[float], before: Sequence[float]) -> float:
    """Return the relative L1 change of lists of numbers; 0/0 is NaN, x/0 is infinite."""
    top, bottom = sum(abs(a - b) for a, b in zip(now, before, strict=True)), sum(map(abs, before))
    if bottom == 0:
        return math.nan if top == 0 or math.isnan(top) else math.inf
    return top / bottom


class ByHand:
    """The definitions, evaluated over the full history of the probe's values and of the decisions."""

    def __init__(self, statistic: str, lag: int) -> None:
        self.statistic, self.lag = statistic, lag
        self.seen: list[Sequence[float] | None] = []  # None: not computed in that call
        self.rows: list[bool] = []

    def read(self, now: Sequence[float] | None) -> float | None:
        """Return the measurement that a guard reads in a call in which the probe is `now`."""
        return self._similarity(now) if self.statistic == "similarity" else self._drift(now)

    def _similarity(self, now: Sequence[float] | None) -> float | None:
        """Change since the last call that computed both the site and the probe."""
        if self.lag:  # as read by the last call that had the probe
            calls = [i for i, value in enumerate(self.seen) if value is not None]
            return self._since(self.seen[calls[-1]], calls[-1]) if calls else None
        return self._since(now, len(self.seen))

    def _since(self, now: Sequence[float] | None, call: int) -> float | None:
        known = [value for value in self.seen[:call] if value is not None]
        computed = [v for v, reused in zip(self.seen[:call], self.rows, strict=False) if v is not None and not reused]
        if now is None or not known:
            return None
        return change(now, computed[-1] if computed else known[0])

    def _drift(self, now: Sequence[float] | None) -> float | None:
        """Sum of the changes from call to call since the last call that computed the site.

        With a lag of one call, the change up to the computing call is the first one that counts.
        """
        values = [(i, value) for i, value in enumerate(self.seen) if value is not None]
        last = max((i for i, _ in values if not self.rows[i]), default=values[0][0] if values else 0)
        if not self.lag:
            if now is None:
                return None
            values.append((len(self.seen), now))
        changes = [change(b, a) for (_, a), (i, b) in itertools.pairwise(values) if i > last - self.lag]
        return sum(changes) if changes else None

    def close(self, now: Sequence[float] | None, reused: bool) -> None:
        self.seen.append(now)
        self.rows.append(reused)


def follow(
    measured: Measured, lag: int, probes: Sequence[Sequence[float] | None], rows: Sequence[bool]
) -> list[tuple[float | None, float | None]]:
    """Return the measurements of each call, by the meter and by the definition."""
    tracked, by_hand, read = Tracked(), ByHand(measured.statistic, lag), []
    for now, reused in zip(probes, rows, strict=True):
        wires = [torch.zeros(1), None if now is None else torch.tensor(now, dtype=torch.float64)]
        meter = Meter(tracked, [(measured,)], wires, NUM_INPUTS, lag, distance)
        read.append((meter.read(0, measured.symbol), by_hand.read(now)))
        meter.close([reused])
        by_hand.close(now, reused)
    return read


def agree(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b, rel=1e-9)


PROBES = [[1.0, 1.0], [1.1, 1.1], [1.1, 1.3], [2.0, 2.0], [2.0, 2.2]]
COMPUTED = (False, True, True, False, True)  # which calls reuse


@pytest.mark.parametrize(
    ("measured", "lag", "expected"),
    [
        (SIMILARITY, 0, [None, 0.2 / 2, 0.4 / 2, 2 / 2, 0.2 / 4]),
        (DRIFT, 0, [None, 0.2 / 2, 0.2 / 2 + 0.2 / 2.2, 0.2 / 2 + 0.2 / 2.2 + 1.6 / 2.4, 0.2 / 4]),
        (SIMILARITY, 1, [None, None, 0.2 / 2, 0.4 / 2, 2 / 2]),
        (DRIFT, 1, [None, None, 0.2 / 2, 0.2 / 2 + 0.2 / 2.2, 1.6 / 2.4]),
    ],
    ids=["similarity", "drift", "similarity, late", "drift, late"],
)
def test_five_calls(measured: Measured, lag: int, expected: list[float | None]) -> None:
    """Five calls by hand; the first and the fourth compute."""
    for k, (found, by_hand) in enumerate(follow(measured, lag, PROBES, COMPUTED)):
        assert agree(found, expected[k]), k
        assert agree(by_hand, expected[k]), k


@pytest.mark.parametrize(("lag", "expected"), [(0, (1 + 1.2) / 2), (1, 1.0)])
def test_an_advance(lag: int, expected: float) -> None:
    """Of the way from the first to the fourth call; late, how far the probe was at the last call."""
    advance = Measured("advance", "advance", 1)
    tracked, read = Tracked(), []
    for now, reused in zip(PROBES, COMPUTED, strict=True):
        wires = [torch.zeros(1), torch.tensor(now, dtype=torch.float64)]
        meter = Meter(tracked, [(advance,)], wires, NUM_INPUTS, lag, distance)
        read.append(meter.read(0, "advance"))
        meter.close([reused])
    assert read[:4] == [None] * 4 and agree(read[4], expected)


def test_each_change_is_rescaled_before_it_is_added() -> None:
    """Each change is rescaled by a polynomial, highest power first, before it is added; values may be negative."""
    changes = [0.2 / 2, 0.2 / 2.2, 1.6 / 2.4]
    scaled = [3 * x * x - 2 * x + 0.1 for x in changes]
    drift = Measured("drift", "drift", 1, (3.0, -2.0, 0.1))
    found = [a for a, _ in follow(drift, 0, PROBES, COMPUTED)]
    assert found[1:4] == [pytest.approx(sum(scaled[: k + 1])) for k in range(3)]
    assert found[2] is not None and found[2] < 0
    similarity = Measured("similarity", "similarity", 1, (1.0, -0.5))
    assert [a for a, _ in follow(similarity, 0, PROBES, COMPUTED)][3] == pytest.approx(2 / 2 - 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_constant_polynomial_propagates_nan(bad: float) -> None:
    """A constant polynomial must not hide that the probe is not finite."""
    found = [a for a, _ in follow(Measured("x", "drift", 1, (0.3,)), 0, [[1.0, 1.0], [bad, 1.0]], (False, True))]
    assert found[1] is not None and math.isnan(found[1])
    fine = [a for a, _ in follow(Measured("x", "drift", 1, (0.3,)), 0, [[1.0, 1.0], [2.0, 1.0]], (False, True))]
    assert fine[1] == pytest.approx(0.3)


@pytest.mark.parametrize("lag", [0, 1])
def test_output_probes_are_read_by_the_next_call(lag: int) -> None:
    """A late measurement is the change between the last two computed calls; reused calls do not count."""
    tracked, output, found = Tracked(), Measured("x", "similarity", 1, output=1), []
    for value, reused in zip([[2.0], [3.0], [9.0], [9.0], [6.0], [7.0]], [0, 0, 1, 1, 0, 0], strict=True):
        wires: list[Tensor | None] = [torch.zeros(1), None]
        meter = Meter(tracked, [(output,)], wires, NUM_INPUTS, lag, distance)
        found.append(meter.read(0, "x"))
        wires[1] = torch.tensor(value)
        meter.close([bool(reused)])
    assert found == [None, None, 0.5, 0.5, 0.5, 1.0]


def easycache(
    latents: Sequence[Sequence[float]], outputs: Sequence[Sequence[float]], rows: Sequence[bool]
) -> list[Any]:
    """Return the value that EasyCache's loop compares with its threshold at each step; None before it has a rate."""

    def mean(a: Sequence[float], b: Sequence[float] | None = None) -> float:
        return sum(abs(x - y) for x, y in zip(a, b or [0.0] * len(a), strict=True)) / len(a)

    found: list[Any] = []
    rate = before = computed = None
    total = 0.0
    for latent, output, reused in zip(latents, outputs, rows, strict=True):
        if rate is not None and before is not None and computed is not None:
            total += rate * mean(latent, before) / mean(computed[1])
            found.append(total)
        else:
            found.append(None)
        if not reused:
            total = 0.0
            if computed is not None:
                rate = mean(output, computed[1]) / mean(latent, computed[0])
            computed = latent, output
        before = latent
    return found


def follow_rate(
    statistic: str,
    lag: int,
    latents: Sequence[Sequence[float]],
    outputs: Sequence[Sequence[float]],
    rows: Sequence[bool],
) -> list[float | None]:
    tracked, measured, found = Tracked(), Measured("x", statistic, 0, "rate", 1), []
    for latent, output, reused in zip(latents, outputs, rows, strict=True):
        wires: list[Tensor | None] = [torch.tensor(latent, dtype=torch.float64), None]
        meter = Meter(tracked, [(measured,)], wires, NUM_INPUTS, lag, distance)
        found.append(meter.read(0, "x"))
        wires[1] = torch.tensor(output, dtype=torch.float64)
        meter.close([reused])
    return found


LATENTS = [[4.0, 4.0], [3.0, 3.0], [2.5, 2.0], [1.5, 2.0], [1.0, 1.0], [0.5, 1.0]]
OUTPUTS = [[2.0, 2.0], [1.0, 2.0], [9.0, 9.0], [9.0, 9.0], [2.0, 3.0], [9.0, 9.0]]


def test_rate_by_hand() -> None:
    """Between calls 0 and 1 the output changes by 0.5, the latent by 1, and the mean output is 1.5; between calls 1
    and 4 they are 1, 2 and 2.5."""
    rows = [False, False, True, True, False, True]
    found = follow_rate("drift", 0, LATENTS, OUTPUTS, rows)
    expected = [0.75 * 0.5 / 1.5, 1.25 * 0.5 / 1.5, 2.0 * 0.5 / 1.5, 0.25 * (1 / 2) / 2.5]
    assert found[:2] == [None, None]
    assert found[2:] == pytest.approx(expected)
    assert found == [None if x is None else pytest.approx(x) for x in easycache(LATENTS, OUTPUTS, rows)]
    late = follow_rate("drift", 1, LATENTS, OUTPUTS, rows)
    assert late == [None, None, None, *found[2:4], pytest.approx(0.75 * 0.5 / 1.5)]
    similar = follow_rate("similarity", 0, LATENTS, OUTPUTS, rows)
    assert similar[2:5] == pytest.approx([0.75 * 0.5 / 1.5, 1.25 * 0.5 / 1.5, 2.0 * 0.5 / 1.5])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_rate_of_any_trajectory(data: st.DataObject) -> None:
    """The rate equals that of EasyCache's own loop."""
    pair = st.lists(st.floats(0.5, 4, width=16), min_size=2, max_size=2)
    steps = data.draw(st.lists(st.tuples(pair, pair, st.booleans()), min_size=2, max_size=8))
    for i in range(1, len(steps)):  # EasyCache divides by the change of its latent, so it must not be 0
        if any(steps[i][0] == before[0] for before in steps[:i]):
            return
    latents, outputs, rows = (list(column) for column in zip(*steps, strict=True))
    rows[:2] = [False, False]
    found = follow_rate("drift", 0, latents, outputs, rows)
    assert all(agree(a, b) for a, b in zip(found, easycache(latents, outputs, rows), strict=True))


def test_without_a_rate() -> None:
    """There is no rate before two computed calls, and it is NaN if neither latent nor output changed."""
    assert follow_rate("drift", 0, LATENTS[:3], OUTPUTS[:3], [False, True, True]) == [None, None, None]
    still = follow_rate("drift", 0, [[1.0]] * 3, [[1.0]] * 3, [False, False, True])
    assert still[2] is not None and math.isnan(still[2])


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("measured", [SIMILARITY, DRIFT], ids=["similarity", "drift"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_trajectory(measured: Measured, lag: int, data: st.DataObject) -> None:
    """Random histories, with calls without the probe, zeros, NaN and infinite values."""
    number = st.floats(-4, 4, width=16) | st.sampled_from([0.0, math.nan, math.inf])
    probe = st.none() | st.lists(number, min_size=2, max_size=2)
    steps = data.draw(st.lists(st.tuples(probe, st.booleans()), min_size=1, max_size=7))
    for found, expected in follow(measured, lag, [p for p, _ in steps], [reused for _, reused in steps]):
        if expected is not None and not math.isfinite(expected):
            assert found is not None and not math.isfinite(found)  # NaN or inf: neither permits reuse
        else:
            assert agree(found, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("measured", [SIMILARITY, DRIFT], ids=["similarity", "drift"])
def test_nan_stays_until_the_site_is_computed(measured: Measured, bad: float) -> None:
    """A NaN drift stays NaN until the site is computed; a similarity is finite again as soon as the probe is."""
    probes = [[1.0, 1.0], [bad, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 2.0]]
    found = [a for a, _ in follow(measured, 0, probes, [False, True, True, False, True])]
    finite = [value is not None and math.isfinite(value) for value in found]
    assert finite == [False, False, measured is SIMILARITY, measured is SIMILARITY, True]
    assert found[4] == 0.5


def test_two_sites_with_one_probe_are_measured_once() -> None:
    """The distance between the same two tensors is computed once for all sites."""
    taken: list[tuple[Tensor, Tensor]] = []

    def noted(now: Tensor, before: Tensor) -> Tensor:
        taken.append((now, before))
        return distance(now, before)

    tracked = Tracked()
    sites = [(SIMILARITY, DRIFT), (SIMILARITY,)]
    for number, reused in enumerate(((False, False), (True, True), (True, False))):
        wires = [torch.zeros(1), torch.full((2,), 1.0 + number)]
        meter = Meter(tracked, sites, wires, NUM_INPUTS, 0, noted)
        found = [meter.read(i, m.symbol) for i, measured in enumerate(sites) for m in measured for _ in range(2)]
        meter.close(reused)
    assert found == [2.0, 2.0, 1.5, 1.5, 2.0, 2.0]
    assert len(taken) == 1 + 2, "against the previous call, and in the last call also against the first"


def test_unread_measurements_are_not_computed() -> None:
    """Without a lag, a similarity that no guard reads is not computed."""

    def never(now: Tensor, before: Tensor) -> Tensor:
        raise AssertionError("measured")

    tracked = Tracked()
    for _ in range(3):
        Meter(tracked, [(SIMILARITY,)], [None, torch.ones(2)], NUM_INPUTS, 0, never).close([True])
    assert [t.tolist() for t in tracked.tensors] == [[1, 1], [1, 1]]


@pytest.mark.parametrize(("statistic", "lag"), [*itertools.product(("similarity", "drift"), (0, 1))])
def test_an_input_that_the_caller_changes_in_place(statistic: str, lag: int) -> None:
    """The caller may overwrite its latent between calls, so the reference is a copy."""
    measured, tracked = Measured("x", statistic, 0), Tracked()
    latent, found = torch.ones(2), []
    for _ in range(3):
        meter = Meter(tracked, [(measured,)], [latent, None], NUM_INPUTS, lag, distance)
        found.append(meter.read(0, "x"))
        meter.close([False])
        latent += 1
    assert found == [[None, 1.0, 0.5], [None, None, 1.0]][lag]


def test_a_computed_probe_is_not_copied() -> None:
    """A probe that is not an input is referenced without a copy, once for all sites."""
    tracked, probe = Tracked(), torch.ones(2)
    Meter(tracked, [(SIMILARITY,), (DRIFT,)], [None, probe], NUM_INPUTS, 0, distance).close([False, False])
    assert {id(t) for t in tracked.tensors} == {id(probe)}


def test_a_symbol_that_was_never_measured() -> None:
    """In the first call every symbol is unknown."""
    meter = Meter(Tracked(), [(SIMILARITY,)], [None, torch.ones(2)], NUM_INPUTS, 0, distance)
    found: list[Any] = [meter.read(0, name) for name in ("similarity(self)", "drift(self)", "entropy")]
    assert found == [None] * 3
