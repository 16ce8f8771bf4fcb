"""The lines of `explain()` about a trajectory: the predicted costs, and those that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from dit_rewrite.errors import PredictionReason
from dit_rewrite.report.prediction import Prediction
from dit_rewrite.runtime.stats import Stats


def comparison(predicted: Prediction | PredictionReason, measured: Stats | None) -> Iterator[str]:
    """Yield lines with the predicted counts, shares and speed-up, and with the measured ones after a run."""
    if isinstance(predicted, Prediction):
        yield from _predicted(predicted)
    else:
        yield f"predicted nothing: {predicted}"
    if measured is not None and measured.computed + measured.reused:
        yield f"measured  Recomp {measured.recomputed_fraction:.1%} of the guarded sites{_speed(measured)}"


def _predicted(predicted: Prediction) -> Iterator[str]:
    counts = ", ".join(f"{kind} {some} of {total}" for kind, (some, total) in predicted.counts.items())
    yield f"predicted {predicted.num_steps} steps: Recomp {predicted.recomputed_fraction:.1%} ({counts})"
    share = predicted.flops / max(predicted.plain_flops, 1)
    yield f"          {share:.1%} of all FLOPs"
    yield f"          attention FLOPs: {predicted.attention_share:.1%} of full; by step, in %: {_by_step(predicted)}"
    if predicted.roofline is None:
        yield f"          speed-up {predicted.speedup:.2f} by FLOPs"
    else:
        step = 1000 * predicted.plain_seconds
        yield f"          speed-up {predicted.speedup:.2f} (a step without caching: {step:.3g} ms)"


def _by_step(predicted: Prediction) -> str:
    """Return the attention FLOPs of each step in percent; runs of equal ones are written once, as in ``23 x4``."""
    texts = [f"{100 * share:.3g}" for share in predicted.attention_shares]
    runs = [(text, len(list(run))) for text, run in groupby(texts)]
    return ", ".join(text if count == 1 else f"{text} x{count}" for text, count in runs)


def _speed(measured: Stats) -> str:
    """Return the measured speed-up, or how to get it."""
    if not measured.timed:
        return "; times are measured with compile(timing=True)"
    if measured.speedup is None:
        return "; no trajectory ran without a compilation yet, so no time is given"
    return f"; speed-up {measured.speedup:.2f} (a computing call: {1000 * (measured.computing_seconds or 0):.3g} ms)"
