"""Train the classifier that reads the class of a shapes image, and measure it on images it has not seen.

    python examples/shapes/train_classifier.py --out dit_rewrite/shapes/weights [--captioned] [--steps 2500]

Every batch is drawn anew, so there is no training set to remember; the held-out images come from other seeds.
Half of each batch is slightly noisy, since the images that it will read are sampled, not drawn. With --captioned
the images are those of the captions, which have small shapes too, and the file is text_classifier.safetensors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_rewrite.shapes.captions import sample_captioned
from dit_rewrite.shapes.data import sample
from dit_rewrite.shapes.model import Classifier, accuracy, load_classifier, save

HELD_OUT = 5000
HELD_OUT_SEED = 1 << 40  # beyond every training step's seed
NEEDED = 0.99

Sample = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def sample_of_captions(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(n, 3, SIZE, SIZE)`` of the captions' scenes and their labels ``(n,)``, as data.sample's."""
    images, _, scenes = sample_captioned(n, generator)
    return images, scenes.labels


def batch_of(draw: Sample, step: int, size: int) -> tuple[Tensor, Tensor]:
    """One step's images and labels, the first half with noise of up to 0.15 in the range [-1, 1]."""
    generator = torch.Generator().manual_seed(step)
    images, labels = draw(size, generator)
    strength = 0.15 * torch.rand(size, 1, 1, 1, generator=generator)
    strength[size // 2 :] = 0
    return images + strength * torch.randn(images.shape, generator=generator), labels


def train(classifier: Classifier, draw: Sample, steps: int, batch: int, rate: float) -> None:
    """Adam with a rate that falls to zero along a half cosine."""
    optimiser = torch.optim.Adam(classifier.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    began = time.perf_counter()
    for step in range(steps):
        images, labels = batch_of(draw, step, batch)
        loss = F.cross_entropy(classifier(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}  loss {loss.item():.5f}  {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets the weights")
    parser.add_argument("--captioned", action="store_true", help="read the captions' images")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    classifier = Classifier()
    draw = sample_of_captions if arguments.captioned else sample
    train(classifier, draw, arguments.steps, arguments.batch, arguments.rate)
    path = arguments.out / ("text_classifier.safetensors" if arguments.captioned else "classifier.safetensors")
    save(classifier, path)
    images, labels = draw(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))
    right = accuracy(load_classifier(path), images, labels)
    print(f"accuracy {right:.2%} of {HELD_OUT} held-out images, read from {path}")
    if right < NEEDED:
        raise SystemExit(f"below {NEEDED:.0%}: train longer (--steps)")


if __name__ == "__main__":
    main()
