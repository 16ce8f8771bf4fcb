"""A policy from one number: `autopolicy`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dit_rewrite.compiler.lowering import InnerBackend
from dit_rewrite.errors import BadParameter, NothingFits
from dit_rewrite.policies.static import Never
from dit_rewrite.policy.files import check_writable
from dit_rewrite.policy.plan import is_whole
from dit_rewrite.search.certificate import AutoPolicy, Control, Errors
from dit_rewrite.search.controls import Controls, Solver, is_better
from dit_rewrite.search.denoisers import identity
from dit_rewrite.search.measurements import STYLES, Candidate, Measurements, Report, Tried
from dit_rewrite.search.pipeline_sampler import resolved
from dit_rewrite.search.refine import first_guess, refine
from dit_rewrite.search.runs import Runs
from dit_rewrite.search.trials import DEPTH, WHERE, Place, Sample

FEWEST = 2  # computed steps
SHALLOWEST = 2  # values that a forecast reads at least


@dataclass(frozen=True)
class Bound:
    """The bounds that the user gives: at least one, and at most one of `speedup`, `max_error` and `max_seconds`."""

    speedup: float | None = None
    max_error: float | None = None
    max_seconds: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given or len(given.keys() & {"speedup", "max_error", "max_seconds"}) > 1:
            raise BadParameter("autopolicy", "speedup", self.speedup, "one bound, and max_bytes beside it if wanted")
        for name, value in given.items():
            least = 1 if name == "speedup" else 0
            if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < math.inf:
                raise BadParameter("autopolicy", name, value, f"a finite number above {least}")

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in vars(self).items() if value is not None)


def autopolicy(
    model: Any,
    sample: Sample | Mapping[str, Any],
    *,
    speedup: float | None = None,
    max_error: float | None = None,
    max_seconds: float | None = None,
    max_bytes: int | None = None,
    controls: Mapping[str, Solver] | None = None,
    places: Sequence[Place] = ("output", "stack"),
    calibration_seeds: Sequence[int] = (0, 1),
    held_out_seeds: Sequence[int] = tuple(range(100, 108)),
    trials: int = 32,
    measure: Literal["time", "flops"] = "time",
    backend: InnerBackend = "inductor",
    measurements: Measurements | None = None,
    path: str | Path | None = None,
    report: Report = lambda _: None,
) -> AutoPolicy:
    """Return the policy with the least error under a bound, chosen by measurements of the model, with its certificate.

    `sample(denoiser, seed)` runs the sampler with the denoiser that it takes and returns the images, or latents, as a
    tensor; equal seeds give equal noise. For a diffusers pipeline, `sample` has the arguments of its call, and the
    controls are its compatible schedulers. Its denoisers, which must have one structure, run under one policy: where
    several share a schedule, each forecasts from its own values, and computes at its first step. `model` itself is not
    changed.

    The bound is one number: the least `speedup`, the most `max_error` (relative L2 error to the images of the same
    sampler that computes everything, averaged over seeds) or the most `max_seconds` of a run. `max_bytes` limits the
    size of all caches, and may stand beside one of them or alone, where the speed-up is 2: forecasts read fewer values
    if needed, and the size is measured in a run.

    The policy forecasts one of `places` between computed steps that are placed freely. Objective: the sum over the
    forecast steps of the error of the forecast, computed from the values of full runs, times the influence of the step
    on the final image, measured by replacing its value alone. A dynamic programme minimises it for each number of
    computed steps (`placement`). The best placements and even ones run with several weights, and computed steps are
    moved one at a time while the typical error (the geometric mean) of the images of `calibration_seeds` falls, for
    `trials` runs (`refine`). Then the error is measured on `held_out_seeds`; for `max_error` the number of computed
    steps grows until the upper end of the error's 95 % interval is within the bound. `measure="time"` compares the
    times of compiled runs in alternation; "flops" counts FLOPs, for machines under load. `backend` compiles the models.

    The control always runs if there is one: `controls` maps names of solvers to functions ``(denoiser, steps, seed) ->
    images``. The best of them at the cost of the policy is compared on the held-out seeds, and returned where it is
    better. `measurements` may be passed to search several bounds with the same ones. The result is saved at `path`.

    Raises BadParameter, NotAModule, NothingRecorded, NotImages, and NothingFits if no placement keeps the bound.
    """
    bound = Bound(speedup, max_error, max_seconds, max_bytes)
    model, sample, derived = resolved("autopolicy", model, sample)
    controls, made = derived if controls is None else controls, identity("autopolicy", model)
    if measure not in ("time", "flops") or (max_seconds is not None and measure != "time"):
        raise BadParameter("autopolicy", "measure", measure, '"time", or "flops" without max_seconds')
    if measurements is not None and identity("autopolicy", measurements.model) != made:
        raise BadParameter("autopolicy", "measurements", "…", "those of this model")
    calibration_seeds = calibration_seeds if measurements is None else measurements.seeds
    for name, seeds in (("calibration_seeds", calibration_seeds), ("held_out_seeds", held_out_seeds)):
        if not isinstance(seeds, Sequence):
            raise BadParameter("autopolicy", name, seeds, "a list of seeds")
    if not is_whole(trials, 0):
        raise BadParameter("autopolicy", "trials", trials, "a whole number >= 0")
    if not isinstance(controls, Mapping):
        raise BadParameter("autopolicy", "controls", controls, "a dict of solvers by their names")
    if set(calibration_seeds) & set(held_out_seeds) or not calibration_seeds or len(held_out_seeds) < 2:
        allowed = "two or more seeds that are not among calibration_seeds, of which there is one or more"
        raise BadParameter("autopolicy", "held_out_seeds", held_out_seeds, allowed)
    if not places or any(place not in WHERE for place in places):
        raise BadParameter("autopolicy", "places", places, f"some of {', '.join(WHERE)}")
    if path is not None:
        check_writable(Path(path))  # before the search, which takes long
    began = time.perf_counter()
    measured = measurements or Measurements(model, sample, places, calibration_seeds, backend, report)
    search = Search(measured, bound, tuple(held_out_seeds), trials, measure)
    found = search.run()
    control = search.control(controls, found)
    chosen = search.result(found, control, time.perf_counter() - began)
    if path is not None:
        chosen.save(path)
    report(str(chosen))
    return chosen


@dataclass(frozen=True)
class Verified:
    """A candidate with its cost, its seconds, its errors on the held-out seeds, and the size of its caches in a run."""

    tried: Tried
    cost: float
    seconds: float | None
    errors: Errors
    peak_bytes: int | None = None


class Search:
    """The search for one bound."""

    def __init__(
        self,
        measured: Measurements,
        bound: Bound,
        held_out: tuple[int, ...],
        trials: int,
        measure: Literal["time", "flops"],
    ) -> None:
        self.measured, self.bound, self.held_out, self.trials, self.measure = measured, bound, held_out, trials, measure
        self.ran = len(measured.runs)
        self.runs = Runs(measured)
        self.places = {name: depth for name in measured.places if (depth := self._depth(name)) >= SHALLOWEST}
        if not self.places:
            least = min(found.trials.cache_bytes(SHALLOWEST) for found in measured.places.values())
            raise NothingFits(bound, f"the smallest place keeps {least} bytes")

    def _depth(self, name: Place) -> int:
        """Return how many values the forecasts of a place may read, so that its caches are predicted to fit."""
        size = self.measured.places[name].trials.cache_bytes
        return next((d for d in range(DEPTH, 0, -1) if size(d) <= self._most_bytes), 0)

    @property
    def _most_bytes(self) -> float:
        return math.inf if self.bound.max_bytes is None else self.bound.max_bytes

    def run(self) -> Verified:
        """Find the policy, tightened until its bounds hold."""
        while True:
            error = self.bound.max_error
            found = self._least_error() if error is None else self._least_cost(error)
            peak = self.runs.peak_bytes(found.tried.candidate)
            if peak <= self._most_bytes:
                return replace(found, peak_bytes=peak)
            self._shorten(found.tried.candidate, peak)

    def _shorten(self, candidate: Candidate, peak: int) -> None:
        """Let the forecasts of a place read fewer values, or leave it out, as its caches were larger than allowed."""
        self.measured.report(f"the caches of {candidate.place} took {peak} bytes, more than {self._most_bytes}")
        depth = min(candidate.depth, STYLES[candidate.style]) - 1
        self.places[candidate.place] = depth
        if depth < SHALLOWEST:
            del self.places[candidate.place]
        if not self.places:
            raise NothingFits(self.bound, f"the caches of the smallest place took {peak} bytes")

    # --- a bound on the cost ------------------------------------------------------------------------------------------

    def _least_error(self) -> Verified:
        """Return the least error within the cost: as many computed steps as it allows."""
        steps, share = self.measured.steps, 1 / (self.bound.speedup or 2.0)
        full = None
        if self.bound.max_seconds is not None:
            full = self.runs.seconds(None)[0]
            share = self.bound.max_seconds / full
        count = min(steps - 1, math.floor(steps * share + 1e-9))
        while count >= FEWEST:
            most = share + 1e-9 if self.measure == "flops" else math.inf
            best = refine(self.measured, first_guess(self.measured, self.places, count, most), self.trials)
            cost, seconds = self._cost(best)
            if cost <= share + 1e-9:
                return self._verify(best, cost, seconds)
            count = min(count - 1, math.floor(count * share / cost))
        raise NothingFits(self.bound, f"{FEWEST} computed steps of {steps} cost more")

    # --- a bound on the error -----------------------------------------------------------------------------------------

    def _least_cost(self, most: float) -> Verified:
        """Return the fewest computed steps whose error on the held-out seeds keeps the bound."""
        low, high = FEWEST, self.measured.steps - 1
        while low < high:
            count = (low + high) // 2
            if self._quick(count) <= most:
                high = count
            else:
                low = count + 1
        count = low
        while count < self.measured.steps:
            best = refine(self.measured, first_guess(self.measured, self.places, count), self.trials)
            found = self._verify(best, *self._cost(best))
            self.measured.report(f"{count} computed steps: held-out error {found.errors}")
            if found.errors.high <= most:
                return found
            count = self._next(count, found.errors.high / most)
        raise NothingFits(self.bound, "the error on held-out seeds is larger with every placement")

    def _quick(self, count: int) -> float:
        """Return the measured error of the dynamic programme's placement, with one kind of weights."""
        starts = [self.measured.starts(name, count, depth)[0] for name, depth in self.places.items()]
        return min(self.measured.attempt(start).error for start in starts)

    def _next(self, count: int, excess: float) -> int:
        """Return the next number of computed steps. The error falls about with the square of their number."""
        return max(count + 1, min(self.measured.steps, math.floor(count * min(excess, 2.0) ** 0.25)))

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _cost(self, tried: Tried) -> tuple[float, float | None]:
        """Return the cost of a candidate, and its seconds if they are measured."""
        if self.measure == "flops":
            return tried.flops, None
        full, own = self.runs.seconds(tried.candidate)
        return own / full, own

    def _verify(self, tried: Tried, cost: float, seconds: float | None) -> Verified:
        errors, _ = self.measured.errors(tried.candidate, self.held_out)
        return Verified(tried, cost, seconds, Errors.of(errors))

    def control(self, solvers: Mapping[str, Solver], found: Verified) -> Control | None:
        """Return the best of fewer steps at the cost of the policy."""
        measured = self.measured
        runner = Controls(measured.model, solvers, measured.calls, measured.report)
        searched = {seed: measured.reference(seed) for seed in measured.seeds}
        held_out = {seed: measured.reference(seed) for seed in self.held_out}
        return runner.best(found.cost, searched, held_out)

    def result(self, found: Verified, control: Control | None, seconds: float) -> AutoPolicy:
        """Return the certificate of the better one."""
        measured, tried = self.measured, found.tried
        loses = control is not None and is_better(control, found.errors.each)
        candidate = tried.candidate
        return AutoPolicy(
            policy=Never() if loses else self.runs.policy(candidate),
            bound=str(self.bound),
            measure=self.measure,
            cost=found.cost,
            seconds=found.seconds,
            cache_bytes=measured.places[candidate.place].trials.cache_bytes(measured.table(candidate).history(1)),
            peak_bytes=found.peak_bytes,
            errors=found.errors,
            control=control,
            winner="control" if loses else "policy",
            model=identity("autopolicy", measured.model),
            steps=measured.steps,
            scheduler=measured.scheduler,
            place=candidate.place,
            computed=candidate.computed,
            style=candidate.style,
            predicted=tried.predicted,
            calibration_error=tried.error,
            trials=len(measured.runs) - self.ran,
            rank_correlation=measured.rank_correlation(),
            search_seconds=seconds,
            calibration_seeds=measured.seeds,
            held_out_seeds=self.held_out,
        )
