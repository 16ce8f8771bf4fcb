"""`autopolicy` on the bundled toys: python -m benchmarks.autopolicy [--toys class]

For each toy the model is measured once, and a policy is searched for each bound: speed-ups (by FLOPs) and errors. Its
error is measured on images of unseen seeds, and on the images of `benchmarks.fidelity`, where the hand-set policies and
fewer steps of several solvers were measured. Each result is written at once; a rerun measures what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.autopolicy.report import write_page
from benchmarks.fidelity.claims import between
from benchmarks.fidelity.rows import STEPS as CONTROLS
from benchmarks.fidelity.toys import NOISE_SEED, TOYS, UNCLIPPED, Toy
from benchmarks.record import Claim, Evidence, Record, print_claims
from benchmarks.timing import RESULTS, machine
from dit_rewrite.demo.report import console, versions
from dit_rewrite.search.autopolicy import autopolicy
from dit_rewrite.search.certificate import AutoPolicy
from dit_rewrite.search.measurements import Candidate, Measurements, geometric_mean
from dit_rewrite.search.placement import even

STEPS, BATCH = 50, 12
CALIBRATION = (1000, 1001)
HELD_OUT = tuple(range(2000, 2005))
BOUNDS: list[dict[str, float]] = [
    *({"speedup": s} for s in (3.0, 2.0, 4.0)),
    *({"max_error": e} for e in (0.02, 0.05, 0.01, 0.1)),
]
OF_HAND_SET, OF_FEWER_STEPS = 0.8, 0.5  # the aims, as shares of their errors
FIDELITY_IMAGES = 24
Entry = dict[str, Any]


class Bench:
    """A toy, its measurements, and the images that policies are judged by."""

    def __init__(self, toy: Toy, arguments: argparse.Namespace) -> None:
        self.toy, self.arguments = toy, arguments
        self.unseen = tuple(range(10_000, 10_000 + -(-arguments.unseen // BATCH)))

    def sample(self, denoiser: nn.Module, seed: int) -> Tensor:
        count = FIDELITY_IMAGES if seed == NOISE_SEED else BATCH
        return self.toy.run(denoiser, count, STEPS, seed=seed)

    @cached_property
    def measured(self) -> Measurements:
        began = time.perf_counter()
        found = Measurements(self.toy.denoiser, self.sample, ("output",), CALIBRATION, "aot_eager", self.say)
        self.seconds = time.perf_counter() - began
        found.images |= self._references
        return found

    @cached_property
    def _references(self) -> dict[int, Tensor]:
        """The uncached images of the seeds that were run before, in a file that is not versioned."""
        path = self._reference_path
        return torch.load(path) if path.exists() else {}

    @property
    def _reference_path(self) -> Path:
        out: Path = self.arguments.out
        return out.with_suffix(f".{self.toy.name}.pt")

    def keep_references(self) -> None:
        torch.save(self.measured.images, self._reference_path)

    def say(self, line: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {self.toy.name}: {line}", highlight=False)

    def controls(self) -> dict[str, Callable[[Any, int, int], Tensor]]:
        """The solvers of the toy. Where the sampler clips, its own unclipped version is no control."""

        def solver(name: str) -> Callable[[Any, int, int], Tensor]:
            return lambda denoiser, steps, seed: self.toy.run(denoiser, BATCH, steps, name, seed)

        skipped = UNCLIPPED if self.toy.sampler != UNCLIPPED else ""
        return {name: solver(name) for name in self.toy.solvers if name != skipped}

    def search(self, bound: dict[str, float]) -> Entry:
        """Search a policy for a bound. Its file goes beside the results."""
        measured = self.measured
        found = autopolicy(
            self.toy.denoiser, self.sample, **bound, controls=self.controls(), places=("output",),  # type: ignore[arg-type]
            calibration_seeds=CALIBRATION, held_out_seeds=HELD_OUT, trials=self.arguments.trials, measure="flops",
            backend="aot_eager", measurements=measured, report=self.say,
        )  # fmt: skip
        path = self.arguments.out.parent / "autopolicy" / f"{self.toy.name}-{name_of(bound)}.json"
        found.save(path)
        self.keep_references()
        return {"file": path.name, "measuring_seconds": self.seconds} | self._certified(found)

    def _certified(self, found: AutoPolicy) -> Entry:
        control = found.control
        return {
            "cost": found.cost, "error": found.errors.mean, "low": found.errors.low, "high": found.errors.high,
            "computed": list(found.computed), "style": found.style, "place": found.place, "winner": found.winner,
            "calibration_error": found.calibration_error, "predicted": found.predicted, "trials": found.trials,
            "rank_correlation": found.rank_correlation, "search_seconds": found.search_seconds,
            "cache_bytes": found.cache_bytes, "control": None if control is None else
            {"solver": control.solver, "steps": control.steps, "error": control.errors.mean},
        }  # fmt: skip

    def unseen_errors(self, entry: Entry) -> Entry:
        """Measure the forecasts on unseen seeds, and on the images of the fidelity benchmark."""
        candidate = Candidate(entry["place"], tuple(entry["computed"]), entry["style"])
        seeds = (*self.unseen, NOISE_SEED)
        errors, each = self.measured.errors(candidate, seeds)
        self.keep_references()
        count = len(self.unseen)
        return {"unseen": count * BATCH, "errors": errors[:-1], "mean": sum(errors[:-1]) / count,
                "typical": geometric_mean(each[: count * BATCH]), "fidelity": errors[-1]}  # fmt: skip

    def even_errors(self, entry: Entry) -> Entry:
        """Measure the hand-set plan of as many, evenly spaced computed steps on the same unseen images."""
        candidate = Candidate("output", even(len(entry["computed"]), STEPS), "taylorseer")
        errors, each = self.measured.errors(candidate, self.unseen)
        return {"mean": sum(errors) / len(errors), "typical": geometric_mean(each), "errors": errors}


def name_of(bound: dict[str, float]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in bound.items())


def hand_set(toy: str, cost: float, fidelity: Path) -> tuple[float, str] | None:
    """Return the error of the best hand-set policies of the fidelity benchmark at this cost, and the nearest policy.

    Between two policies of the front, the logarithm of the error is interpolated.
    """
    rows = json.loads(fidelity.read_text())["sections"].get(f"errors, {toy}", {}).values()
    points = sorted(
        (row["flops"], row["error"], row["key"]["name"]) for row in rows if row["key"]["family"] != CONTROLS
    )
    front = [p for i, p in enumerate(points) if all(p[1] < other[1] for other in points[:i])]
    for (a, error, name), (b, less, other) in pairwise(front):
        if a <= cost <= b:
            share = (cost - a) / (b - a)
            return between(error, less, share), other if share > 0.5 else name
    return None


def judge(record: Record, fidelity: Path) -> list[Claim]:
    """Return the claims about the searched bounds in the file."""
    claims = []
    for toy in (name for name in TOYS if record.sections.get(name)):
        rows = [(bound, found, _unseen(record, toy, bound)) for bound, found in record.sections[toy].items()]
        held = [_bound_held(bound, found, unseen) for bound, found, unseen in rows if unseen]
        claims.append(Claim.of(f"{toy}: the bound holds on unseen seeds", "each bound", held))
        pairs = [_against_hand_set(toy, bound, found, unseen, fidelity) for bound, found, unseen in rows if unseen]
        for kind, text in (("mean", "error"), ("typical", "typical error")):
            evens = [_against_even(record, toy, bound, unseen, kind) for bound, _, unseen in rows if unseen]
            bound = f"at most {OF_HAND_SET} of its {text}, on the same unseen images"
            if any(evens):
                name = f"{toy}: against evenly placed steps by {text}"
                claims.append(Claim.of(name, bound, [each for each in evens if each]))
        bound = f"at most {OF_HAND_SET} of its error, on the images of the fidelity benchmark"
        claims.append(
            Claim.of(f"{toy}: against the best hand-set policy at equal FLOPs", bound, [p for p in pairs if p])
        )
        against = [_against_control(bound, found) for bound, found, _ in rows if bound in ("speedup=2", "speedup=3")]
        bound = f"at most {OF_FEWER_STEPS} of its error, on the held-out seeds"
        claims.append(Claim.of(f"{toy}: against fewer steps at equal FLOPs", bound, [p for p in against if p]))
    return claims


def missing(record: Record) -> list[str]:
    """Return the toys and bounds that are not in the file."""
    wanted = {toy: [name_of(bound) for bound in BOUNDS] for toy in ("class", "text", "flow")}
    left = {toy: [b for b in bounds if _unseen(record, toy, b) is None] for toy, bounds in wanted.items()}
    return [f"{toy}: {', '.join(bounds)}" for toy, bounds in left.items() if bounds]


def _unseen(record: Record, toy: str, bound: str) -> Entry | None:
    found: Entry | None = record.sections.get(f"{toy}, unseen", {}).get(bound)
    return found


def _bound_held(bound: str, found: Entry, unseen: Entry) -> Evidence:
    name, _, value = bound.partition("=")
    measured = 1 / found["cost"] if name == "speedup" else unseen["mean"]
    held = measured >= float(value) - 1e-9 if name == "speedup" else measured <= float(value)
    return {"bound": bound, "measured": measured, "images": unseen["unseen"], "held": held}


def _against_hand_set(toy: str, bound: str, found: Entry, unseen: Entry, fidelity: Path) -> Evidence | None:
    best = hand_set(toy, found["cost"], fidelity)
    if best is None:
        return None
    share = unseen["fidelity"] / best[0]
    return {"bound": bound, "error": unseen["fidelity"], "hand_set": best[0], "policy": best[1], "share": share,
            "held": share <= OF_HAND_SET}  # fmt: skip


def _against_even(record: Record, toy: str, bound: str, unseen: Entry, kind: str) -> Evidence | None:
    even_plan = record.sections.get(f"{toy}, even", {}).get(bound)
    if even_plan is None or kind not in unseen or kind not in even_plan:
        return None
    share = unseen[kind] / even_plan[kind]
    return {"bound": bound, "error": unseen[kind], "even": even_plan[kind], "share": share,
            "held": share <= OF_HAND_SET}  # fmt: skip


def _against_control(bound: str, found: Entry) -> Evidence | None:
    control = found["control"]
    if control is None:
        return None
    share = found["error"] / control["error"]
    return {"bound": bound, "error": found["error"], **{f"control_{k}": v for k, v in control.items()}, "share": share,
            "held": share <= OF_FEWER_STEPS}  # fmt: skip


def run(arguments: argparse.Namespace) -> Record:
    """Search and measure the missing rows."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 1000
    settings = {"steps": STEPS, "batch": BATCH, "calibration": CALIBRATION, "held_out": HELD_OUT}
    record = Record.open(arguments.out, {"settings": settings, "machine": machine(), "versions": versions()})
    for name in arguments.toys if not arguments.page else ():
        bench = Bench(TOYS[name](), arguments)
        for bound in (b for b in BOUNDS if arguments.bounds is None or name_of(b) in arguments.bounds):
            text = name_of(bound)
            found = record.get(name, text, lambda: bench.search(bound))  # noqa: B023
            record.get(f"{name}, unseen", text, lambda: bench.unseen_errors(found))  # noqa: B023
            record.get(f"{name}, even", text, lambda: bench.even_errors(found))  # noqa: B023
            bench.say(f"{text} done")
    record.write(judge(record, arguments.fidelity))
    return record


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.autopolicy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toys", nargs="+", choices=TOYS, default=["class", "text", "flow"])
    parser.add_argument("--bounds", nargs="+", metavar="BOUND", help="such as speedup=2; all by default")
    parser.add_argument("--trials", type=int, default=3, help="runs of the local search for each bound")
    parser.add_argument("--unseen", type=int, default=200, help="images of unseen seeds")
    parser.add_argument("--fidelity", type=Path, default=RESULTS / "fidelity.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "autopolicy.json")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--page", action="store_true", help="only write the page, from --out")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    record = run(arguments)
    claims = judge(record, arguments.fidelity)
    print_claims(claims)
    write_page(record, claims, arguments.docs, missing(record))
