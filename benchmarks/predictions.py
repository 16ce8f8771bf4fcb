"""Predicted against measured speed-ups: python -m benchmarks.predictions [--rounds 5] [--device cuda]

The model is that of the overhead benchmarks, a 6-layer DiT of width 384 on 2 x 256 tokens, over 50 steps. Predictions
come from the FLOPs and bytes of each step and the speed of this machine, measured once (`dit_rewrite.predict`); nothing
is fitted. Measured speed-ups are ratios to plain torch.compile. All models go through the trajectory step by step side
by side, and of each step the fastest of some rounds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

import dit_rewrite
from benchmarks.timing import RESULTS, Row, Spread, report, seconds
from benchmarks.workload import STEPS, build, calls
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.policies import DQAR, FORA, Never, TaylorSeer
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
                samples[name].append(seconds(partial(model, **arguments)))
    return samples


def speedup(rounds: Sequence[Mapping[str, list[float]]], name: str) -> Spread:
    """Return the speed-up over plain torch.compile, and the quartiles of that of single rounds.

    Of each step the fastest round counts, since other load on the machine only slows a step down.
    """
    single = Spread.of([sum(each["plain"]) / sum(each[name]) for each in rounds])
    plain, ours = (sum(map(min, zip(*(each[which] for each in rounds), strict=True))) for which in ("plain", name))
    return Spread(plain / ours, single.low, single.high, len(rounds))


def measure(device: str, rounds: int) -> dict[str, Spread]:
    """Return the measured speed-up of each policy."""
    model, inputs = build(device), calls(device)
    rewritten = {str(policy): dit_rewrite.compile(twin(model), policy) for policy in POLICIES}
    models = {"plain": isolated(model, "inductor"), **rewritten}
    lockstep(models, inputs)  # compiles
    samples = [lockstep(models, inputs) for _ in range(rounds)]
    return {name: speedup(samples, name) for name in rewritten}


def measured_before() -> dict[str, Spread]:
    """Return the measured speed-ups of the results file."""
    content = json.loads((RESULTS / "predictions.json").read_text(encoding="utf-8"))
    spreads = [Spread(**row["value"]) for row in content["rows"]]
    return dict(zip((found["policy"] for found in content["predictions"]), spreads, strict=True))


def predict(device: str) -> dict[str, Prediction]:
    """Return the prediction of each policy, from one call of the model. What compiles the graphs does not matter."""
    model, (first, *_) = dit_rewrite.compile(build(device), Never(), backend="aot_eager"), calls(device)
    model(**first)
    found = {str(policy): dit_rewrite.predict(model, policy, STEPS) for policy in POLICIES}
    assert all(isinstance(each, Prediction) for each in found.values()), found
    return found  # type: ignore[return-value]


def compare(predicted: dict[str, Prediction], measured: dict[str, Spread]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows of the table, and the predictions in numbers."""
    rows, numbers = [], []
    for name, found in predicted.items():
        off = found.speedup / measured[name].median - 1
        bound = f"{found.speedup:.3f} predicted, within {GOAL:.0%}"
        row = f"{name.split('(')[0]}{_interval(name)}: speed-up"
        rows.append(Row(row, measured[name], "", bound, abs(off) <= GOAL))
        numbers.append(describe(name, found, measured[name], off))
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
    parser.add_argument("--predict", action="store_true", help="keep the measured speed-ups of the results file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="more than the idle cores spin against each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        predicted = predict(arguments.device)
        measured = measured_before() if arguments.predict else measure(arguments.device, arguments.rounds)
    rows, numbers = compare(predicted, measured)
    report("predictions", rows, {"steps": STEPS, "goal": GOAL, "predictions": numbers})


if __name__ == "__main__":
    main()
