"""Choose the guidance scale for two shapes in relation by how often the images match their captions.

    python examples/shapes/evaluate_flow.py [--weights FILE] [--captions 500] [--steps 50] [--out flow_evaluation.png]

PairReader reads the images. "all" counts images in which both objects have the requested shape, colour and relation.
"shape" and "colour" count both objects at any position; "relation" is a fraction of the images that show both objects.
The first line has the scores of real images. The picture has a row for each scale and a column for each of the first
captions, which are printed below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from dit_rewrite.demo.shapes.data import COLOURS
from dit_rewrite.demo.shapes.flow_model import FlowModel, load_flow_model, load_pair_reader, read_objects
from dit_rewrite.demo.shapes.flow_sampling import sample_relations
from dit_rewrite.demo.shapes.model import WEIGHTS
from dit_rewrite.demo.shapes.picture import save_rows
from dit_rewrite.demo.shapes.relations import Objects, Pairs, sample_related

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
SEED = 1 << 31  # disjoint from the training seeds; generators use 32 bits
SHOWN = 12


def same_two(seen: Tensor, asked: Tensor) -> Tensor:
    """Return (n,) whether two values (n, 2) are the requested ones in either order."""
    return (seen.sort(1).values == asked.sort(1).values).all(1)


def grade(seen: Objects, asked: Pairs) -> dict[str, float]:
    """Return the fractions of correct images; that of the relation is among the images that show both objects."""
    shown, lying = seen.have_classes(asked), seen.in_relation(asked)
    classes, wanted = seen.classes, torch.stack([asked.first, asked.second], 1)
    right = {
        "all": shown & lying,
        "shape": same_two(classes // len(COLOURS), wanted // len(COLOURS)),
        "colour": same_two(classes % len(COLOURS), wanted % len(COLOURS)),
        "relation": lying[shown],
    }
    return {name: hits.float().mean().item() for name, hits in right.items()}


def sample_in_batches(model: FlowModel, captions: Sequence[str], steps: int, guidance: float, batch: int) -> Tensor:
    """Sample the images of all captions batch by batch; the seed of a batch is its number."""
    parts = [captions[i : i + batch] for i in range(0, len(captions), batch)]
    images = [
        sample_relations(model.denoiser, model.encoder, part, steps=steps, guidance=guidance, seed=seed)
        for seed, part in enumerate(parts)
    ]
    return torch.cat(images)


def describe_grades(grades: dict[str, float]) -> str:
    return "  ".join(f"{name} {right:6.1%}" for name, right in grades.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "flow_denoiser.safetensors")
    parser.add_argument("--reader", type=Path, default=WEIGHTS / "pair_reader.safetensors")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("flow_evaluation.png"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model, reader = load_flow_model(arguments.weights), load_pair_reader(arguments.reader)
    real, captions, asked = sample_related(arguments.captions, Generator().manual_seed(SEED))
    print(f"real images   {describe_grades(grade(read_objects(reader, real), asked))}  of {len(captions)}", flush=True)
    rows = [("real", real[:SHOWN])]
    for scale in arguments.scales:
        began = time.perf_counter()
        images = sample_in_batches(model, captions, arguments.steps, scale, arguments.batch)
        grades = grade(read_objects(reader, images), asked)
        print(
            f"guidance {scale:<4} {describe_grades(grades)}  of {len(captions)}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        rows.append((f"guidance {scale}, {grades['all']:.1%}", images[:SHOWN]))
    save_rows(arguments.out, rows, [str(i + 1) for i in range(len(captions[:SHOWN]))], scale=4)
    for i, caption in enumerate(captions[:SHOWN]):
        print(f"{i + 1:3} {caption}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
