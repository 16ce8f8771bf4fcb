"""The search of `autopolicy`, with made measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dit_rewrite.errors import (
    NothingFits,
)
from dit_rewrite.search.autopolicy import Bound, Search
from dit_rewrite.search.certificate import Errors
from dit_rewrite.search.measurements import (
    Candidate,
    Tried,
)
from dit_rewrite.search.refine import first_guess, refine
from dit_rewrite.search.trials import DEPTH, Place


class Made:
    """Measurements whose error is 1 / count² on the calibration seeds, and three times that on held-out seeds."""

    steps, seeds, begins = 20, (0,), (0,)

    def __init__(self, excess: float = 3.0) -> None:
        self.runs: list[Tried] = []
        self.excess = excess
        self.places: dict[Place, Any] = {"output": None}
        self.report = [].append

    def starts(self, name: Place, count: int, depth: int = DEPTH) -> list[Candidate]:
        return [Candidate(name, tuple(range(count)), "fitted", depth)]

    def predicted(self, candidate: Candidate) -> float:
        return float(abs(candidate.computed[-1] - self.steps // 2))

    def attempt(self, candidate: Candidate) -> Tried:
        error = 1 / len(candidate.computed) ** 2
        self.runs.append(Tried(candidate, 0.0, error, len(candidate.computed) / self.steps, error))
        return self.runs[-1]

    def errors(self, candidate: Candidate, seeds: Sequence[int]) -> tuple[list[float], list[float]]:
        spread = [0.9, 1.1]
        return [self.excess * s / len(candidate.computed) ** 2 for s in spread], []


def search(made: Made, peak: int = 0, **bound: float) -> Search:
    found = object.__new__(Search)
    found.measured, found.bound, found.held_out = made, Bound(**bound), (5, 6)  # type: ignore[assignment, arg-type]
    found.trials, found.measure, found.ran, found.places = 0, "flops", 0, {"output": DEPTH}
    found.runs = Sizes(peak)  # type: ignore[assignment]
    return found


class Sizes:
    """Runs in which the caches take so many bytes per value that forecasts read."""

    def __init__(self, each: int) -> None:
        self.each = each

    def peak_bytes(self, candidate: Candidate) -> int:
        return self.each * candidate.depth


def test_caches_that_are_larger_than_predicted_are_made_smaller() -> None:
    """The bound on the bytes holds in a run, beside another bound; without a place that keeps it there is no policy."""
    found = search(Made(), peak=10, max_error=0.04, max_bytes=25).run()
    assert (found.tried.candidate.depth, found.peak_bytes) == (2, 20)
    assert found.errors.high <= 0.04
    assert search(Made(), peak=10, speedup=2.0, max_bytes=40).run().tried.candidate.depth == 4
    with pytest.raises(NothingFits, match="the smallest place took 20 bytes"):
        search(Made(), peak=10, speedup=2.0, max_bytes=19).run()


def test_the_number_of_computed_steps_grows_until_the_held_out_error_fits() -> None:
    """The calibration seeds ask for 5 steps at 0.04; on held-out seeds the upper end of the interval does."""
    found = search(Made(), max_error=0.04).run()
    count = len(found.tried.candidate.computed)
    upper = Errors.of(Made().errors(found.tried.candidate, (5, 6))[0]).high
    assert upper <= 0.04 and count > 5
    before = Errors.of(Made().errors(Candidate("output", tuple(range(count - 1)), "fitted"), (5, 6))[0]).high
    assert before > 0.04
    assert len(search(Made(0.1), max_error=0.04).run().tried.candidate.computed) == 5
    with pytest.raises(NothingFits, match="max_error=0.04"):
        search(Made(1000.0), max_error=0.04).run()


def test_local_search_follows_the_measured_error() -> None:
    class Valley(Made):
        """The typical error is the distance of the second computed step from 7; the mean error rises towards it."""

        def attempt(self, candidate: Candidate) -> Tried:
            known = [t for t in self.runs if t.candidate == candidate]
            if not known:
                distance = abs(candidate.computed[1] - 7)
                self.runs.append(Tried(candidate, 0.0, 9 - distance, 0.1, distance))
            return (known or self.runs)[-1]

    made = Valley()
    start = made.attempt(Candidate("output", (0, 3), "fitted"))
    assert refine(made, start, 50).candidate.computed == (0, 7)  # type: ignore[arg-type]
    made = Valley()
    start = made.attempt(Candidate("output", (0, 3), "fitted"))
    assert refine(made, start, 1).typical == 2 and len(made.runs) == 2  # type: ignore[arg-type]


def test_cheap_candidates_come_first() -> None:
    """At the same number of computed steps, a place within the cost is taken before a better one beyond it."""

    class TwoPlaces(Made):
        def attempt(self, candidate: Candidate) -> Tried:
            stack = candidate.place == "stack"
            error = 0.1 if stack else 0.2
            return Tried(candidate, 0.0, error, 0.6 if stack else 0.5, error)

    places: dict[Place, int] = {"output": DEPTH, "stack": DEPTH}
    found = [first_guess(TwoPlaces(), places, 3, most).candidate.place for most in (0.5, 0.7, 0.1)]  # type: ignore[arg-type]
    assert found == ["output", "stack", "stack"]
