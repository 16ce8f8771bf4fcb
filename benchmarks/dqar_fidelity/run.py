"""Time against fidelity of DQAR's settings: python -m benchmarks.dqar_fidelity [--samples 128] [--rows PATTERN]

The bundled shapes DiT is sampled by DDIM with guidance, uncached and under every policy, from the same noise and evenly
spread labels. A row is timed on the batches that it samples, in alternation with the uncached model, after its first
batch has run once to compile. All batches have one shape, so nothing recompiles.

Quality is measured by the Fréchet distance to a large set of real images. Such a set is cheap, and the distance does
not depend on one model's images. DQAR's tables use the distance to the uncached images of the same noise, which is
listed as well; it is 0 for equal images, but the two sets are not independent. Both distances grow as the sample
shrinks, so compare rows of one run only. `frechet_floor` is the distance of as many other real images with the same
labels.

Results are written row by row. A rerun with the same parameters on the same machine measures what is missing; other
parameters start a new file. The claims are computed from the rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dit_rewrite
from benchmarks.dqar_fidelity.claims import Claim, judge
from benchmarks.dqar_fidelity.report import draw, show
from benchmarks.dqar_fidelity.rows import Recipe, Result, recipes, uncached
from benchmarks.record import prepare
from benchmarks.timing import RESULTS, Spread, machine, synchronise
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.demo.report import console, open_progress, versions
from dit_rewrite.demo.shapes.data import NUM_CLASSES, sample
from dit_rewrite.demo.shapes.model import Classifier, accuracy, load_classifier, load_denoiser
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images
from dit_rewrite.module import twin
from dit_rewrite.policy.files import write_whole
from dit_rewrite.proof.image_metrics import frechet_distance, relative_l2, ssim

REAL_IMAGES, REAL_SEED, CHUNK = 20_000, 1, 500
Bar = Callable[..., Any]


@torch.no_grad()
def features(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the classifier's penultimate features (n, 64) on the CPU."""
    return torch.cat([classifier.features(chunk).cpu() for chunk in images.split(CHUNK)])


@lru_cache(maxsize=1)
def real_features(count: int) -> Tensor:
    """Return the features of real images, with about equally many of each class."""
    return features(load_classifier(), sample(count, torch.Generator().manual_seed(REAL_SEED))[0])


def frechet_floor(samples: int) -> float:
    """Return the distance between the real images and other real images with the number and labels of the samples."""
    images, classes = sample(REAL_IMAGES, torch.Generator().manual_seed(REAL_SEED + 1))
    wanted = evenly_spread(samples).bincount(minlength=NUM_CLASSES).tolist()
    chosen = torch.cat([images[classes == label][:count] for label, count in enumerate(wanted)])
    return frechet_distance(features(load_classifier(), chosen), real_features(REAL_IMAGES))


def evenly_spread(samples: int) -> Tensor:
    """Return labels (samples,) that cycle through the classes."""
    return torch.arange(samples) % NUM_CLASSES


@dataclass
class Run:
    """The images and times of a model on all batches."""

    images: Tensor
    seconds: list[float]
    uncached: list[float] = field(default_factory=list)  # seconds of the first batches, in alternation


class Bench:
    """The networks, the labels and the references that all rows share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.steps, self.backend, self.rounds = arguments.steps, arguments.backend, arguments.rounds
        device = torch.device(arguments.device)
        self.denoiser = load_denoiser().to(device)
        self.classifier = load_classifier().to(device)
        self.labels = evenly_spread(arguments.samples).to(device)
        self.batches = self.labels.split(arguments.batch)
        self.uncached: nn.Module = isolated(self.denoiser, self.backend)
        self.real = real_features(REAL_IMAGES)

    def sample(self, model: nn.Module, batch: int, steps: int) -> tuple[Tensor, float]:
        """Return the images of one batch, whose number is its seed, and the seconds they took."""
        synchronise()
        began = time.perf_counter()
        images = sample_images(model, self.batches[batch], steps=steps, guidance=GUIDANCE, seed=batch)
        synchronise()
        return images, time.perf_counter() - began

    def sample_all(self, model: nn.Module, steps: int, rounds: int, tick: Callable[[], object]) -> Run:
        """Sample all batches; before each of the first `rounds`, the uncached model runs the same batch."""
        parts, run = [], Run(torch.empty(0), [])
        for batch in range(len(self.batches)):
            if batch < rounds:
                run.uncached.append(self.sample(self.uncached, batch, self.steps)[1])
            images, seconds = self.sample(model, batch, steps)
            parts.append(images)
            run.seconds.append(seconds)
            tick()
        run.images = torch.cat(parts)
        return run

    def measure_uncached(self, bar: Bar) -> Result:
        """Measure the uncached row, and keep its images and features to compare the others with."""
        with bar("uncached", len(self.batches)) as tick:
            _, first = self.sample(self.uncached, 0, self.steps)
            run = self.sample_all(self.uncached, self.steps, 0, tick)
        self.images, self.image_features = run.images, features(self.classifier, run.images)
        run.uncached = run.seconds
        return self._result(uncached(self.steps), self.steps, run, compile_seconds=max(0.0, first - run.seconds[0]))

    def measure(self, recipe: Recipe, bar: Bar) -> Result:
        """Compile, run the first batch, then time and evaluate all batches."""
        policy = recipe.policy()
        steps = recipe.settings["steps"] if policy is None else self.steps
        with bar(recipe.name, len(self.batches)) as tick:
            if policy is None:
                return self._result(recipe, steps, self.sample_all(self.uncached, steps, self.rounds, tick))
            model = dit_rewrite.compile(twin(self.denoiser), policy, backend=self.backend)
            _, first = self.sample(model, 0, steps)
            before = model.stats()
            run = self.sample_all(model, steps, self.rounds, tick)
            after = model.stats()
        reused, computed = after.reused - before.reused, after.computed - before.computed
        return self._result(
            recipe,
            steps,
            run,
            reuse=reused / max(1, reused + computed),
            compile_seconds=max(0.0, first - run.seconds[0]),
            late_variants=after.variants - before.variants,
            cache_bytes=sum(place.bytes for place in model.explain().sites if place.reachable),
            misses={str(reason): count for reason, count in (after.misses - before.misses).items()},
        )

    def _result(self, recipe: Recipe, steps: int, run: Run, reuse: float = 0.0, **more: Any) -> Result:
        size = len(self.batches[0])
        found = features(self.classifier, run.images)
        pairs = zip(run.images.split(size), self.images.split(size), strict=True)
        return Result(
            key=recipe.key(),
            steps=steps,
            seconds_per_image=Spread.of([seconds / size for seconds in run.seconds]),
            ratio=Spread.of([a / b for a, b in zip(run.seconds, run.uncached, strict=False)]),
            reuse=reuse,
            relative_l2=relative_l2(run.images, self.images),
            relative_l2_by_batch=[relative_l2(*pair) for pair in pairs],
            ssim=ssim(run.images, self.images),
            accuracy=accuracy(self.classifier, run.images, self.labels),
            frechet_data=frechet_distance(found, self.real),
            frechet_uncached=frechet_distance(found, self.image_features),
            **more,
        )


@dataclass
class Record:
    """The results file: its parameters, and the rows so far."""

    path: Path
    header: dict[str, Any]
    rows: dict[str, Result] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> Record:
        """Load the file if its parameters, machine and versions are the same; otherwise start a new one."""
        record = cls(path, json.loads(json.dumps(header)))
        if path.exists():
            content = json.loads(path.read_text())
            if all(content.get(name) == value for name, value in record.header.items()):
                record.rows = {row["key"]["name"]: Result.from_json(row) for row in content["rows"]}
        return record

    def missing(self, wanted: Iterable[Recipe]) -> list[Recipe]:
        """Return the recipes without a row, or whose row is of another policy."""
        keys = {name: row.key for name, row in self.rows.items()}
        return [recipe for recipe in wanted if keys.get(recipe.name) != json.loads(json.dumps(recipe.key()))]

    def write(self, frechet_floor: float | None = None, claims: Sequence[Claim] = ()) -> None:
        """Write all rows, and finally the claims; the file is replaced as a whole."""
        content = {
            **self.header,
            "frechet_floor": frechet_floor,
            "claims": [asdict(claim) for claim in claims],
            "rows": [asdict(row) for row in self.rows.values()],
        }
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


def measure_rows(arguments: argparse.Namespace, wanted: Sequence[Recipe], record: Record) -> None:
    """Measure the missing rows, and write after each row."""
    missing = record.missing(wanted)
    console.print(f"{len(missing)} rows to measure, {len(record.rows)} are there", highlight=False)
    if not missing and record.rows:
        return
    bench = Bench(arguments)
    with open_progress() as bar:
        first = bench.measure_uncached(bar)
        record.rows = {first.name: first} | record.rows
        record.write()
        for recipe in missing:
            record.rows[recipe.name] = bench.measure(recipe, bar)
            record.write()


def chosen(patterns: list[str] | None, steps: int) -> list[Recipe]:
    """Return the rows whose names match one of the patterns, or all rows if there are none."""
    return [r for r in recipes(steps) if patterns is None or any(fnmatchcase(r.name, p) for p in patterns)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.dqar_fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="divides the samples")
    parser.add_argument("--rounds", type=int, default=3, help="batches timed in alternation with the uncached model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="names as in the table, such as 'FORA*'")
    parser.add_argument("--out", type=Path, default=RESULTS / "dqar_fidelity.json")
    parser.add_argument("--plot", type=Path, default=Path("docs/dqar_fidelity.png"))
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    prepare(parser, arguments, "samples")
    shown = ("samples", "steps", "batch", "rounds", "threads", "backend", "device")
    settings = {name: getattr(arguments, name) for name in shown} | {"guidance": GUIDANCE, "real_images": REAL_IMAGES}
    record = Record.open(arguments.out, {"settings": settings, "machine": machine(), "versions": versions()})
    began = time.perf_counter()
    wanted = chosen(arguments.rows, arguments.steps)
    measure_rows(arguments, wanted, record)
    rows = list(record.rows.values())
    claims, floor = judge(rows), frechet_floor(arguments.samples)
    record.write(floor, claims)
    show(rows, claims, floor)
    draw(rows, arguments.plot)
    console.print(f"wrote {arguments.out} and {arguments.plot}; {time.perf_counter() - began:.0f} s", highlight=False)
