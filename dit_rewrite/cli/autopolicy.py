"""``dit-rewrite autopolicy``: a policy from one number, saved with its certificate.

dit-rewrite autopolicy --speedup 3 --out policy.json
dit-rewrite autopolicy --model my_package.my_module:factory --max-error 0.02
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dit_rewrite.cli.factory import add_model, load
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.cli.paths import add_output
from dit_rewrite.search.autopolicy import autopolicy
from dit_rewrite.search.trials import WHERE

PLACES = "places that may be forecast: the model's output, the change across the stack of blocks, or each branch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model(parser)
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--speedup", type=float, help="lower limit of the speed-up")
    bound.add_argument("--max-error", type=float, help="upper limit of the relative L2 error to the uncached images")
    bound.add_argument("--max-seconds", type=float, help="upper limit of the seconds of a run")
    parser.add_argument(
        "--max-bytes", type=int, help="upper limit of the bytes in caches; alone or beside another bound"
    )
    parser.add_argument("--places", nargs="+", choices=WHERE, default=["output", "stack"], help=PLACES)
    parser.add_argument("--calibration", type=int, default=2, help="number of seeds that the search uses")
    parser.add_argument("--held-out", type=int, default=8, help="number of other seeds, on which the bound is verified")
    parser.add_argument(
        "--trials",
        type=int,
        default=32,
        help="number of runs that move computed steps, for each number of computed steps",
    )
    parser.add_argument(
        "--measure",
        choices=("time", "flops"),
        default="time",
        help="cost that is bounded; FLOPs do not depend on other load",
    )
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    add_output(parser, "--out", default=Path("policy.json"), help="output file for the policy and its certificate")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``dit-rewrite autopolicy``; as JSON, its result is the certificate. Progress goes to stderr."""
    loaded = load(arguments)
    found = autopolicy(
        loaded.model,
        loaded.sample,
        speedup=arguments.speedup,
        max_error=arguments.max_error,
        max_seconds=arguments.max_seconds,
        max_bytes=arguments.max_bytes,
        controls=loaded.controls,
        places=arguments.places,
        calibration_seeds=range(arguments.calibration),
        held_out_seeds=range(1000, 1000 + arguments.held_out),
        trials=arguments.trials,
        measure=arguments.measure,
        backend=arguments.backend,
        path=arguments.out,
        report=lambda line: print(line, file=sys.stderr),
    )
    certificate = json.loads(arguments.out.read_text(encoding="utf-8"))["certificate"]
    return Outcome(f"{found}\nwrote {arguments.out}", {"file": arguments.out, **certificate})
