"""Choose the guidance scale for captions by how often the images match them.

    python examples/shapes/evaluate_text.py [--weights FILE] [--captions 500] [--steps 50] [--out text_evaluation.png]

A classifier reads shape and colour. Size and place are measured on the pixels, and count only if the caption names
them. The first line has the scores of real images. The picture has a row for each scale and a column for each of the
first captions, which are printed below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_rewrite.demo.shapes.captions import COLUMNS, RADII, ROWS, SIZES, Scenes, sample_captioned
from dit_rewrite.demo.shapes.data import COLOURS, SIZE
from dit_rewrite.demo.shapes.model import WEIGHTS, load_classifier
from dit_rewrite.demo.shapes.picture import save_rows
from dit_rewrite.demo.shapes.text_model import TextModel, load_text_model
from dit_rewrite.demo.shapes.text_sampling import sample_captions

SCALES = (1.0, 1.25, 1.5, 2.0)
SEED = 1 << 31  # disjoint from the training seeds; generators use 32 bits
SHOWN = 12
WIDE = 7.6  # pixels: the widest small shape is 7.3 wide (triangle), the narrowest large one 8.0 (square)


def measure(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices (n,) into SIZES, ROWS and COLUMNS of the shape in each image, from its width and centre.

    A pixel's weight is its distance from the background (the median pixel), relative to the largest such distance.
    """
    ground = images.flatten(2).median(2).values[:, :, None, None]
    share = (images - ground).abs().amax(1)
    share = share / share.amax((1, 2), keepdim=True).clamp_min(1e-6)
    share = share * (share > 0.1)  # remaining noise on the background has no weight
    size = (share.amax(1).sum(1) > WIDE).long()
    pixel = torch.arange(SIZE) + 0.5
    mass = share.sum((1, 2)).clamp_min(1e-6)
    centre = torch.stack([(share.sum(1) * pixel).sum(1), (share.sum(2) * pixel).sum(1)]) / mass
    radius = torch.tensor(RADII).mean(1)[size]
    column, row = (2 * (centre - radius) / (SIZE - 2 * radius)).round().clamp(0, 2).long()
    return size, row, column


def names(captions: Sequence[str], words: Sequence[str]) -> Tensor:
    """Return (n,) whether captions use one of the words."""
    return torch.tensor([not set(words).isdisjoint(caption.split()) for caption in captions])


@torch.no_grad()
def grade(classifier: nn.Module, images: Tensor, captions: Sequence[str], scenes: Scenes) -> dict[str, float]:
    """Return the fractions of correct images; those of size and place are among the captions that name them."""
    read = classifier(images).argmax(1)
    size, row, column = measure(images)
    sized = names(captions, [word for words in SIZES for word in words])
    placed = names(captions, [*ROWS, *COLUMNS])
    right = {
        "both": read == scenes.labels,
        "shape": read // len(COLOURS) == scenes.shape,
        "colour": read % len(COLOURS) == scenes.colour,
        "size": (size == scenes.size)[sized],
        "place": ((row == scenes.row) & (column == scenes.column))[placed],
    }
    return {name: hits.float().mean().item() for name, hits in right.items()}


def sample_in_batches(model: TextModel, captions: Sequence[str], steps: int, guidance: float, batch: int) -> Tensor:
    """Sample the images of all captions batch by batch; the seed of a batch is its number."""
    parts = [captions[i : i + batch] for i in range(0, len(captions), batch)]
    images = [
        sample_captions(model.denoiser, model.encoder, part, steps=steps, guidance=guidance, seed=seed)
        for seed, part in enumerate(parts)
    ]
    return torch.cat(images)


def describe_grades(grades: dict[str, float]) -> str:
    return "  ".join(f"{name} {right:6.1%}" for name, right in grades.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "text_denoiser.safetensors")
    parser.add_argument("--classifier", type=Path, default=WEIGHTS / "text_classifier.safetensors")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("text_evaluation.png"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model, classifier = load_text_model(arguments.weights), load_classifier(arguments.classifier)
    real, captions, scenes = sample_captioned(arguments.captions, torch.Generator().manual_seed(SEED))
    print(f"real images   {describe_grades(grade(classifier, real, captions, scenes))}  of {len(captions)}", flush=True)
    rows = [("real", real[:SHOWN])]
    for scale in arguments.scales:
        began = time.perf_counter()
        images = sample_in_batches(model, captions, arguments.steps, scale, arguments.batch)
        grades = grade(classifier, images, captions, scenes)
        print(
            f"guidance {scale:<4} {describe_grades(grades)}  of {len(captions)}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        rows.append((f"guidance {scale}, {grades['both']:.1%}", images[:SHOWN]))
    save_rows(arguments.out, rows, [str(i + 1) for i in range(len(captions[:SHOWN]))])
    for i, caption in enumerate(captions[:SHOWN]):
        print(f"{i + 1:3} {caption}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
