"""Predicted against measured speed-ups: python -m benchmarks.predictions [--rounds 5] [--device cuda]

The model is that of the overhead benchmarks, a 6-layer DiT of width 384 on 2 x 256 tokens, over 50 steps. Predictions
come from the FLOPs and bytes of each step and the speed of this machine, measured once (`dit_rewrite.predict`); nothing
is fitted. Measured speed-ups are ratios to plain torch.compile of alternating runs in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import dit_rewrite
from benchmarks.timing import Row, Spread, alternate, ratio, report
from benchmarks.workload import STEPS, build, calls
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.module import twin
from dit_rewrite.policies import DQAR, FORA, TaylorSeer
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.prediction import Prediction

GOAL = 0.1  # relative difference between the predicted and the measured speed-up
POLICIES: tuple[Policy, ...] = (FORA(2), FORA(3), FORA(5), DQAR(snr_threshold=None), TaylorSeer(3))


def trajectory(model: Any, inputs: list[dict[str, Any]]) -> Callable[[], None]:
    """Return a run of all steps of a rewritten model."""

    def run() -> None:
        with model.trajectory(num_steps=STEPS):
            for arguments in inputs:
                model(**arguments)

    return run


def measure(device: str, rounds: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows of the table, and the predictions in numbers."""
    model, inputs = build(device), calls(device)
    plain = isolated(model, "inductor")
    models = {str(policy): dit_rewrite.compile(twin(model), policy) for policy in POLICIES}
    runs: dict[str, Callable[[], object]] = {"plain": lambda: [plain(**arguments) for arguments in inputs]}
    runs |= {name: trajectory(rewritten, inputs) for name, rewritten in models.items()}
    for run in runs.values():
        run()
    predictions = {name: dit_rewrite.predict(rewritten, num_steps=STEPS) for name, rewritten in models.items()}
    samples = alternate(runs, rounds)
    rows, numbers = [], []
    for name, found in predictions.items():
        assert isinstance(found, Prediction), found
        measured = ratio(samples, "plain", name)
        off = found.speedup / measured.median - 1
        bound = f"{found.speedup:.3f} predicted, within {GOAL:.0%}"
        rows.append(Row(f"{name}: speed-up", measured, "", bound, abs(off) <= GOAL))
        numbers.append(describe(name, found, measured, off))
    return rows, numbers


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
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of whole trajectories")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="more than the idle cores spin against each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        rows, numbers = measure(arguments.device, arguments.rounds)
    report("predictions", rows, {"steps": STEPS, "goal": GOAL, "predictions": numbers})


if __name__ == "__main__":
    main()
