"""The predicted costs of a trajectory beside the measured ones: lines of `explain()`, and a table of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def side_by_side(
    predicted: Prediction | PredictionReason, measured: Stats | None, slot_bytes: int
) -> list[Sequence[object]]:
    """Return a table of the predicted and the measured costs, with its head. `slot_bytes` are those predicted for the
    slots of all streams. A cell is empty where a cost is unknown."""
    guess = predicted if isinstance(predicted, Prediction) else None
    ran = measured if measured is not None and measured.computed + measured.reused else None
    rows: list[Sequence[object]] = [("", "predicted", "measured")]
    if guess is None and ran is None:
        return rows
    how = "" if guess is None else "by FLOPs" if guess.roofline is None else "by times"
    whole = None if guess is None or guess.roofline is None else guess.plain_seconds
    rows += [
        ("speed-up", _cell(_of(guess, "speedup"), "{:.2f} " + how), _cell(_of(ran, "speedup"), "{:.2f}")),
        ("ms of a call that computes everything", _cell(whole, "{:,.2f}", 1000),
         _cell(_of(ran, "computing_seconds"), "{:,.2f}", 1000)),
        ("Recomp % (predicted: of the branches; measured: of the guarded sites)",
         _cell(_of(guess, "recomputed_fraction"), "{:.1f}", 100),
         _cell(_of(ran, "recomputed_fraction"), "{:.1f}", 100)),
        ("bytes in slots", f"{slot_bytes:,}", _cell(_of(ran, "peak_bytes"), "{:,}")),
    ]  # fmt: skip
    counts = {} if guess is None else guess.counts
    rows += [(f"{kind} branches that compute", f"{some} of {total}", "") for kind, (some, total) in counts.items()]
    return rows


def _of(costs: Prediction | Stats | None, name: str) -> float | None:
    found: float | None = None if costs is None else getattr(costs, name)
    return found


def _cell(value: float | None, text: str, factor: int = 1) -> str:
    return "" if value is None else text.format(value * factor)
