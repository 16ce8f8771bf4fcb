"""Redundancy of the three trained toys, and of model families at toy size: python -m benchmarks.redundancy

After Sun et al. 2024, "Unveiling redundancy in diffusion transformers". Each toy is analyzed at 28 steps over several
prompts, at 14 and 56 steps, and with another scheduler; then each branch is reused once at several steps of 14, which
shows what predicts the error in the final image. The families have random weights and a latent that turns from one
noise to another: their rows show what the analysis measures on each architecture, not what the published models do.

Each result is written at once, and a rerun measures what is missing. The page is docs/redundancy.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dit_rewrite
from benchmarks.fidelity.toys import DIFFUSION_SOLVERS, FLOW_SOLVERS, TOYS
from benchmarks.record import Record, print_claims
from benchmarks.redundancy.claims import judge
from benchmarks.redundancy.report import render
from benchmarks.timing import RESULTS, machine
from dit_rewrite.analysis import plots
from dit_rewrite.analysis.compare import coefficient_of_variation, predictions, prompt_stability, spearman, stability
from dit_rewrite.analysis.places import Keys
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.demo.report import console, versions
from dit_rewrite.demo.shapes.captions import sample_captioned
from dit_rewrite.demo.shapes.data import NUM_CLASSES
from dit_rewrite.demo.shapes.flow_model import load_flow_model
from dit_rewrite.demo.shapes.flow_sampling import sample_relations
from dit_rewrite.demo.shapes.model import load_denoiser
from dit_rewrite.demo.shapes.relations import sample_related
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images
from dit_rewrite.demo.shapes.text_model import load_text_model
from dit_rewrite.demo.shapes.text_sampling import sample_captions

Entry = dict[str, Any]
Sample = Callable[[Any, Sequence[int], int, Any], Tensor]  # (denoiser, prompt numbers, steps, scheduler) -> images

STEPS, SHORT, LONG = 28, 14, 56
AT = (1, 3, 5, 7, 10, 13)  # the steps of SHORT at which branches are reused
BATCH = 4  # prompts of the reuse errors, in one batch
WINDOW = 0.125
STUDIED = ("keys", "values", "attention")
QUANTITIES = (*STUDIED, "branch", "mlp", "block", "stack", "output", "window", "window residual")
FAMILIES = {
    "flux": "FLUX.1-dev", "pixart_alpha": "PixArt-α", "sd3": "Stable Diffusion 3", "cogvideox": "CogVideoX",
    "stdit": "Open-Sora", "latte": "Latte-1", "mochi": "Mochi-1",
}  # fmt: skip


@dataclass(frozen=True)
class Toy:
    """A trained denoiser, how it is sampled for prompts by number, and its schedulers; the first is the usual one."""

    name: str
    denoiser: nn.Module
    sample: Sample
    solvers: dict[str, Callable[[], Any]]


def class_toy() -> Toy:
    def sample(denoiser: Any, prompts: Sequence[int], steps: int, scheduler: Any) -> Tensor:
        labels = torch.tensor([prompt % NUM_CLASSES for prompt in prompts])
        return sample_images(denoiser, labels, steps=steps, guidance=GUIDANCE, seed=prompts[0], scheduler=scheduler)

    return Toy("class", load_denoiser(), sample, _diffusion())


def text_toy() -> Toy:
    model = load_text_model()

    def sample(denoiser: Any, prompts: Sequence[int], steps: int, scheduler: Any) -> Tensor:
        _, captions, _ = sample_captioned(64, torch.Generator().manual_seed(0))
        chosen = [captions[prompt] for prompt in prompts]
        return sample_captions(denoiser, model.encoder, chosen, steps=steps, seed=prompts[0], scheduler=scheduler)

    return Toy("text", model.denoiser, sample, _diffusion())


def flow_toy() -> Toy:
    model = load_flow_model()

    def sample(denoiser: Any, prompts: Sequence[int], steps: int, scheduler: Any) -> Tensor:
        _, captions, _ = sample_related(64, torch.Generator().manual_seed(0))
        chosen = [captions[prompt] for prompt in prompts]
        return sample_relations(denoiser, model.encoder, chosen, steps=steps, seed=prompts[0], scheduler=scheduler)

    return Toy("flow", model.denoiser, sample, {name: FLOW_SOLVERS[name] for name in ("Euler", "DPM-Solver++ 2M")})


def _diffusion() -> dict[str, Callable[[], Any]]:
    return {name: DIFFUSION_SOLVERS[name] for name in ("DDIM", "DPM-Solver++ 2M")}


TRAINED: dict[str, Callable[[], Toy]] = {"class": class_toy, "text": text_toy, "flow": flow_toy}
assert TRAINED.keys() <= TOYS.keys()


def analyze(toy: Toy, prompts: int, steps: int, solver: str, **options: Any) -> Analysis:
    """Analyze a toy, one prompt in each run, with both halves of the guidance in a batch."""
    torch.compiler.reset()

    def sample(denoiser: Any, prompt: int) -> Tensor:
        return toy.sample(denoiser, [prompt], steps, toy.solvers[solver]())

    return dit_rewrite.analyze(
        toy.denoiser, sample, range(prompts), backend="aot_eager", conditional="first", **options
    )


def shape(found: Analysis, quantity: str) -> Entry:
    """Return the numbers of one quantity: averages, variation over prompts, and trends over steps and layers."""
    rows = found.rows(quantity=quantity)
    means = torch.stack([found.mean(row)[1:] for row in rows])
    relative = torch.stack([found.mean(row, "relative_l1")[1:] for row in rows])
    cosine = torch.stack([found.mean(row, "cosine")[1:] for row in rows])
    layers = torch.tensor([float(row.layer) for row in rows])
    third = max(1, means.shape[1] // 3)
    profile = means.nanmean(0)
    return _plain(
        {
            "rows": len(rows),
            "l1": means.nanmean(),
            "relative_l1": relative.nanmean(),
            "cosine": cosine.nanmean(),
            "mse": torch.stack([found.mean(row, "mse")[1:] for row in rows]).nanmean(),
            "variation": coefficient_of_variation(found, quantity),
            "prompts": prompt_stability(found, quantity),
            "with_depth": spearman(layers, relative.nanmean(1)),
            "with_progress": spearman(torch.arange(len(profile)).double(), profile),
            "first_third": profile[:third].nanmean(),
            "middle_third": profile[third:-third].nanmean(),
            "last_third": profile[-third:].nanmean(),
            "profile": profile.tolist(),
        }
    )


def guidance(found: Analysis) -> Entry:
    """Return how far the unconditional branches are from the conditional ones of the same step."""
    rows = found.rows(quantity="branch", distance=0)
    values = torch.stack([found.mean(row, "relative_l1") for row in rows]) if rows else torch.full((1, 1), math.nan)
    return _plain({"rows": len(rows), "relative_l1": values.nanmean(), "profile": values.nanmean(0).tolist()})


def windows(found: Analysis) -> Entry:
    """Return DiTFastAttn's figure 3: the change of window attention, and that of its residual to full attention."""
    pairs = []
    for row in found.rows(quantity="window"):
        residual = row._replace(quantity="window residual")
        pairs.append([float(found.mean(each, "mse")[1:].nanmean()) for each in (row, residual)])
    return {
        "rows": len(pairs),
        "smaller": sum(b < a for a, b in pairs),
        "mse": _mean(pairs, 0),
        "residual": _mean(pairs, 1),
    }


def _mean(pairs: Sequence[Sequence[float]], place: int) -> float:
    return sum(pair[place] for pair in pairs) / len(pairs) if pairs else math.nan


def same_trend(found: Analysis, a: str, b: str) -> float:
    """Return the rank correlation over steps between two quantities of a site, as the mean over sites."""
    values = [
        spearman(found.mean(row), found.mean(row._replace(quantity=b)))
        for row in found.rows(quantity=a)
        if row._replace(quantity=b) in found.table
    ]
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def measure_toy(toy: Toy, arguments: argparse.Namespace, record: Record) -> None:
    """Measure what the file lacks of one toy."""
    usual, other = toy.solvers
    seen: dict[str, Analysis] = {}

    def whole() -> Analysis:
        name = f"{usual}, {STEPS} steps"
        if name not in seen:
            seen[name] = analyze(toy, arguments.prompts, STEPS, usual, window=WINDOW)
        return seen[name]

    def basic() -> Entry:
        found = whole()
        plots.heat_map(found, "branch", arguments.docs / f"redundancy_{toy.name}.png", "relative_l1", stream="cond")
        quantities = {name: shape(found, name) for name in QUANTITIES if found.rows(quantity=name)}
        trends = {name: same_trend(found, "keys", name) for name in ("values", "attention")}
        return {"prompts": arguments.prompts, "quantities": quantities, "trends": trends, "guidance": guidance(found),
                "windows": windows(found), "refused": len(found.refused)}  # fmt: skip

    def against(steps: int, solver: str) -> Callable[[], Entry]:
        def run() -> Entry:
            found = seen[f"{solver}, {steps} steps"] = analyze(toy, arguments.fewer, steps, solver)
            return {name: _plain(stability(whole(), found, name)) for name in (*STUDIED, "branch", "mlp")}

        return run

    def errors() -> Entry:
        found = analyze(toy, BATCH, SHORT, usual)

        def batch(denoiser: Any, _: int) -> Tensor:
            return toy.sample(denoiser, range(BATCH), SHORT, toy.solvers[usual]())

        torch.compiler.reset()
        found.errors = dit_rewrite.reuse_errors(toy.denoiser, batch, [0], at=AT, backend="aot_eager")
        values = found.errors.values[:, list(AT)]
        return {"sites": len(found.errors.sites), "steps": list(AT), "errors": values.tolist(),
                "names": found.errors.sites, "predictions": [p._asdict() for p in predictions(found)]}  # fmt: skip

    for name, make in (
        ("base", basic),
        (f"{SHORT} steps", against(SHORT, usual)),
        (f"{LONG} steps", against(LONG, usual)),
        (other, against(STEPS, other)),
        ("errors", errors),
    ):
        timed(record, toy.name, name, make)
    if len(seen) == 4:
        plots.stability(seen, "attention", arguments.docs / f"redundancy_{toy.name}_stability.png", stream="cond")


def measure_family(name: str, arguments: argparse.Namespace) -> Entry:
    """Analyze one model family with random weights."""
    from tests.helpers.models import MODELS

    torch.compiler.reset()
    case = MODELS[name]
    trajectories = [case.inputs(SHORT, seed=seed) for seed in range(arguments.fewer)]
    keys: Keys = "projection" if name == "mochi" else "core"  # Mochi's attention takes as many tokens as the mask keeps
    found = dit_rewrite.analyze(case.build(), trajectories, keys=keys, backend="aot_eager")
    quantities = {each: shape(found, each) for each in QUANTITIES if found.rows(quantity=each)}
    return {"model": FAMILIES[name], "quantities": quantities, "refused": len(found.refused)}


def timed(record: Record, section: str, name: str, make: Callable[[], Entry]) -> None:
    """Measure an entry of the file if it is missing, and say how long it took."""
    began = time.perf_counter()
    record.get(section, name, make)
    console.print(f"{section}: {name}, {time.perf_counter() - began:.0f} s", highlight=False)


def _plain(value: Any) -> Any:
    """Return numbers and tuples as JSON has them; NaN is None."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(arguments: argparse.Namespace) -> Record:
    """Measure, and write the results with their claims."""
    torch.set_num_threads(arguments.threads)
    settings = {"prompts": arguments.prompts, "fewer": arguments.fewer, "steps": [SHORT, STEPS, LONG], "at": list(AT)}
    record = Record.open(arguments.out, {"settings": settings, "machine": machine(), "versions": versions()})
    for name in arguments.toys:
        measure_toy(TRAINED[name](), arguments, record)
    for name in FAMILIES if arguments.families else ():
        timed(record, "families", name, lambda: measure_family(name, arguments))  # noqa: B023
    record.write(judge(record.sections))
    return record


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.redundancy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toys", nargs="*", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--families", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prompts", type=int, default=12, help="of the analysis at 28 steps")
    parser.add_argument("--fewer", type=int, default=4, help="prompts of all other analyses")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "redundancy.json")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the page and the pictures go")
    parser.add_argument("--page", action="store_true", help="only render the page from --out")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    if not arguments.page:
        print_claims(judge(run(arguments).sections))
    content = json.loads(arguments.out.read_text(encoding="utf-8"))
    (arguments.docs / "redundancy.md").write_text(render(content), encoding="utf-8")
    console.print(f"wrote {arguments.out} and the page; {time.perf_counter() - began:.0f} s", highlight=False)
