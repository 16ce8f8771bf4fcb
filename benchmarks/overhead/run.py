"""Costs and savings of rewriting: python -m benchmarks.overhead [--rounds 40] [--device cuda]

The model is a 6-layer DiT of width 384 on 2 x 256 tokens. The benchmark compares reuse 0 with plain torch.compile, a
fully reusing step with a computing one (alone, and within a trajectory), and FORA over 50 steps with its ideal; it also
measures the compile time and the host time that dispatch adds. Ratios are those of alternating runs in one process; the
ratio of plain torch.compile to itself (A/A) is the noise floor. The table is also written to docs/overhead.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch

import dit_rewrite
from benchmarks.overhead import report as page
from benchmarks.overhead import segments
from benchmarks.overhead.geometries import measure_geometries
from benchmarks.overhead.trajectories import measure_trajectory
from benchmarks.overhead.warm_start import measure_warm_start
from benchmarks.timing import Row, Spread, alternate, ratio, report, seconds
from benchmarks.workload import ALWAYS, STEPS, Stepper, alternate_steps, build, calls, cold, instant, scheduler
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering, isolated
from dit_rewrite.guards import step
from dit_rewrite.module import RewrittenModule, attach, twin
from dit_rewrite.policies import FORA
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast

INTERVAL = 3
FORECASTS = {
    f"step of a forecast, order {order}": Policy((Rule(step > order, Forecast(order)),), f"order {order}")
    for order in (1, 2)
}


def measure_steps(device: str, rounds: int) -> list[Row]:
    """Measure reuse 0 and a reusing step against plain torch.compile, and steps that forecast every branch."""
    model, inputs, lower = build(device), calls(device), Lowering()
    plain = isolated(model, "inductor")
    computing = attach(twin(model), Backend(model, ALWAYS, lower, force=True))
    reusing = dit_rewrite.compile(twin(model), ALWAYS)
    runs = {
        "plain": Stepper(plain, inputs),
        "plain again": Stepper(plain, inputs),
        "reuse 0": Stepper(computing, inputs),
        "reusing": Stepper(reusing, inputs),
        **{name: Stepper(dit_rewrite.compile(twin(model), policy), inputs) for name, policy in FORECASTS.items()},
    }
    samples = alternate_steps(runs, rounds)
    forecast = [ratio(samples, name, "reusing") for name in FORECASTS]
    again, computed, reused = (ratio(samples, *pair) for pair in _PAIRS)
    return [
        Row("plain torch.compile, a step", Spread.of(samples["plain"]), "s", "", True),
        Row("A/A: plain / plain", again, "", "noise floor", True),
        Row("reuse 0 / plain", computed, "", "<= 1.02", computed.median <= 1.02),
        Row("reusing step / computing step", reused, "", "<= 0.02", reused.median <= 0.02),
        first_trajectory(inputs, plain, reusing, max(rounds // 8, 3)),
        *(
            Row(f"{name} / reusing step", each, "", "<= 1.1", each.median <= 1.1)
            for name, each in zip(FORECASTS, forecast, strict=True)
        ),
    ]


_PAIRS = (("plain again", "plain"), ("reuse 0", "plain"), ("reusing", "reuse 0"))


def first_trajectory(inputs: list[dict[str, Any]], plain: Any, reusing: RewrittenModule, rounds: int) -> Row:
    """Measure the reusing steps of trajectories with new conditioning, whose step table has no rows yet."""
    found = []
    for _ in range(rounds):
        labels = inputs[0]["class_labels"].clone()
        steps = [{**kwargs, "class_labels": labels} for kwargs in inputs]
        computing = seconds(lambda: plain(**inputs[0]))
        with reusing.trajectory(scheduler=scheduler()):
            reusing(**steps[0])
            spent = seconds(lambda: [reusing(**kwargs) for kwargs in steps[1:]])  # noqa: B023
        found.append(spent / (STEPS - 1) / computing)
    each = Spread.of(found)
    return Row("… mean over the first trajectory of a conditioning", each, "", "<= 0.03", each.median <= 0.03)


def measure_compile(device: str, rounds: int) -> list[Row]:
    """Measure the first call with empty caches: FORA's two variants against the one graph of plain torch.compile."""
    model, (first, *_) = build(device), calls(device)

    runs = {
        "plain": cold(lambda: isolated(model, "inductor"), first),
        "FORA": cold(lambda: dit_rewrite.compile(twin(model), FORA(INTERVAL)), first),
    }
    seconds(runs["plain"])  # the first compile of a process also loads the compiler
    samples = alternate(runs, rounds)
    found = ratio(samples, "FORA", "plain")
    return [
        Row("plain torch.compile, first call", Spread.of(samples["plain"]), "s", "", True),
        Row(f"FORA({INTERVAL}) / plain, first call", found, "", "<= 1.3", found.median <= 1.3),
    ]


def measure_host(device: str, rounds: int) -> list[Row]:
    """Measure the host time that dispatch adds to a call, with compiled code that returns precomputed results."""
    model, inputs = build(device), calls(device)

    plain = Stepper(isolated(model, instant), inputs)
    explicit = Stepper(dit_rewrite.compile(twin(model), FORA(INTERVAL), backend=instant), inputs)
    inferred = dit_rewrite.compile(twin(model), FORA(INTERVAL), backend=instant)
    each = itertools.cycle(inputs)
    runs: dict[str, Callable[[], object]] = {
        "plain": plain,
        "explicit trajectory": explicit,
        "inferred trajectory": lambda: inferred(**next(each)),
    }
    for run in runs.values():
        run()
    samples = alternate(runs, rounds * 25)
    explicit.close()
    rows = []
    for name, bound in (("explicit trajectory", 80.0), ("inferred trajectory", None)):
        added = Spread.of([(a - b) * 1e6 for a, b in zip(samples[name], samples["plain"], strict=True)])
        held = bound is None or added.median <= bound
        rows.append(Row(f"host time added to a call, {name}", added, "µs", f"<= {bound:.0f}" if bound else "", held))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="alternating runs of single steps")
    parser.add_argument("--compiles", type=int, default=3, help="alternating cold compiles")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="more than the idle cores spin against each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        rows = measure_steps(arguments.device, arguments.rounds)
        rows += measure_trajectory(arguments.device, max(arguments.rounds // 8, 3))
        rows += measure_host(arguments.device, arguments.rounds)
        rows += measure_compile(arguments.device, arguments.compiles)
        rows += measure_geometries(arguments.device, arguments.rounds)
    rows += segments.measure_all(arguments.device, arguments.rounds, arguments.compiles)
    rows += measure_warm_start(arguments.compiles)
    model = "DiTTransformer2DModel, 6 layers, width 384, 2 x 256 tokens, float32, random weights"
    report("overhead", rows, {"model": model})
    page.write_page()
