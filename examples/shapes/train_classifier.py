"""Train the classifier of shapes images, and measure its accuracy on held-out images.

    python examples/shapes/train_classifier.py --out dit_rewrite/shapes/weights [--captioned] [--steps 2500]

Every batch is drawn at random, so there is no training set to overfit; held-out images use other seeds. Half of each
batch is slightly noisy, because the classifier will read sampled images. With --captioned, the images are those of the
captions, which have small shapes too, and the file is text_classifier.safetensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_rewrite.demo.shapes.captions import sample_captioned
from dit_rewrite.demo.shapes.data import sample
from dit_rewrite.demo.shapes.model import Classifier, accuracy, load_classifier, save
from dit_rewrite.demo.shapes.training import add_noise, fit

HELD_OUT = 5000
HELD_OUT_SEED = 1 << 31  # disjoint from the training seeds; generators use 32 bits
NEEDED = 0.99

Sample = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def sample_of_captions(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, SIZE, SIZE) of the captions' scenes and labels (n,), in the format of data.sample."""
    images, _, scenes = sample_captioned(n, generator)
    return images, scenes.labels


def loss_of(classifier: Classifier, draw: Sample, batch: int, generator: torch.Generator) -> Tensor:
    """Return the cross-entropy of the classes of a batch."""
    images, labels = draw(batch, generator)
    return F.cross_entropy(classifier(add_noise(images, generator)), labels)


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
    fit(classifier, partial(loss_of, classifier, draw, arguments.batch), arguments.steps, arguments.rate)
    path = arguments.out / ("text_classifier.safetensors" if arguments.captioned else "classifier.safetensors")
    save(classifier, path)
    images, labels = draw(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))
    right = accuracy(load_classifier(path), images, labels)
    print(f"accuracy {right:.2%} of {HELD_OUT} held-out images, read from {path}")
    if right < NEEDED:
        raise SystemExit(f"below {NEEDED:.0%}: train longer (--steps)")


if __name__ == "__main__":
    main()
