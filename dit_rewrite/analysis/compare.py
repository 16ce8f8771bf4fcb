"""Numbers that compare profiles: variation over prompts, rank correlations, and which measure predicts reuse errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_rewrite.analysis.places import Quantity
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.analysis.statistics import MEASURES, Row

Z = 1.96  # of a normal distribution, for 95 %
VALUE = "value"  # the value of a site, which reuse replaces: BRANCH of an attention, MLP of an MLP
PREDICTORS = (VALUE, Quantity.KEYS, Quantity.VALUES, Quantity.ATTENTION)


class Interval(NamedTuple):
    """A mean with the limits of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


class Correlation(NamedTuple):
    """Rank correlations: their mean, their tenth percentile, and their number."""

    mean: float
    low: float
    number: int


class Prediction(NamedTuple):
    """How well a measure of a quantity predicts the reuse error of its site, as rank correlations.

    ``overall``: over all pairs of site and step. ``among_sites``: among the sites of one step, as the mean over steps.
    ``pairs``: the number of pairs of site and step.
    """

    quantity: str
    measure: str
    overall: float
    among_sites: float
    pairs: int


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value; equal values get the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[inverse].double()


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two vectors, over the places where both are finite.

    NaN for fewer than three places, or where all values of one are equal.
    """
    seen = a.isfinite() & b.isfinite()
    if int(seen.sum()) < 3:
        return math.nan
    x, y = (ranks(values[seen]) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    sizes = float(x.norm() * y.norm())
    return float(x @ y) / sizes if sizes else math.nan


def coefficient_of_variation(analysis: Analysis, quantity: str, measure: str = "l1") -> Interval:
    """Return the standard deviation over prompts as a fraction of the mean, averaged over layers and steps.

    The interval is that of one cell, for normally distributed values: all layers and steps see the same prompts, so
    their errors are not taken to cancel.
    """
    cells = [analysis.table.index(row) for row in analysis.rows(quantity=str(quantity))]
    number = MEASURES.index(measure)
    count, mean, spread = (
        values[cells, :, number] for values in (analysis.table.count, analysis.table.mean, analysis.table.deviations)
    )
    seen = (count > 1) & (mean.abs() > 0)
    if not seen.any():
        return Interval(math.nan, math.nan, math.nan)
    share = spread[seen] / mean[seen].abs()
    error = share * (1 / (2 * (count[seen] - 1)) + share.square() / count[seen]).sqrt()
    middle, half = float(share.mean()), Z * float(error.mean())
    return Interval(middle, max(0.0, middle - half), middle + half)


def prompt_stability(analysis: Analysis, quantity: str, measure: str = "l1") -> Correlation:
    """Return the rank correlation over the steps between the profiles of each two of the kept prompts."""
    kept = sorted(analysis.profiles)
    found = [
        spearman(analysis.profile(a, row, measure), analysis.profile(b, row, measure))
        for row in analysis.rows(quantity=str(quantity))
        for a, b in itertools.combinations(kept, 2)
    ]
    return _summed(found)


def stability(first: Analysis, second: Analysis, quantity: str, measure: str = "l1") -> Correlation:
    """Return the rank correlation over progress between the profiles of two analyses of one model.

    They may have other numbers of steps, or other schedulers. The longer profile is interpolated at the steps of the
    shorter one.
    """
    theirs = set(second.rows(quantity=str(quantity)))
    pairs = [
        (first.mean(row, measure), second.mean(row, measure))
        for row in first.rows(quantity=str(quantity))
        if row in theirs
    ]
    return _summed([spearman(*_aligned(a, b)) for a, b in pairs])


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    short, long = sorted((a[1:], b[1:]), key=len)  # a first step has nothing before it
    return short, resampled(long, len(short))


def resampled(values: Tensor, count: int) -> Tensor:
    """Return values over progress at `count` evenly spaced places, by linear interpolation."""
    if count == len(values) or count < 2:
        return values[:count]
    at = torch.linspace(0, len(values) - 1, count, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(values) - 2)
    share = at - low
    return values[low] * (1 - share) + values[low + 1] * share


def _summed(found: Sequence[float]) -> Correlation:
    known = torch.tensor([value for value in found if math.isfinite(value)], dtype=torch.float64)
    if not len(known):
        return Correlation(math.nan, math.nan, 0)
    return Correlation(float(known.mean()), float(known.quantile(0.1)), len(known))


def predictions(analysis: Analysis) -> list[Prediction]:
    """Return how well each measure of each quantity predicts the measured reuse errors, best first.

    Of a cosine, the distance 1 - cosine is taken, so that a good predictor has a correlation near 1. A site with
    several rows, for modalities and streams, counts with their mean.
    """
    errors = analysis.errors
    if errors is None:
        return []
    found = []
    for quantity, measure in itertools.product(PREDICTORS, MEASURES):
        sites = [site for site in errors.sites if _rows_of(analysis, site, quantity)]
        if sites:
            steps = errors.values.shape[1]
            change = torch.stack([_change(analysis, site, quantity, measure)[:steps] for site in sites])
            caused = torch.stack([errors.of(site)[: change.shape[1]] for site in sites])
            among = _summed([spearman(*pair) for pair in zip(change.T, caused.T, strict=True)])
            pairs = int((change.isfinite() & caused.isfinite()).sum())
            overall = spearman(change.flatten(), caused.flatten())
            found.append(Prediction(str(quantity), measure, overall, among.mean, pairs))
    return sorted(found, key=lambda p: -p.overall if math.isfinite(p.overall) else math.inf)


def _rows_of(analysis: Analysis, site: str, quantity: str) -> list[Row]:
    rows = analysis.rows(site=site)
    if quantity == VALUE:
        return [row for row in rows if row.quantity == (Quantity.MLP if row.kind == "mlp" else Quantity.BRANCH)]
    return [row for row in rows if row.quantity == quantity]


def _change(analysis: Analysis, site: str, quantity: str, measure: str) -> Tensor:
    rows = torch.stack([analysis.mean(row, measure) for row in _rows_of(analysis, site, quantity)]).nanmean(0)
    return 1 - rows if measure == "cosine" else rows


def summary(analysis: Analysis) -> str:
    """Return the analysis as a few lines of text."""
    return "\n".join(_lines(analysis))


def _lines(analysis: Analysis) -> Iterator[str]:
    count = len(analysis.prompts)
    where = "behind norms and rotations" if analysis.settings["keys"] == "core" else "as projected"
    yield f"{analysis.name}: {count} prompts, {analysis.steps} steps; keys and values {where}"
    for quantity in Quantity:
        rows = analysis.rows(quantity=str(quantity))
        if rows:
            changes = torch.stack([analysis.mean(row, "relative_l1").nanmean() for row in rows])
            most, least = rows[int(changes.argmax())], rows[int(changes.argmin())]
            over_prompts = (
                ""
                if count < 2
                else (
                    f"; L1 varies over prompts by {coefficient_of_variation(analysis, quantity)} of its mean; rank "
                    f"correlation between prompts {prompt_stability(analysis, quantity).mean:.2f}"
                )
            )
            yield (
                f"{quantity}: relative L1 per step {float(changes.nanmean()):.4f}, from {float(changes.min()):.4f} at "
                f"{least.site} to {float(changes.max()):.4f} at {most.site}{over_prompts}"
            )
    for best in predictions(analysis)[:1]:
        yield f"best predictor of reuse errors: {best.measure} of {best.quantity}, rank correlation {best.overall:.2f}"
    if analysis.refused:
        yield f"not measured: {len(analysis.refused)} places (analysis.refused says why)"
