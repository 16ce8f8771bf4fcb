"""The measurements of `autopolicy`: the values of full runs, the influence of each step, the best placements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dit_rewrite.compiler.lowering import InnerBackend
from dit_rewrite.policy.bases import TaylorSeer
from dit_rewrite.policy.fitted import Fitted
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.search.placement import (
    Placement,
    anchors_of,
    even,
    every,
    fit_weights,
    gap_costs,
    place,
    predict,
    squared_error,
)
from dit_rewrite.search.trials import DEPTH, Place, Sample, Trials

Report = Callable[[str], object]
STYLES: dict[str, int] = {"fitted": DEPTH, "taylorseer": 3}  # kinds of weights, and the values that each reads
SMALLEST = 1e-12  # error that counts
STRIDE = 4  # the influence is measured at every so many steps, and interpolated


class Candidate(NamedTuple):
    """Forecasts of a place between computed steps, by weights of one of `STYLES`, from at most `depth` values."""

    place: Place
    computed: tuple[int, ...]
    style: str
    depth: int = DEPTH


class Tried(NamedTuple):
    """A candidate, the objective that was predicted for it, and its measurements on the calibration images.

    ``error`` is the mean of the relative L2 errors of the images, and ``typical`` their geometric mean, by which the
    search compares candidates. A few images are so sensitive that any small error changes them; they decide the mean of
    a few dozen images by chance, so the candidate with the least mean is often not the best on other images.
    """

    candidate: Candidate
    predicted: float
    error: float
    flops: float
    typical: float


@dataclass
class Measured:
    """A place of the model: its runner, its Gram matrix, the influence of its steps, and its placements by count."""

    trials: Trials
    gram: Tensor
    influence: Tensor = field(default_factory=lambda: torch.empty(0))
    placements: list[list[Placement]] = field(default_factory=list)


class Measurements:
    """The measurements of a model under one sampler. Several bounds can be searched with the same ones."""

    def __init__(
        self,
        model: nn.Module,
        sample: Sample,
        places: Sequence[Place] = ("output",),
        seeds: Sequence[int] = (0,),
        backend: InnerBackend = "inductor",
        report: Report = lambda _: None,
    ) -> None:
        self.model, self.sample, self.seeds, self.backend, self.report = model, sample, tuple(seeds), backend, report
        self.images: dict[int, Tensor] = {}
        self.calls = 0  # of the model in a full run
        self.runs: list[Tried] = []
        self.places: dict[Place, Measured] = {name: self._record(name) for name in places}
        first = next(iter(self.places.values()))
        self.steps, self.scheduler = len(first.gram), first.trials.scheduler
        self.begins = first.trials.begins  # the first steps of the denoisers, in order
        for found in self.places.values():
            self._weigh(found)

    def _record(self, name: Place) -> Measured:
        trials = Trials(self.model, self.sample, name, self.backend)
        grams = []
        for seed in self.seeds:
            gram, trial = trials.record(seed)
            self.images.setdefault(seed, trial.images)
            self.calls = trial.calls
            grams.append(gram)
            self.report(f"recorded the {name} with seed {seed} in {trial.seconds:.1f} s")
        return Measured(trials, torch.stack(grams).mean(0))

    def _weigh(self, found: Measured) -> None:
        """Measure the influence of each step: the typical final error per error of its value, if it alone is replaced.

        The value is replaced by the one two steps before, or by the first value of the denoiser. The influence is
        tempered: its geometric mean with a uniform one, since it is measured with the images of one seed.
        """
        seed, known = self.seeds[0], {}
        for step in self._sampled():
            row = (1.0,) if step - 1 in self.begins else (0.0, 1.0)
            rows = tuple(row if i == step else () for i in range(self.steps))
            images = found.trials.run(Fitted(rows), seed).images
            error = math.sqrt(squared_error(found.gram, step, anchors_of(step, range(self.steps), len(row)), row))
            known[step] = geometric_mean(image_errors(images, self.images[seed])) / max(error, SMALLEST)
        self.report(f"measured the influence of {len(known)} steps of the {found.trials.place}")
        measured = interpolate(known, self.steps)
        found.influence = (measured * measured.mean()).sqrt()
        uniform = torch.full_like(measured, float(measured.mean()))
        for influence, power in ((found.influence, 1.0), (found.influence, 2.0), (uniform, 1.0)):
            found.placements.append(place(gap_costs(found.gram, influence, power, self.begins), self.steps))

    def _sampled(self) -> list[int]:
        """Return the steps whose influence is measured: some of each denoiser, its second and its last among them."""
        ends = (*self.begins[1:], self.steps)
        spans = zip(self.begins, ends, strict=True)
        found = (step for a, end in spans for step in (a + 1, *range(a + 2, end, STRIDE), end - 1) if a < step < end)
        return sorted(set(found))

    def _anchors(self, step: int, computed: Sequence[int], depth: int) -> list[int]:
        """Return the last `depth` computed steps before `step` of the denoiser that runs there, newest first."""
        begin = max(each for each in self.begins if each <= step)
        return anchors_of(step, [each for each in computed if each >= begin], depth)

    def reference(self, seed: int) -> Tensor:
        """Return the images of the model that computes every step."""
        if seed not in self.images:
            self.images[seed] = next(iter(self.places.values())).trials.run(None, seed).images
        return self.images[seed]

    def table(self, candidate: Candidate) -> Fitted:
        """Return the weights of a candidate."""
        gram, depth = self.places[candidate.place].gram, min(STYLES[candidate.style], candidate.depth)
        rows: list[tuple[float, ...]] = []
        for step in range(self.steps):
            anchors = self._anchors(step, candidate.computed, depth)
            if step in candidate.computed:
                rows.append(())
            elif candidate.style == "taylorseer":
                rows.append(tuple(TaylorSeer().weights(anchors, step, len(anchors) - 1)))
            else:
                rows.append(tuple(fit_weights(gram, step, anchors)))
        return Fitted(tuple(rows))

    def predicted(self, candidate: Candidate) -> float:
        """Return the objective of the dynamic programme for a candidate, with its own weights."""
        found = self.places[candidate.place]
        return predict(found.gram, found.influence, self.table(candidate).rows, candidate.computed)

    def errors(self, candidate: Candidate, seeds: Sequence[int]) -> tuple[list[float], list[float]]:
        """Run a candidate. Returns its error on each seed, and those of the single images."""
        trials, table = self.places[candidate.place].trials, self.table(candidate)
        runs = {seed: trials.run(table, seed).images for seed in seeds}
        errors = [relative_l2(images, self.reference(seed)) for seed, images in runs.items()]
        return errors, [error for seed, images in runs.items() for error in image_errors(images, self.reference(seed))]

    def attempt(self, candidate: Candidate) -> Tried:
        """Run a candidate on the calibration seeds, at most once."""
        for tried in self.runs:
            if tried.candidate == candidate:
                return tried
        trials, table = self.places[candidate.place].trials, self.table(candidate)
        errors, flops = [], []
        for seed in self.seeds:
            run = trials.run(table, seed)
            errors += image_errors(run.images, self.images[seed])
            flops.append(run.flops)
        predicted = self.predicted(candidate)
        error, typical = statistics.fmean(errors), geometric_mean(errors)
        self.runs.append(Tried(candidate, predicted, error, statistics.fmean(flops), typical))
        return self.runs[-1]

    def starts(self, name: Place, count: int, depth: int = DEPTH) -> list[Candidate]:
        """Return the candidates from which a search for `count` computed steps starts, without duplicates.

        They are the placements of the dynamic programme, and even ones, with fitted weights and with TaylorSeer's: the
        best policies that are set by hand. Their forecasts read at most `depth` values.
        """
        found = [placements[count - 1].computed for placements in self.places[name].placements]
        found.append(even(count, self.steps))
        found = [tuple(sorted({*self.begins, *computed})) for computed in (*found, every(count, self.steps))]
        starts = [Candidate(name, computed, "fitted", depth) for computed in found[:-1]]
        others = (found[0], found[-2], found[-1])
        return list(dict.fromkeys([*starts, *(Candidate(name, computed, "taylorseer", depth) for computed in others)]))

    def rank_correlation(self) -> float | None:
        """Return Spearman's correlation of predicted and measured errors over all candidates that ran."""
        if len(self.runs) < 3:
            return None
        return rank_correlation([t.predicted for t in self.runs], [t.typical for t in self.runs])


def image_errors(images: Tensor, reference: Tensor) -> list[float]:
    """Return the relative L2 error of each image."""
    return [relative_l2(a, b) for a, b in zip(images, reference, strict=True)]


def geometric_mean(errors: Sequence[float]) -> float:
    """Return the geometric mean of errors, each at least `SMALLEST`."""
    return math.exp(statistics.fmean(math.log(max(error, SMALLEST)) for error in errors))


def interpolate(known: dict[int, float], steps: int) -> Tensor:
    """Return a value for each step, linearly between the known ones. That of step 0, which always computes, is 0."""
    places = sorted(known)
    values = [0.0]
    for step in range(1, steps):
        low = max((p for p in places if p <= step), default=places[0])
        high = min((p for p in places if p >= step), default=places[-1])
        share = 0.0 if low == high else (step - low) / (high - low)
        values.append(known[low] * (1 - share) + known[high] * share)
    return torch.tensor(values, dtype=torch.float64)


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return Spearman's rank correlation."""
    ranks = [torch.tensor(v, dtype=torch.float64).argsort().argsort().double() for v in (xs, ys)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
