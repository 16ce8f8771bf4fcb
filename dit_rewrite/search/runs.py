"""Compiled runs of the policies that `autopolicy` finds: their times, and the size of their caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from dit_rewrite.policies.schedules import StepMask
from dit_rewrite.policies.static import Never
from dit_rewrite.policy.rules import MadeFor, Policy
from dit_rewrite.search.denoisers import identity, parts_of, rewritten
from dit_rewrite.search.measurements import Candidate, Measurements
from dit_rewrite.search.trials import WHERE, images_of

ROUNDS = 3  # of timing, in alternation


class Runs:
    """Compiles the policies of candidates, and runs them as a user does."""

    def __init__(self, measured: Measurements) -> None:
        self.measured = measured
        self._peaks: dict[Candidate, int] = {}

    def policy(self, candidate: Candidate) -> Policy:
        """Return a candidate as a policy."""
        measured, table = self.measured, self.measured.table(candidate)
        policy = StepMask(
            computed=candidate.computed, num_steps=measured.steps, order=table.history(1) - 1, basis=table
        )
        rule = replace(policy.rules[0], where=WHERE[candidate.place])
        made_for = MadeFor(identity("autopolicy", measured.model), measured.steps, measured.scheduler)
        name = f"autopolicy({len(candidate.computed)} of {measured.steps} steps, {candidate.style}, {candidate.place})"
        return Policy((rule,), name, made_for=made_for)

    def peak_bytes(self, candidate: Candidate) -> int:
        """Return the largest size of the caches in a run of the policy."""
        if candidate not in self._peaks:
            self._compiled(candidate)
        return self._peaks[candidate]

    def _compiled(self, candidate: Candidate | None) -> Any:
        """Return a model that was compiled by a run with the policy of a candidate, or without a policy."""
        policy = Never() if candidate is None else self.policy(candidate)
        model = rewritten(self.measured.model, policy, self.measured.backend)
        images_of(self.measured.sample, model, self.measured.seeds[0], policy)
        if candidate is not None:
            self._peaks[candidate] = sum(part.stats().peak_bytes for part in parts_of(model).values())
        return model

    def seconds(self, candidate: Candidate | None) -> tuple[float, float]:
        """Return the seconds of a full run, and those of a run with the policy of a candidate, by alternation."""
        seed, sample = self.measured.seeds[0], self.measured.sample
        models = [self._compiled(each) for each in ([None] if candidate is None else [None, candidate])]
        rounds = [[_timed(sample, model, seed) for model in models] for _ in range(ROUNDS)]
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        return times[0], times[-1]


def _timed(sample: Callable[[Any, int], Tensor], model: Any, seed: int) -> float:
    began = time.perf_counter()
    images_of(sample, model, seed)  # copies the images to the host, which waits for the device
    return time.perf_counter() - began
