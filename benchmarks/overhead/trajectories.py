"""Whole trajectories of the overhead benchmark: FORA's speed-up, and the cost of its steps where they run.

A single step that is timed in alternation with other models finds its slots evicted from the CPU's caches by their
computing steps. Within a trajectory, a reusing step follows the step that filled its slots, or another reusing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean
from typing import Any

import dit_rewrite
from benchmarks.timing import Row, Spread, alternate, ratio, seconds
from benchmarks.workload import STEPS, build, calls, scheduler
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.policies import FORA, TaylorSeer

SHARES = {3: 0.96, 5: 0.93}  # of the ideal speed-up, by interval
ORDERS = (1, 2)


class Run:
    """Runs trajectories of a rewritten model, and records the seconds of each step."""

    def __init__(self, model: RewrittenModule, inputs: list[dict[str, Any]]) -> None:
        self.model, self.inputs = model, inputs
        self.reusing: list[float] = []  # the mean seconds of a reusing step, by trajectory
        self.computing: list[float] = []

    def __call__(self) -> None:
        with self.model.trajectory(scheduler=scheduler()):
            spent = [seconds(partial(self.model, **kwargs)) for kwargs in self.inputs]
        done = list(self.model.stats().decisions)[-STEPS:]
        computes = ["compute" in each.strategies.values() for each in done]
        self.computing.append(fmean(time for time, computed in zip(spent, computes, strict=True) if computed))
        self.reusing.append(fmean(time for time, computed in zip(spent, computes, strict=True) if not computed))


def measure_trajectory(device: str, rounds: int) -> list[Row]:
    """Measure FORA over whole trajectories against plain torch.compile, and the steps of FORA and of TaylorSeer.

    The first trajectory of each is not measured: it compiles, and fills the step tables.
    """
    model, inputs = build(device), calls(device)
    plain = isolated(model, "inductor")

    def run_plain() -> None:
        for kwargs in inputs:
            plain(**kwargs)

    policies = {f"FORA({n})": FORA(n) for n in SHARES} | {f"order {n}": TaylorSeer(3, order=n) for n in ORDERS}
    each = {name: Run(dit_rewrite.compile(twin(model), policy), inputs) for name, policy in policies.items()}
    runs: dict[str, Callable[[], object]] = {"plain": run_plain, **each}
    for run in runs.values():
        run()
    samples = alternate(runs, rounds)
    speedups = [
        row for n, share in SHARES.items() for row in _speedups(ratio(samples, "plain", f"FORA({n})"), n, share)
    ]
    return [*_steps(each), *speedups]


def _steps(each: dict[str, Run]) -> Iterator[Row]:
    """Yield the costs of steps within a trajectory, without the first one."""
    for name in (f"FORA({n})" for n in SHARES):
        pairs = zip(each[name].reusing[1:], each[name].computing[1:], strict=True)
        share = Spread.of([reused / computed for reused, computed in pairs])
        what = f"reusing step / computing step, in a trajectory of {name}"
        yield Row(what, share, "", "<= 0.02", share.median <= 0.02)
    for order in ORDERS:
        pairs = zip(each[f"order {order}"].reusing[1:], each["FORA(3)"].reusing[1:], strict=True)
        share = Spread.of([forecast / reused for forecast, reused in pairs])
        what = f"step of a forecast, order {order} / reusing step, in trajectories of interval 3"
        yield Row(what, share, "", "<= 1.1", share.median <= 1.1)


def _speedups(speedup: Spread, interval: int, bound: float) -> list[Row]:
    ideal = STEPS / len(range(0, STEPS, interval))
    share = Spread(speedup.median / ideal, speedup.low / ideal, speedup.high / ideal, speedup.runs)
    return [
        Row(f"FORA({interval}), {STEPS} steps: speed-up", speedup, "", f"ideal {ideal:.3f}", True),
        Row("… as a share of the ideal", share, "", f">= {bound}", share.median >= bound),
    ]
