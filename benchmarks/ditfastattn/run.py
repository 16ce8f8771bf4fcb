"""DiTFastAttn on the bundled shapes DiT: python -m benchmarks.ditfastattn [--samples 64] [--steps 20] [--batch 16]

Table one is the paper's table 1: a plan is searched for each of its thresholds D1 to D6, on separate noise, and images
under each plan are compared with the uncached ones of the same noise. Columns:

- FLOPs: FLOPs of the self-attention modules, projections included, as a share of the raw model's, counted as in the
  paper: ASC computes half, a window the pairs inside it, AST nothing.
- run: the same for the graphs that run, where keeping the residual (equation 1) computes the window once more.
- time: time of a batch as a share of that of the compiled uncached model on the same batch, in alternation.
- rows, pieces: distinct rows of the plan, and the segments compiled for them with cold caches.
- tried, work: candidates of the search, and its runs of the network as a share of |S| |M| full runs per step.

Table two is figure 9 (right) of the paper: all layers attend in a window except in every k-th step, with and without
the residual, at equal FLOPs except for keeping the residual. The images do not depend on the lowering, "aot_eager".

Each result is written at once; a rerun with the same parameters on the same machine measures what is missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sympy import Mod, Ne
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import dit_rewrite
from benchmarks.ditfastattn.report import build_tables, judge
from benchmarks.dqar_fidelity.rows import Recipe, Result
from benchmarks.dqar_fidelity.run import Bar, Bench, evenly_spread
from benchmarks.record import Record, digest, prepare, print_claims
from benchmarks.timing import RESULTS, machine
from dit_rewrite.demo.report import console, open_progress, versions
from dit_rewrite.demo.shapes.model import WEIGHTS, build_scheduler, load_denoiser
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images
from dit_rewrite.guards import step
from dit_rewrite.kernels.window_attention import window_flops
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.site import Kind, Part
from dit_rewrite.policies import DiTFastAttn, Never
from dit_rewrite.policy.plan import SHARED, WINDOWED, Choice, Plan, describe_scheduler, fingerprint
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import WindowResidual
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.report.plan_picture import save_picture
from dit_rewrite.search.greedy import DELTAS
from dit_rewrite.search.segment_runner import greedy_plan

WINDOW = 0.125  # section 4.1
INTERVALS, WINDOWS = (2, 3, 5), (0.125, 0.25)  # of table two
PICTURED = "D4"
CALIBRATION_SEED = 1 << 20  # the measured batches use 0, 1, …


@dataclass(frozen=True)
class Planned(Recipe):
    """A row of the fidelity benchmark under a plan."""

    plan: Plan | None = None

    def policy(self) -> Policy | None:
        return None if self.plan is None else DiTFastAttn(self.plan)

    def key(self) -> dict[str, Any]:
        return {"name": self.name, "family": self.family, "settings": dict(self.settings)}


def shares(denoiser: Any, window: float = WINDOW) -> dict[Choice, float]:
    """Return the FLOPs of each choice in an attention of a diffusers DiT, projections included, as a share of all."""
    config = denoiser.config
    tokens, heads, size = (
        (config.sample_size // config.patch_size) ** 2,
        config.num_attention_heads,
        config.attention_head_dim,
    )
    shape, projections, core = (1, heads, tokens, size), 8 * tokens * (heads * size) ** 2, 4 * heads * size * tokens**2
    near = window_flops(shape, shape, WindowResidual(window).reach(tokens))

    def share(choice: Choice) -> float:
        spent = (projections + (near if choice in WINDOWED else core)) / (projections + core)
        return 0.0 if choice is Choice.AST else spent / 2 if choice in SHARED else spent

    return {choice: share(choice) for choice in Choice}


def run_flops(model: RewrittenModule) -> float:
    """Return the share of attention FLOPs of the graphs that ran so far; their other nodes cost the same."""
    (rewritten,) = model._backend.rewritten
    rows = [record.row for record in model._backend.stats.records]
    spent = {row: cost.total_flops(rewritten.straight(row, with_table=False).gm.graph) for row in set(rows)}
    raw = cost.total_flops(rewritten.bound.gm.graph)
    sites = [place.site for place in model.explain().sites]
    attention = sum(site.flops for site in sites if site.kind is Kind.SELF and site.part is Part.BRANCH)
    return 1 - sum(raw - spent[row] for row in rows) / len(rows) / attention


def find_plan(denoiser: nn.Module, name: str, arguments: argparse.Namespace, record: Record) -> Plan:
    """Load the plan, or search it if there is none for this model, sampler and threshold."""
    path, delta, scheduler = arguments.plans / f"{name}.json", DELTAS[name], build_scheduler()
    if path.exists():
        plan, wanted = Plan.load(path), (fingerprint(denoiser), arguments.steps, delta, describe_scheduler(scheduler))
        if (plan.model, plan.steps, plan.delta, plan.scheduler) == wanted and plan.window in (None, WINDOW):
            return plan
    labels = evenly_spread(arguments.calibration)

    def sample(model: nn.Module) -> object:
        return sample_images(model, labels, steps=arguments.steps, guidance=GUIDANCE, seed=CALIBRATION_SEED)

    began = time.perf_counter()
    plan = greedy_plan(
        denoiser, [sample], delta, steps=arguments.steps, window=WINDOW, conditional="first", scheduler=scheduler,
        path=path, backend=arguments.search_backend,
    )  # fmt: skip
    for section in ("searches", "plans", "rows"):  # drop the results of an older plan of that name
        record.sections.get(section, {}).pop(name, None)
    record.get("searches", name, lambda: {"seconds": time.perf_counter() - began})
    return plan


def describe_plan(denoiser: Any, plan: Plan, steps: int) -> dict[str, Any]:
    """Return the properties of a plan that need no images; compiled segments are counted with a cheap backend."""
    model, spent = dit_rewrite.compile(twin(denoiser), DiTFastAttn(plan), backend="aot_eager"), shares(denoiser)
    sample_images(model, evenly_spread(1), steps=steps, guidance=GUIDANCE, seed=CALIBRATION_SEED)
    return {
        "delta": plan.delta,
        "choices": {str(choice): count for choice, count in plan.counts.items()},
        "flops": sum(plan.fraction(choice) * spent[choice] for choice in Choice),
        "flops_run": run_flops(model),
        "rows": len(set(plan.table)),
        "pieces": model.stats().variants,
        "evaluations": plan.evaluations,
        "work": plan.work,
    }


def cold(backend: str) -> AbstractContextManager[object]:
    """Use an empty Inductor cache inside the context."""
    return fresh_cache() if backend == "inductor" else nullcontext()


def measure_rows(arguments: argparse.Namespace, plans: Mapping[str, Plan], record: Record) -> list[Result]:
    """Measure table one like the fidelity benchmark. If a row is missing, the uncached images are sampled again."""
    names = ["raw", *plans]
    if not set(names) <= set(record.sections.get("rows", {})):
        bench = Bench(arguments)

        def measure(name: str, bar: Bar) -> dict[str, Any]:
            with cold(arguments.backend):
                return asdict(bench.measure(Planned(name, "DiTFastAttn", {}, plan=plans[name]), bar))

        with open_progress() as bar:
            with cold(arguments.backend):
                raw = bench.measure_uncached(bar)
            record.get("rows", "raw", lambda: asdict(raw))
            for name in plans:
                record.get("rows", name, lambda: measure(name, bar))  # noqa: B023 (called at once)
    return [Result.from_json(record.sections["rows"][name]) for name in names]


def windowed(interval: int, window: float, residual: bool) -> Policy:
    """Return a policy that attends in a window except in every `interval`-th step."""
    when = (step > 0) & Ne(Mod(step, interval), 0)
    rule = Rule(when, WindowResidual(window, residual=residual), Where(("self",)))
    return Policy((rule,), f"window {window:g} but every {interval} steps, residual={residual}")


def measure_pairs(arguments: argparse.Namespace, record: Record) -> list[dict[str, Any]]:
    """Measure table two: relative L2 distance to the uncached images, with and without the residual."""
    denoiser, batches = load_denoiser(), evenly_spread(arguments.samples).split(arguments.batch)

    @cache
    def images(policy: Policy) -> Tensor:
        model = dit_rewrite.compile(twin(denoiser), policy, backend="aot_eager") if policy.rules else denoiser
        return torch.cat(
            [sample_images(model, b, steps=arguments.steps, guidance=GUIDANCE, seed=i) for i, b in enumerate(batches)]
        )

    def pair(interval: int, window: float) -> dict[str, Any]:
        reduced = sum(s % interval != 0 for s in range(arguments.steps)) / arguments.steps
        flops = 1 - reduced * (1 - shares(denoiser, window)[Choice.WA_RS])
        kept, none = (relative_l2(images(windowed(interval, window, r)), images(Never())) for r in (True, False))
        return {"interval": interval, "window": window, "flops": flops, "residual": kept, "none": none}

    cells = [(interval, window) for window in WINDOWS for interval in arguments.intervals]
    return [record.get("residual", f"{k} {window:g}", lambda: pair(k, window)) for k, window in cells]  # noqa: B023


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ditfastattn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="divides the samples")
    parser.add_argument("--rounds", type=int, default=4, help="batches timed in alternation with the uncached model")
    parser.add_argument("--calibration", type=int, default=8, help="images that the search looks at")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--search-backend", default="aot_eager", help="which plan is found does not depend on it")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--thresholds", nargs="+", choices=DELTAS, default=list(DELTAS))
    parser.add_argument("--intervals", nargs="+", type=int, default=INTERVALS, help="of table two")
    parser.add_argument("--plans", type=Path, default=RESULTS / "plans")
    parser.add_argument("--out", type=Path, default=RESULTS / "ditfastattn.json")
    parser.add_argument("--plot", type=Path, default=Path("docs/plan.png"))
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    prepare(parser, arguments, "samples")
    shown = ("samples", "steps", "batch", "rounds", "calibration", "threads", "backend", "search_backend")
    settings = {name: getattr(arguments, name) for name in shown} | {"guidance": GUIDANCE, "window": WINDOW}
    settings["weights"] = digest(WEIGHTS / "denoiser.safetensors")
    record = Record.open(arguments.out, {"settings": settings, "machine": machine(), "versions": versions()})
    denoiser = load_denoiser()
    plans = {name: find_plan(denoiser, name, arguments, record) for name in arguments.thresholds}
    save_picture(plans.get(PICTURED, next(reversed(plans.values()))), arguments.plot)
    facts = [
        record.get("plans", name, lambda: describe_plan(denoiser, plan, arguments.steps))  # noqa: B023
        for name, plan in plans.items()
    ]
    pairs = measure_pairs(arguments, record)
    rows = measure_rows(arguments, plans, record)
    claims = judge(rows, facts, pairs)
    record.write(claims)
    Console(width=170).print(*build_tables(rows, facts, record))
    print_claims(claims)
    console.print(f"wrote {arguments.out}, {arguments.plans} and {arguments.plot}", highlight=False)
