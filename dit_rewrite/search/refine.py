"""Local search over placements: it moves computed steps while the measured error falls."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from dit_rewrite.search.measurements import Candidate, Measurements, Tried
from dit_rewrite.search.trials import Place

SHIFTS = (-1, 1, -2, 2)


def first_guess(measured: Measurements, places: Mapping[Place, int], count: int, most: float = math.inf) -> Tried:
    """Return the best of the starting candidates of all places, by their typical errors.

    `places` has the number of values that the forecasts of each may read.

    Those that cost at most `most` FLOPs, over those of a run that computes everything, come before the others: a
    forecast of the stack or of branches leaves the rest of the model to compute.
    """
    tried = [measured.attempt(start) for name, depth in places.items() for start in measured.starts(name, count, depth)]
    return min(tried, key=lambda one: (one.flops > most, one.typical))


def refine(measured: Measurements, start: Tried, trials: int) -> Tried:
    """Improve a candidate by moving one computed step at a time, in at most `trials` runs.

    The neighbours run in the order of their predicted errors. The first one that is better than the best so far, by its
    typical error on the calibration seeds, takes its place, and the search continues from there.
    """
    best, left = start, trials
    while left > 0:
        better = None
        for neighbour in neighbours(measured, best.candidate):
            known = any(tried.candidate == neighbour for tried in measured.runs)
            left -= not known
            tried = measured.attempt(neighbour)
            if tried.typical < best.typical:
                better = tried
                break
            if left <= 0:
                break
        if better is None:
            break
        best = better
        measured.report(
            f"{len(best.candidate.computed)} computed steps: typical error {best.typical:.4f}, {left} trials left"
        )
    return best


def neighbours(measured: Measurements, candidate: Candidate) -> list[Candidate]:
    """Return the candidates in which one computed step is moved, the least predicted error first."""
    found = dict.fromkeys(_moved(candidate, measured.steps, measured.begins))
    return sorted(found, key=measured.predicted)


def _moved(candidate: Candidate, steps: int, begins: Collection[int]) -> Iterator[Candidate]:
    computed = candidate.computed
    for step in (each for each in computed if each not in begins):
        for shift in SHIFTS:
            moved = step + shift
            if 0 < moved < steps and moved not in computed:
                yield candidate._replace(computed=tuple(sorted({*computed, moved} - {step})))
