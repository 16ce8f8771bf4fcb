"""The first call in a second process, with the caches of the first: python -m benchmarks.overhead.warm_start"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial

import torch

import dit_rewrite
from benchmarks.timing import Row, Spread, seconds
from benchmarks.workload import build, calls
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.policies import FORA

KINDS = ("plain torch.compile", "FORA(3)")


def measure_warm_start(rounds: int) -> list[Row]:
    """Measure the first call of a process without caches, and of a second one with those of the first."""
    rows = []
    for kind, bound in zip(KINDS, (None, 0.3), strict=True):
        found = Spread.of([_warm_over_cold(kind) for _ in range(rounds)])
        held = bound is None or found.median <= bound
        aim = "" if bound is None else f"<= {bound}"
        rows.append(Row(f"{kind}, first call of a second process / of the first", found, "", aim, held))
    return rows


def _warm_over_cold(kind: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_first_call(kind, folder) for _ in range(2))
    return warm / cold


def _first_call(kind: str, folder: str) -> float:
    """Return the seconds of the first call in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.overhead.warm_start",
        "--child",
        kind,
        "--threads",
        str(torch.get_num_threads()),
    ]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def _child(kind: str) -> float:
    model, (first, *_) = build("cpu"), calls("cpu")
    compiled = isolated(model, "inductor") if kind == KINDS[0] else dit_rewrite.compile(model, FORA(3))
    with torch.no_grad():
        return seconds(partial(compiled, **first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=KINDS, help="print the seconds of one first call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child is not None:
        print(_child(arguments.child))
        return
    for row in measure_warm_start(arguments.rounds):
        print(f"{row.what}: {row.value.median:.3f} ({row.value.low:.3f} … {row.value.high:.3f}) {row.bound}")


if __name__ == "__main__":
    main()
