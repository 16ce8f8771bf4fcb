"""Predicted against measured speed-ups: python -m benchmarks.predictions [--rounds 5] [--device cuda]

The model is that of the overhead benchmarks, a 6-layer DiT of width 384 on 2 x 256 tokens, over 50 steps. Predictions
come from the FLOPs and bytes of each step and the speed of this machine, measured once (`dit_rewrite.predict`); nothing
is fitted. Measured speed-ups are ratios to plain torch.compile. All models go through the trajectory step by step side
by side, and of each step the fastest of some rounds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import dit_rewrite
from benchmarks.timing import Row, Spread, report, seconds
from benchmarks.workload import STEPS, build, calls
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.policies import DQAR, FORA, TaylorSeer
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.prediction import Prediction

GOAL = 0.1  # relative difference between the predicted and the measured speed-up
POLICIES: tuple[Policy, ...] = (FORA(2), FORA(3), FORA(5), DQAR(snr_threshold=None), TaylorSeer(3))


def lockstep(models: Mapping[str, Any], inputs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the seconds of each step of each model in one trajectory; a step of one follows that of another."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            if isinstance(model, RewrittenModule):
                stack.enter_context(model.trajectory(num_steps=STEPS))
        for arguments in inputs:
            for name, model in models.items():
                samples[name].append(seconds(lambda model=model, arguments=arguments: model(**arguments)))
    return samples


def speedup(rounds: Sequence[Mapping[str, list[float]]], name: str) -> Spread:
    """Return the speed-up over plain torch.compile, and the quartiles of that of single rounds.

    Of each step the fastest round counts, since other load on the machine only slows a step down.
    """
    single = Spread.of([sum(each["plain"]) / sum(each[name]) for each in rounds])
    plain, ours = (sum(map(min, zip(*(each[which] for each in rounds), strict=True))) for which in ("plain", name))
    return Spread(plain / ours, single.low, single.high, len(rounds))


def measure(device: str, rounds: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows of the table, and the predictions in numbers."""
    model, inputs = build(device), calls(device)
    rewritten = {str(policy): dit_rewrite.compile(twin(model), policy) for policy in POLICIES}
    models = {"plain": isolated(model, "inductor"), **rewritten}
    lockstep(models, inputs)  # compiles
    predictions = {name: dit_rewrite.predict(each, num_steps=STEPS) for name, each in rewritten.items()}
    samples = [lockstep(models, inputs) for _ in range(rounds)]
    rows, numbers = [], []
    for name, found in predictions.items():
        assert isinstance(found, Prediction), found
        measured = speedup(samples, name)
        off = found.speedup / measured.median - 1
        bound = f"{found.speedup:.3f} predicted, within {GOAL:.0%}"
        rows.append(Row(f"{name.split('(')[0]}{_interval(name)}: speed-up", measured, "", bound, abs(off) <= GOAL))
        numbers.append(describe(name, found, measured, off))
    return rows, numbers


def _interval(name: str) -> str:
    """Return the interval of a policy's name in brackets, if it has one."""
    found = re.search(r"interval=(\d+)", name)
    return f"({found[1]})" if found else ""


def describe(name: str, found: Prediction, measured: Spread, off: float) -> dict[str, Any]:
    """Return a prediction as JSON, beside the measurement."""
    return {
        "policy": name,
        "predicted": round(found.speedup, 4),
        "by FLOPs": round(found.plain_flops / found.flops, 4),
        "measured": round(measured.median, 4),
        "difference": round(off, 4),
        "recomputed": round(found.recomputed_fraction, 4),
        "attention share": round(found.attention_share, 4),
        "plain step, predicted seconds": found.plain_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="trajectories")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="more than the idle cores spin against each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        rows, numbers = measure(arguments.device, arguments.rounds)
    report("predictions", rows, {"steps": STEPS, "goal": GOAL, "predictions": numbers})


if __name__ == "__main__":
    main()
