"""Choose the guidance scale by how often the classifier recognises the requested class.

    python examples/shapes/evaluate.py [--weights FILE] [--per-class 25] [--steps 50] [--out evaluation.png]

The denoiser runs in eager mode. The picture has a row for each scale and a column for each class.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_rewrite.demo.shapes.data import CLASSES, NUM_CLASSES
from dit_rewrite.demo.shapes.model import WEIGHTS, accuracy, load_classifier, load_denoiser
from dit_rewrite.demo.shapes.picture import save_rows
from dit_rewrite.demo.shapes.sampling import sample_images

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)


def sample_in_batches(denoiser: nn.Module, labels: Tensor, steps: int, guidance: float, batch: int) -> Tensor:
    """Sample the images of all labels batch by batch; the seed of a batch is its number."""
    parts = [
        sample_images(denoiser, part, steps=steps, guidance=guidance, seed=seed)
        for seed, part in enumerate(labels.split(batch))
    ]
    return torch.cat(parts)


def worst_class(classifier: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Return the class with the lowest accuracy, and that accuracy."""
    right = {name: accuracy(classifier, images[labels == k], labels[labels == k]) for k, name in enumerate(CLASSES)}
    name = min(right, key=right.__getitem__)
    return f"{name} {right[name]:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "denoiser.safetensors")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--per-class", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("evaluation.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    denoiser, classifier = load_denoiser(arguments.weights), load_classifier()
    labels = torch.arange(NUM_CLASSES).repeat(arguments.per_class)
    rows = []
    for scale in arguments.scales:
        began = time.perf_counter()
        images = sample_in_batches(denoiser, labels, arguments.steps, scale, arguments.batch)
        right = accuracy(classifier, images, labels)
        seconds = time.perf_counter() - began
        worst = worst_class(classifier, images, labels)
        print(
            f"guidance {scale:<5} accuracy {right:6.1%} of {len(labels)}  (worst: {worst})  {seconds:.0f} s", flush=True
        )
        rows.append((f"guidance {scale}, {right:.1%}", images[:NUM_CLASSES]))
    save_rows(arguments.out, rows, CLASSES)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
