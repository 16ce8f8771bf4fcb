"""Policies against fewer steps of the best solver, on three toys: python -m benchmarks.fidelity [--no-time]

The bundled toys are sampled with 50 steps, uncached and under each policy, and uncached with fewer steps of several
solvers, always from the same noise. Each row has two relative L2 errors: to the uncached images of the same sampler
with the same number of steps, which caching approximates, and to the images of a reference with many steps, which fewer
steps approximate too. Errors do not depend on the lowering and are measured under "aot_eager". The amount of
computation is counted in calls of the denoiser that reuse nothing, and in FLOPs.

Times are measured on fewer images, compiled by --backend, a few rows at a time in turn with the uncached model in one
process. --no-time leaves them out; --timed selects the timed rows.

Each result is written at once. A rerun with the same parameters and versions measures what is missing, as does a run
with other rows or toys, or with other weights of a toy. The claims, the pictures and the page are made from the rows in
the file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dit_rewrite
from benchmarks.fidelity.claims import judge
from benchmarks.fidelity.flops import COUNTED, flops_of, foresee
from benchmarks.fidelity.report import draw, show, summary, write_page
from benchmarks.fidelity.rows import UNCACHED, Recipe, Result, Row, Timing, recipes
from benchmarks.fidelity.toys import CALIBRATION_SEED, TOYS, Toy, calls
from benchmarks.record import Claim, Record
from benchmarks.timing import RESULTS, Spread, alternate, machine, ratio, seconds
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.demo.report import console, versions
from dit_rewrite.module import RewrittenModule, backend_of, twin
from dit_rewrite.passes.guards.symbols import measured
from dit_rewrite.policies import as_policy
from dit_rewrite.policy.rules import Policy
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.search.calibrate import calibrate

Entry = dict[str, Any]
CALIBRATION_IMAGES = 4
GROUP = 4  # rows that are timed in turn
ERRORS, TIMES = "errors, {}", "times, {}"  # the sections of the file, by toy


class Bench:
    """A toy, its uncached model, and the images that all rows are compared with."""

    def __init__(self, toy: Toy, arguments: argparse.Namespace) -> None:
        self.toy, self.images, self.steps, self.out = toy, arguments.images, arguments.steps, arguments.out
        self.timed_images, self.rounds, self.backend = arguments.timed_images, arguments.rounds, arguments.backend

    @cached_property
    def uncached_images(self) -> Tensor:
        return self.toy.run(self.toy.denoiser, self.images, self.steps)

    @cached_property
    def reference(self) -> Tensor:
        """The reference images. They take the longest, and are cached in a file that is not versioned."""
        known = {**self.toy_key, "toy": None, "images": self.images}  # toys that differ only in sampling share it
        path = self.out.with_suffix(f".{self.toy.weights.stem}.pt")
        found = torch.load(path) if path.exists() else {}
        if found.get("of") != known:
            images = self.toy.run(self.toy.denoiser, self.images, self.toy.reference_steps, self.toy.reference)
            found = {"of": known, "images": images}
            torch.save(found, path)
        kept: Tensor = found["images"]
        return kept

    @cached_property
    def compiled(self) -> Any:
        """The compiled uncached model, warmed up."""
        model = isolated(self.toy.denoiser, self.backend)
        self.toy.run(model, self.timed_images, 2)
        return model

    @cached_property
    def toy_key(self) -> Entry:
        """The key of the toy. It hashes the file of its weights."""
        return self.toy.key()

    def key(self, recipe: Recipe) -> Entry:
        """Everything that determines the errors of a row, apart from the number of images and steps."""
        return {**recipe.key(), **self.toy_key}

    def timed_key(self, recipe: Recipe) -> Entry:
        """Everything that determines the time of a row."""
        how = {"images": self.timed_images, "rounds": self.rounds, "backend": self.backend}
        return {**self.key(recipe), "timed": how}

    def policy(self, recipe: Recipe) -> Policy:
        """Return the row's policy; a calibrated one is calibrated on a few images of other noise."""
        if recipe.calibrated is None:
            assert recipe.policy is not None
            return recipe.policy

        def sample(model: nn.Module) -> Tensor:
            return self.toy.run(model, CALIBRATION_IMAGES, self.steps, seed=CALIBRATION_SEED)

        return calibrate(model=self.toy.denoiser, sample=sample, backend="aot_eager", **recipe.calibrated)

    def errors(self, recipe: Recipe) -> Entry:
        """Sample a row's images, and return their errors."""
        if recipe.is_control:
            assert recipe.solver is not None
            same = recipe.name == UNCACHED
            images = self.uncached_images if same else self._run(self.toy.denoiser, recipe)
            number = calls(recipe.solver, recipe.steps)
            return self._result(recipe, images, number, number / calls(self.toy.sampler, self.steps))
        model = self._rewritten(self.policy(recipe))
        images, place = self._run(model, recipe), model.explain().sites
        held, misses = sum(p.bytes for p in place if p.reachable), model.stats().misses
        more: Entry = {"cache_bytes": held, "misses": {str(reason): count for reason, count in misses.items()}}
        return self._result(recipe, images, *flops_of(model), **more)

    @cached_property
    def captured(self) -> Rewritten:
        """The captured graph, to count what policies compute without a run."""
        model = self._rewritten(as_policy("fora:interval=2"))
        self.toy.run(model, 1, self.steps)
        (graph,) = backend_of(model).rewritten
        return graph

    def count(self, policy: Policy) -> Entry:
        """Count what a policy computes whose decisions do not depend on measurements."""
        scheduler = self.toy.solvers[self.toy.sampler]()
        scheduler.set_timesteps(self.steps)
        computed, flops = foresee(self.captured, policy, scheduler)
        return {"computed": computed, "flops": flops, "counted": COUNTED}

    def _rewritten(self, policy: Policy, backend: str = "aot_eager") -> RewrittenModule:
        return dit_rewrite.compile(twin(self.toy.denoiser), policy, backend=backend)

    def _run(self, model: nn.Module, recipe: Recipe) -> Tensor:
        return self.toy.run(model, self.images, recipe.steps or self.steps, recipe.solver)

    def _result(self, recipe: Recipe, images: Tensor, computed: int, flops: float, **more: Any) -> Entry:
        found: Entry = {}
        for name, target in (("error", self.uncached_images), ("reference_error", self.reference)):
            found[name] = relative_l2(images, target)
            found[f"{name}s"] = [relative_l2(a, b) for a, b in zip(images, target, strict=True)]
        return asdict(Result(self.key(recipe), computed, flops, **found, counted=COUNTED, **more))

    def time(self, group: Sequence[Recipe]) -> list[Entry]:
        """Time rows in turn with the uncached model, once per round."""
        models = [self.compiled if r.is_control else self._rewritten(self.policy(r), self.backend) for r in group]
        runs = {r.name: partial(self._timed, model, r) for r, model in zip(group, models, strict=True)}
        first = {r.name: seconds(runs[r.name]) for r in group if not r.is_control}  # compiles
        before = list(map(_variants, models))
        whole = partial(self.toy.run, self.compiled, self.timed_images, self.steps)
        samples = alternate({**runs, UNCACHED: whole}, self.rounds)
        found = []
        for recipe, model, known in zip(group, models, before, strict=True):
            own = samples[recipe.name]
            spent = max(0.0, first.get(recipe.name, 0.0) - min(own))
            timing = Timing(Spread.of(own), ratio(samples, recipe.name, UNCACHED), spent, _variants(model) - known)
            found.append({"key": self.timed_key(recipe), **asdict(timing)})
        return found

    def _timed(self, model: nn.Module, recipe: Recipe) -> Tensor:
        return self.toy.run(model, self.timed_images, recipe.steps or self.steps, recipe.solver)


def _variants(model: Any) -> int:
    """Return how many variants of a rewritten model are compiled; 0 for the uncached one."""
    return model.stats().variants if isinstance(model, RewrittenModule) else 0


def measure(bench: Bench, wanted: Sequence[Recipe], arguments: argparse.Namespace, record: Record) -> None:
    """Measure the missing rows of a toy: the errors of all rows first, then the times."""
    for recipe in wanted:
        entry(record, ERRORS.format(bench.toy.name), bench.key(recipe), lambda: bench.errors(recipe))  # noqa: B023
    if not arguments.time:
        return
    section = TIMES.format(bench.toy.name)
    timed = [r for r in wanted if matches(r, arguments.timed)]
    missing = [r for r in timed if find_entry(record, section, bench.timed_key(r)) is None]
    for first in range(0, len(missing), GROUP):
        group, began = missing[first : first + GROUP], time.perf_counter()
        for found in bench.time(group):
            record.sections.setdefault(section, {})[found["key"]["name"]] = json.loads(json.dumps(found))
        record.write()
        names = "; ".join(recipe.name for recipe in group)
        console.print(f"{section}: {names}, {time.perf_counter() - began:.0f} s", highlight=False)


def recount(bench: Bench, wanted: Sequence[Recipe], record: Record) -> None:
    """Count again what the policies in the file compute, where it was counted in another way.

    Errors stay as they are, except those of policies that measure: their decisions depend on the images, so the whole
    row is measured.
    """
    section = ERRORS.format(bench.toy.name)
    for recipe in (r for r in wanted if not r.is_control):
        found = find_entry(record, section, bench.key(recipe))
        if found is None or found.get("counted") == COUNTED:
            continue
        policy = bench.policy(recipe)
        new = bench.errors(recipe) if measured(policy.mentions) else {**found, **bench.count(policy)}
        record.sections[section][recipe.name] = json.loads(json.dumps(new))
        record.write()
        both = " to ".join(f"{each['computed']} calls, {each['flops']:.4f}" for each in (found, new))
        console.print(f"{section}: {recipe.name}, {both}", highlight=False)


def entry(record: Record, section: str, key: Entry, make: Callable[[], Entry]) -> None:
    """Measure a row of the file if it is missing or has another key."""
    name = key["name"]
    if find_entry(record, section, key) is None:
        record.sections.get(section, {}).pop(name, None)
        began = time.perf_counter()
        record.get(section, name, make)
        console.print(f"{section}: {name}, {time.perf_counter() - began:.0f} s", highlight=False)


def find_entry(record: Record, section: str, key: Entry) -> Entry | None:
    """Return the row in the file with this key, or None."""
    found: Entry | None = record.sections.get(section, {}).get(key["name"])
    return found if found is not None and found["key"] == json.loads(json.dumps(key)) else None


def matches(recipe: Recipe, patterns: Sequence[str] | None) -> bool:
    """Return whether a row is selected by its name or its family."""
    return patterns is None or any(fnmatchcase(name, p) for name in (recipe.name, recipe.family) for p in patterns)


def read_rows(bench: Bench, wanted: Sequence[Recipe], record: Record) -> Iterator[Row]:
    """Return the rows of a toy in the file, in order."""
    for recipe in wanted:
        errors = find_entry(record, ERRORS.format(bench.toy.name), bench.key(recipe))
        times = find_entry(record, TIMES.format(bench.toy.name), bench.timed_key(recipe))
        if errors is not None:
            yield Row(bench.toy.name, Result(**errors), None if times is None else Timing.from_json(times))


@dataclass(frozen=True)
class Outcome:
    """The results of a run."""

    rows: list[Row]
    claims: list[Claim]


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure, and write the rows and the claims."""
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 1000  # torch < 2.13 counts all rows together
    settings = {"images": arguments.images, "steps": arguments.steps}
    record = Record.open(arguments.out, {"settings": settings, "machine": machine(), "versions": versions()})
    rows: list[Row] = []
    for toy in (make() for make in TOYS.values()):
        bench, wanted = Bench(toy, arguments), recipes(toy, arguments.steps)
        if toy.name in arguments.toys:
            chosen = [r for r in wanted if r.name == UNCACHED or matches(r, arguments.rows)]
            if arguments.recount:
                recount(bench, chosen, record)
            else:
                measure(bench, chosen, arguments, record)
        rows += read_rows(bench, wanted, record)
    claims = judge(rows)
    record.write(claims)
    return Outcome(rows, claims)


def read_outcome(arguments: argparse.Namespace) -> Outcome:
    """Read the rows from the results file, without measuring."""
    record = Record(arguments.out, {}, json.loads(arguments.out.read_text(encoding="utf-8"))["sections"])
    rows: list[Row] = []
    for toy in (make() for make in TOYS.values()):
        rows += read_rows(Bench(toy, arguments), recipes(toy, arguments.steps), record)
    return Outcome(rows, judge(rows))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toys", nargs="+", choices=TOYS, default=list(TOYS))
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timed", nargs="+", metavar="PATTERN", help="the rows that are timed, by name or family")
    parser.add_argument("--timed-images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of timing, in alternation with the uncached model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="inductor", help="under which is timed")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="by name or family, such as 'Forecast'")
    parser.add_argument("--recount", action="store_true", help="count the FLOPs in --out again where outdated")
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity.json")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the page and the pictures go")
    parser.add_argument("--page", action="store_true", help="only render the page and the README's table from --out")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.page:
        outcome = read_outcome(arguments)
        write_page(outcome.rows, outcome.claims, arguments)
        print("\n".join(summary(outcome.claims)))  # for the README
        return
    began = time.perf_counter()
    outcome = run(arguments)
    show(outcome.rows, outcome.claims)
    draw(outcome.rows, arguments.docs)
    path = write_page(outcome.rows, outcome.claims, arguments)
    console.print(f"wrote {arguments.out} and {path}; {time.perf_counter() - began:.0f} s", highlight=False)
