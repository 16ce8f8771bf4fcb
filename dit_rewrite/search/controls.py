"""The control of `autopolicy`: fewer steps of the best solver, without a policy, at the same cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from torch import Tensor, nn

from dit_rewrite.module import twin
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.search.certificate import Control, Errors
from dit_rewrite.search.denoisers import parts_of
from dit_rewrite.search.trials import images_of

Solver = Callable[[Any, int, int], Tensor]  # (denoiser, steps, seed) -> images


class Controls:
    """Runs the plain model with fewer steps of several solvers, and counts the calls of the model."""

    def __init__(
        self,
        model: nn.Module,
        solvers: Mapping[str, Solver],
        full_calls: int,
        report: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.solvers, self.full_calls, self.report = dict(solvers), full_calls, report
        self._model = twin(model)
        self._calls = 0
        for part in parts_of(self._model).values():
            part.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self._calls += 1

    def best(
        self, cost: float, search: Mapping[int, Tensor], held_out: Mapping[int, Tensor], slack: float = 1e-6
    ) -> Control | None:
        """Return the solver with the least error on the images `search`, by seed, among those that cost at most `cost`,
        with its errors on the images `held_out`; None if none is as cheap.

        Each solver runs with the most steps that it may take. One that fails is reported and left out: diffusers calls
        schedulers compatible that a pipeline cannot use.
        """
        ranked = []
        for name in self.solvers:
            try:
                steps, calls = self._most_steps(name, cost + slack, next(iter(search)))
                if steps:
                    ranked.append((self._error(name, steps, search), name, steps, calls))
            except Exception as failed:
                error = failed.__cause__ or failed
                self.report(f"the control {name} cannot sample: {type(error).__name__}: {error}")
        if not ranked:
            return None
        _, name, steps, calls = min(ranked)
        errors = [relative_l2(self._run(name, steps, seed), images) for seed, images in held_out.items()]
        return Control(name, steps, calls / self.full_calls, Errors.of(errors))

    def _most_steps(self, name: str, cost: float, seed: int) -> tuple[int, int]:
        """Return the most steps of a solver at this cost, and how often they call the model."""
        allowed = math.floor(cost * self.full_calls)
        steps, calls = allowed, allowed + 1
        while steps > 0 and calls > allowed:
            self._run(name, steps, seed)
            calls = self._calls
            steps = steps if calls <= allowed else min(steps - 1, steps * allowed // calls)
        return (steps, calls) if steps > 0 else (0, 0)

    def _error(self, name: str, steps: int, targets: Mapping[int, Tensor]) -> float:
        return statistics.fmean(relative_l2(self._run(name, steps, seed), t) for seed, t in targets.items())

    def _run(self, name: str, steps: int, seed: int) -> Tensor:
        self._calls, solver = 0, self.solvers[name]
        sample = wraps(solver)(lambda model, seed: solver(model, steps, seed))
        return images_of(sample, self._model, seed, f"{name} in {steps} steps")


def is_better(control: Control, errors: Sequence[float]) -> bool:
    """Return whether the control's error is less than that of the policy, on average over the same seeds."""
    return control.errors.mean < statistics.fmean(errors)
