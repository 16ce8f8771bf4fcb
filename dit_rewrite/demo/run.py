"""The demo: the bundled denoiser samples the same images uncached, with reuse, with forecasts, and with fewer steps.

All methods start from the same noise with the same weights. All are compiled and run once before they are timed, in
turn, in one process. The control of each policy is uncached sampling with DPM-Solver++ 2M, the solver that needs the
fewest steps, with the number of steps that fits into the policy's time as measured in this run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.demo.report import FORECAST, Result, announce, open_progress, write_all
from dit_rewrite.demo.shapes.data import CLASSES, COLOURS, SHAPES
from dit_rewrite.demo.shapes.model import SCHEDULE, accuracy, load_classifier, load_denoiser
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA, TaylorSeer
from dit_rewrite.proof.image_metrics import psnr, relative_l2

PILOT_ROUNDS = 2


@dataclass
class Method:
    """A way to sample the images, and its measurements."""

    name: str
    denoiser: Any  # a module, compiled or rewritten
    steps: int
    control_of: str | None = None
    scheduler: Any = None  # None: the model's own DDIM
    first_seconds: float | None = None  # time of the first run, which compiles
    seconds: list[float] = field(default_factory=list)
    images: Tensor | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Task:
    """The images that every method samples."""

    labels: Tensor
    steps: int
    seed: int

    def run(self, method: Method, tick: Callable[[], object]) -> float:
        """Sample once, keep the images, and return the seconds."""
        _synchronise(self.labels.device)
        began = time.perf_counter()
        method.images = sample_images(
            method.denoiser,
            self.labels,
            steps=method.steps,
            guidance=GUIDANCE,
            seed=self.seed,
            scheduler=method.scheduler,
            progress=tick,
        )
        _synchronise(self.labels.device)
        return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_labels(count: int) -> Tensor:
    """Return `count` labels: for each shape all colours except the last, repeated as needed."""
    shown = [shape * len(COLOURS) + colour for shape in range(len(SHAPES)) for colour in range(len(COLOURS) - 1)]
    return torch.tensor([shown[i % len(shown)] for i in range(count)])


def control_steps(steps: int, cached_seconds: float, uncached_seconds: float) -> int:
    """Return the number of uncached steps that take the time of a cached run of `steps` steps, at least 1."""
    return max(1, round(steps * cached_seconds / uncached_seconds))


def build_methods(denoiser: nn.Module, arguments: argparse.Namespace) -> list[Method]:
    """Return the methods: uncached, reuse at the first interval, and a forecast at each interval.

    Reuse is FORA for all branches; the forecast is TaylorSeer's for the model's output. Models compile at their first
    call.
    """
    plain = torch.compile(denoiser, backend=arguments.backend)
    first, *_ = arguments.intervals
    policies = {f"FORA({first})": FORA(interval=first)}
    policies |= {f"{FORECAST}({i})": TaylorSeer(i, order=2, span="output") for i in arguments.intervals}
    cached = (
        Method(name, dit_rewrite.compile(twin(denoiser), policy, backend=arguments.backend), arguments.steps)
        for name, policy in policies.items()
    )
    return [Method("uncached", plain, arguments.steps), *cached]


def build_controls(uncached: Method, cached: Sequence[Method]) -> list[Method]:
    """Return a control for each cached method: uncached sampling with the steps that fit into its pilot runs' time."""
    from diffusers import DPMSolverMultistepScheduler

    controls = []
    for method in cached:
        steps = control_steps(uncached.steps, method.median, uncached.median)
        solver = DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing")
        controls.append(Method(f"{steps} steps", uncached.denoiser, steps, control_of=method.name, scheduler=solver))
    return controls


Bar = Callable[[str, int], AbstractContextManager[Callable[[], object]]]


def compile_all(methods: Sequence[Method], task: Task, bar: Bar) -> None:
    """Run each method once, which compiles it."""
    for method in methods:
        with bar(f"compiling {method.name}", method.steps) as tick:
            method.first_seconds = task.run(method, tick)


def time_in_turn(methods: Sequence[Method], task: Task, rounds: int, title: str, bar: Bar) -> None:
    """Time all methods in turn, `rounds` times; earlier times are discarded."""
    for method in methods:
        method.seconds = []
    with bar(title, rounds * sum(method.steps for method in methods)) as tick:
        for _ in range(rounds):
            for method in methods:
                method.seconds.append(task.run(method, tick))


def measure(methods: list[Method], task: Task, rounds: int, bar: Bar) -> list[Method]:
    """Compile, determine the steps of the controls, and time everything. Returns the methods in the table's order."""
    uncached, cached = methods[0], methods[1:]
    compile_all(methods, task, bar)
    time_in_turn(methods, task, PILOT_ROUNDS, "pilot runs for the number of control steps", bar)
    controls = build_controls(uncached, cached)
    everything = [uncached, *(method for pair in zip(cached, controls, strict=True) for method in pair)]
    time_in_turn(everything, task, rounds, "timed runs, in turn", bar)
    return everything


def result_of(method: Method, uncached: Method, labels: Tensor, classifier: nn.Module) -> Result:
    """Return the results of one method; `stats` are those of the rewritten model."""
    assert method.images is not None and uncached.images is not None
    stats = method.denoiser.stats() if hasattr(method.denoiser, "stats") else None
    return Result(
        name=method.name,
        control_of=method.control_of,
        steps=method.steps,
        seconds=method.median,
        all_seconds=method.seconds,
        speed_up=uncached.median / method.median,
        recomputed=1.0 if stats is None else stats.recomputed_fraction,
        relative_l2=relative_l2(method.images, uncached.images),
        psnr=psnr(method.images, uncached.images),
        accuracy=accuracy(classifier, method.images, labels),
        compile_seconds=None if method.first_seconds is None else max(0.0, method.first_seconds - method.median),
        stats=None if stats is None else stats_figures(stats),
    )


def stats_figures(stats: Any) -> dict[str, object]:
    """Return the counts of `model.stats()`, without its row per call."""
    names = ("calls", "computed", "reused", "variants", "recompiles", "graph_breaks", "peak_bytes")
    misses = {str(reason): count for reason, count in dict(stats.misses).items()}
    return {name: getattr(stats, name) for name in names} | {"misses": misses}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo and print its results. Returns the content of ``results.json``."""
    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    task = Task(choose_labels(arguments.images).to(device), arguments.steps, arguments.seed)
    denoiser, classifier = load_denoiser().to(device), load_classifier().to(device)
    announce(arguments, GUIDANCE)
    with open_progress() as bar:
        methods = measure(build_methods(denoiser, arguments), task, arguments.rounds, bar)
    results = [result_of(method, methods[0], task.labels, classifier) for method in methods]
    images = [(result, method.images) for result, method in zip(results, methods, strict=True)]
    names = [CLASSES[label] for label in task.labels.tolist()]
    cached = methods[1::2]
    shown = cached[len(cached) // 2]
    return write_all(arguments, images, names, shown.denoiser.explain(), shown.name, time.perf_counter() - began)
