"""Whole trajectories of the overhead benchmark: FORA's speed-up, and the cost of its steps where they run.

A single step that is timed in alternation with other models finds its slots evicted from the CPU's caches by their
computing steps. Within a trajectory, a reusing step follows the step that filled its slots, or another reusing one.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import compress
from operator import not_
from statistics import fmean
from time import perf_counter
from typing import Any
from unittest import mock

import torch

import dit_rewrite
from benchmarks.timing import Row, Spread, alternate, ratio, seconds
from benchmarks.workload import STEPS, build, calls, scheduler
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.policies import FORA, TaylorSeer
from dit_rewrite.runtime import dispatch
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.runtime.inputs import Reader
from dit_rewrite.runtime.session import Session

SHARES = {3: 0.96, 5: 0.93}  # of the ideal speed-up, by interval
ORDERS = (1, 2)
UNGUARDED = "FORA(3) without Dynamo's guards"
PARTS = ("compiled code", "torch.compile's entry: Dynamo's guards", "telling calls apart", "decisions and slots")


class Run:
    """Runs trajectories of a rewritten model, and records the seconds of each step.

    `unguarded`: Dynamo skips its guards, as a user may ask for who changes nothing of the model between two steps.
    """

    def __init__(self, model: RewrittenModule, inputs: list[dict[str, Any]], unguarded: bool = False) -> None:
        self.model, self.inputs = model, inputs
        self.stance = partial(torch.compiler.set_stance, skip_guard_eval_unsafe=True) if unguarded else nullcontext
        self.reusing: list[float] = []  # the mean seconds of a reusing step, by trajectory
        self.computing: list[float] = []
        self.faults: list[float] = []  # the page faults of a computing step

    def __call__(self) -> None:
        spent, faults = list[float](), list[int]()
        with self.stance(), self.model.trajectory(scheduler=scheduler()):
            for kwargs in self.inputs:
                before = page_faults()
                spent.append(seconds(partial(self.model, **kwargs)))
                faults.append(page_faults() - before)
        reused = reusing_steps(self.model)
        self.computing.append(fmean(compress(spent, map(not_, reused))))
        self.reusing.append(fmean(compress(spent, reused)))
        self.faults.append(fmean(compress(faults, map(not_, reused))))


def page_faults() -> int:
    """Return how often this process has touched memory that the system had not given to it yet."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def reusing_steps(model: RewrittenModule) -> list[bool]:
    """Return which steps of the last trajectory computed no site."""
    return ["compute" not in each.strategies.values() for each in list(model.stats().decisions)[-STEPS:]]


def measure_trajectory(device: str, rounds: int) -> list[Row]:
    """Measure FORA over whole trajectories against plain torch.compile, and the steps of FORA and of TaylorSeer.

    The first trajectory of each is not measured: it compiles, and fills the step tables.
    """
    policies = {f"FORA({n})": FORA(n) for n in SHARES} | {f"order {n}": TaylorSeer(3, order=n) for n in ORDERS}
    model, inputs = build(device), calls(device)
    each = {name: Run(dit_rewrite.compile(twin(model), policy), inputs) for name, policy in policies.items()}
    each[UNGUARDED] = Run(each["FORA(3)"].model, inputs, unguarded=True)
    samples = _sampled(model, inputs, each, rounds)
    parts = measure_parts(each["FORA(3)"].model, inputs, rounds)
    return [*_steps(each), *_forecasts(each), *parts, *_speedups(samples), *_computing(each, samples)]


def _sampled(
    model: torch.nn.Module, inputs: list[dict[str, Any]], each: Mapping[str, Run], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of trajectories of plain torch.compile and of each model in alternation."""
    plain = isolated(model, "inductor")

    def run_plain() -> None:
        for kwargs in inputs:
            plain(**kwargs)

    runs: dict[str, Callable[[], object]] = {"plain": run_plain, **each}
    for run in runs.values():
        run()
    return alternate(runs, rounds)


def _steps(each: Mapping[str, Run]) -> Iterator[Row]:
    """Yield the costs of reusing steps within a trajectory, without the first one."""
    for name in (name for name in each if name.startswith("FORA")):
        pairs = zip(each[name].reusing[1:], each[name].computing[1:], strict=True)
        share = Spread.of([reused / computed for reused, computed in pairs])
        what = f"reusing step / computing step, in a trajectory of {name}"
        bound, held = ("", True) if name == UNGUARDED else ("<= 0.02", share.median <= 0.02)
        yield Row(what, share, "", bound, held)


def _forecasts(each: Mapping[str, Run]) -> Iterator[Row]:
    for order in ORDERS:
        pairs = zip(each[f"order {order}"].reusing[1:], each["FORA(3)"].reusing[1:], strict=True)
        share = Spread.of([forecast / reused for forecast, reused in pairs])
        what = f"step of a forecast, order {order} / reusing step, in trajectories of interval 3"
        yield Row(what, share, "", "<= 1.1", share.median <= 1.1)


def _computing(each: Mapping[str, Run], samples: Mapping[str, list[float]]) -> Iterator[Row]:
    """Yield the costs of computing steps within a trajectory, without the first one."""
    pairs = zip(each["FORA(3)"].computing[1:], samples["plain"], strict=True)
    share = Spread.of([computing * STEPS / plain for computing, plain in pairs])
    yield Row("computing step of FORA(3) / plain", share, "", "<= 1.02", share.median <= 1.02)
    yield Row("page faults of a computing step of FORA(3)", Spread.of(each["FORA(3)"].faults[1:]), "", "", True)


class Timer:
    """Adds up the seconds of a function."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.run = owner, name, getattr(owner, name)
        self.seconds = 0.0

    def patched(self) -> Any:
        """Return a context in which calls of the function are timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            try:
                return self.run(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - began

        return mock.patch.object(self.owner, self.name, timed)


def measure_parts(model: RewrittenModule, inputs: list[dict[str, Any]], rounds: int) -> list[Row]:
    """Measure where the time of a reusing step goes, within trajectories: four parts that add up to the step."""
    read, begin = Timer(Reader, "read"), Timer(Session, "begin")
    graph, code = Timer(CompiledGraph, "__call__"), Timer(dispatch, "execute")
    timers, shares = (read, begin, graph, code), []
    with ExitStack() as stack:
        for timer in timers:
            stack.enter_context(timer.patched())
        for _ in range(rounds):
            with model.trajectory(scheduler=scheduler()):
                spent = [_parts(timers, partial(model, **kwargs)) for kwargs in inputs]
            shares += [[part / sum(step) for part in step] for step in compress(spent, reusing_steps(model))]
    return [
        Row(f"share of a reusing step in FORA(3): {name}", Spread.of(list(share)), "", "", True)
        for name, share in zip(PARTS, zip(*shares, strict=True), strict=True)
    ]


def _parts(timers: Sequence[Timer], call: Callable[[], object]) -> list[float]:
    """Run a call, and return the seconds of each of PARTS."""
    for timer in timers:
        timer.seconds = 0.0
    whole = seconds(call)
    read, begin, graph, code = (timer.seconds for timer in timers)
    return [code, whole - read - begin - graph, read + begin, graph - code]


def _speedups(samples: Mapping[str, list[float]]) -> Iterator[Row]:
    for interval, bound in SHARES.items():
        speedup, ideal = ratio(samples, "plain", f"FORA({interval})"), STEPS / len(range(0, STEPS, interval))
        share = Spread(speedup.median / ideal, speedup.low / ideal, speedup.high / ideal, speedup.runs)
        yield Row(f"FORA({interval}), {STEPS} steps: speed-up", speedup, "", f"ideal {ideal:.3f}", True)
        what = f"FORA({interval}), as a share of the ideal"
        yield Row(what, share, "", f">= {bound}", share.median >= bound)
