"""The plan of a trajectory as far as it can be known before it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.decide import NEVER, Computed, Decider, Moment, SiteSpec, pushed

FORESEEN_STEPS = 64  # how far to look ahead where nobody told the number of steps
LONGEST = 1000  # and at most, whatever was told
ANSWERS = (None, 0.0, 1e6)  # what measurements may turn out to be: none, no change, a large one

Row = tuple[bool, ...]
Noise = Callable[[int], tuple[float | None, float | None]]  # sigma and SNR of a step; None where it is not known


def _unknown(step: int) -> tuple[None, None]:
    return None, None


def simulate(
    specs: Sequence[SiteSpec],
    num_steps: int | None,
    noise: Noise = _unknown,
    streams: Collection[str] = (),
    measures: bool = False,
) -> list[Row]:
    """The rows of a trajectory whose every call finds the slots it left, for each stream that rules name and another.

    `noise` gives sigma and SNR of a step. Without `num_steps`, the first steps of a long trajectory are looked at.
    Where guards measure, the plan is not known: these are its rows if every measurement were the same.
    """
    answers = ANSWERS if measures else (None,)
    plans = itertools.product((None, *sorted(streams)), answers)
    return [row for stream, answer in plans for row in _rows(specs, num_steps, noise, stream, answer)]


def _rows(
    specs: Sequence[SiteSpec], num_steps: int | None, noise: Noise, stream: str | None, answer: float | None
) -> list[Row]:
    past, streak = [NEVER] * len(specs), [0] * len(specs)
    rows = []
    for step in range(min(num_steps or FORESEEN_STEPS, LONGEST)):
        holds = [step > 0] * len(specs)
        sigma, snr = noise(step)
        moment = Moment(step, num_steps, sigma=sigma, snr=snr, stream=stream)
        decided = Decider(specs, moment, past, streak, holds, measure=lambda _, __: answer).decisions()
        rows.append(decided.row)
        for i, (reused, reason) in enumerate(zip(decided.row, decided.reasons, strict=True)):
            if not reused:
                past[i], streak[i] = pushed(past[i], Computed(step, sigma, snr), specs[i].depth), 0
            elif reason is not Reason.COVERED:
                streak[i] += 1
    return rows
