"""Search the computed steps of a plan for the fidelity benchmark, on other noise: python -m benchmarks.fidelity.plans

The class toy is sampled from seeds that the benchmark does not judge by, and the output of the steps between computed
ones is forecast as by `StepMask`, with the same weights. A few images are so sensitive to small errors that they decide
the error of a batch. The search has these in view: the influence of each step is measured on the images with the
largest errors under an even plan, a dynamic programme places the steps by it, and then single steps are moved while the
root mean square of these images' errors falls. Both plans and an even one are compared on further seeds. The script
prints the plans, which `fidelity.rows.PLANS` lists, and writes what it measured.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import RESULTS, machine
from dit_rewrite.demo.report import console, versions
from dit_rewrite.demo.shapes.data import NULL_CLASS, NUM_CLASSES
from dit_rewrite.demo.shapes.model import build_scheduler, load_denoiser
from dit_rewrite.demo.shapes.sampling import GUIDANCE
from dit_rewrite.policy.bases import BASES
from dit_rewrite.policy.files import write_whole
from dit_rewrite.search.measurements import interpolate
from dit_rewrite.search.placement import anchors_of, even, gap_costs, place

STEPS, BATCH, SHAPE = 50, 24, (3, 16, 16)
SEEDS, CONFIRMING = tuple(range(3000, 3008)), tuple(range(4000, 4004))
SENSITIVE = 16  # images that the search has in view
STRIDE = 4  # the influence is measured at one step in so many
SHIFTS = (-1, 1, -2, 2)
ORDER, BASIS = 2, "taylorseer"
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Pictures:
    """Noise, labels, and the images that the uncached model makes of them."""

    noise: Tensor
    labels: Tensor
    images: Tensor

    def pick(self, among: Tensor) -> Pictures:
        return Pictures(self.noise[among], self.labels[among], self.images[among])


class Toy:
    """The class toy, with forecasts of its output."""

    def __init__(self) -> None:
        self.denoiser = load_denoiser()

    @torch.no_grad()
    def run(
        self, noise: Tensor, labels: Tensor, table: Sequence[Weights] = ((),) * STEPS, given: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample images. A step with weights in `table` forecasts its output by them, from the newest value on.

        `given` are the outputs of the first steps, which count as computed. Returns the images and all outputs.
        """
        scheduler, latents = build_scheduler(), noise
        scheduler.set_timesteps(STEPS)
        classes = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        computed: list[Tensor] = []
        outputs: list[Tensor] = []
        for i, timestep in enumerate(scheduler.timesteps):
            if table[i]:
                output = sum((w * v for w, v in zip(table[i], reversed(computed), strict=False)), torch.zeros(()))
            elif i < len(given):
                output = given[i]
            else:
                times = timestep.expand(2 * len(labels))
                output = self.denoiser(torch.cat([latents, latents]), times, classes, return_dict=False)[0]
            computed += [] if table[i] else [output]
            outputs.append(output)
            conditional, unconditional = output.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        return latents.clamp(-1, 1), outputs

    def errors(self, pictures: Pictures, computed: Sequence[int]) -> Tensor:
        """Return the relative L2 error of each image under a plan."""
        parts = torch.arange(len(pictures.labels)).split(BATCH)
        images = [self.run(pictures.noise[part], pictures.labels[part], weights_of(computed))[0] for part in parts]
        return relative_errors(torch.cat(images), pictures.images)


def weights_of(computed: Sequence[int]) -> list[Weights]:
    """Return the weights of the forecast at each step, newest value first; empty where the step computes."""
    basis, rows = BASES[BASIS](), []
    for step in range(STEPS):
        anchors = anchors_of(step, computed, ORDER + 1)
        rows.append(() if step in computed else tuple(basis.weights(anchors, step, len(anchors) - 1)))
    return rows


def relative_errors(images: Tensor, reference: Tensor) -> Tensor:
    return (images - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def root_mean_square(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def pictures_of(toy: Toy, seeds: Sequence[int]) -> tuple[Pictures, Tensor]:
    """Return the pictures of some seeds, and the outputs (steps, halves, pictures, elements) of their runs."""
    labels = torch.arange(BATCH) % NUM_CLASSES
    noise = [torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    runs = [toy.run(each, labels) for each in noise]
    outputs = [torch.stack(values).reshape(STEPS, 2, BATCH, -1) for _, values in runs]
    pictures = Pictures(torch.cat(noise), labels.repeat(len(noise)), torch.cat([images for images, _ in runs]))
    return pictures, torch.cat(outputs, dim=2)


def influence_of(toy: Toy, pictures: Pictures, outputs: Tensor) -> Tensor:
    """Return the final error per error of each step, tempered by a geometric mean with a uniform influence.

    A step's output is replaced by that of two steps before. The errors are root mean squares over the pictures.
    """
    known = {}
    given = list(outputs.flatten(1, 2).unflatten(-1, SHAPE))
    for step in (*range(2, STEPS, STRIDE), STEPS - 1):
        table = [(0.0, 1.0) if i == step else () for i in range(STEPS)]
        images, _ = toy.run(pictures.noise, pictures.labels, table, given[:step])
        moved = (outputs[step] - outputs[step - 2]).square().sum(dim=(0, 2)).sqrt()
        known[step] = root_mean_square(relative_errors(images, pictures.images) / moved)
    measured = interpolate({1: known[2], **known}, STEPS)
    return (measured * measured.mean()).sqrt()


def moved(computed: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the plans in which one step is moved."""
    for shift in SHIFTS:
        for step in computed[1:]:
            if 0 < step + shift < STEPS and step + shift not in computed:
                yield tuple(sorted({*computed, step + shift} - {step}))


def refine(toy: Toy, pictures: Pictures, start: tuple[int, ...], trials: int) -> tuple[tuple[int, ...], float]:
    """Move single steps while the error falls, in at most so many runs."""
    best, error, tried = start, root_mean_square(toy.errors(pictures, start)), {start}
    while len(tried) <= trials:
        plan = next((plan for plan in moved(best) if plan not in tried), None)
        if plan is None:
            break
        tried.add(plan)
        found = root_mean_square(toy.errors(pictures, plan))
        if found < error:
            best, error = plan, found
            console.print(f"{error:.4f}: {best}", highlight=False)
    return best, error


def search(toy: Toy, count: int, pictures: Pictures, outputs: Tensor, trials: int) -> dict[str, object]:
    """Search a plan of so many computed steps. Returns it, and the root mean squares of its errors and an even one's"""
    plain = even(count, STEPS)
    errors = toy.errors(pictures, plain)
    among = errors.topk(SENSITIVE).indices
    sensitive = pictures.pick(among)
    influence = influence_of(toy, sensitive, outputs[:, :, among])
    values = outputs.flatten(1).double()
    gram = values @ values.T
    start = place(gap_costs(gram / gram.diagonal().mean(), influence), count)[count - 1].computed
    console.print(f"even: {root_mean_square(errors[among]):.4f}; placed: {start}", highlight=False)
    plan, error = refine(toy, sensitive, start, trials)
    return {"computed": list(plan), "placed": list(start), "even": list(plain), "sensitive": among.tolist(),
            "errors": {"found": error, "even": root_mean_square(errors[among])}}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[18], help="numbers of computed steps")
    parser.add_argument("--trials", type=int, default=40, help="runs of the local search")
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity_plans.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, toy = time.perf_counter(), Toy()
    pictures, outputs = pictures_of(toy, SEEDS)
    found = {str(n): search(toy, n, pictures, outputs, arguments.trials) for n in arguments.counts}
    others, _ = pictures_of(toy, CONFIRMING)
    for each in found.values():
        for name in ("computed", "placed", "even"):
            errors = toy.errors(others, each[name])  # type: ignore[arg-type]
            typical = math.exp(float(errors.log().mean()))
            each[f"other seeds, {name}"] = {"root_mean_square": root_mean_square(errors), "typical": typical}
        console.print(each, highlight=False)
    content = {"machine": machine(), "versions": versions(), "seeds": SEEDS, "confirming": CONFIRMING, "plans": found}
    write_whole(arguments.out, json.dumps(content, indent=1) + "\n")
    console.print(f"wrote {arguments.out}; {time.perf_counter() - began:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
