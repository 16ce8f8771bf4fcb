"""Train the reader of two shapes in relation, and measure its accuracy on held-out pictures.

    python examples/shapes/train_pair_reader.py --out dit_rewrite/shapes/weights [--steps 4000] [--batch 128]

Every batch is drawn at random, so there is no training set to overfit; held-out pictures use other seeds. Half of each
batch is slightly noisy, because the reader will read sampled pictures.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dit_rewrite.demo.shapes.flow_model import PairReader, load_pair_reader, read_objects
from dit_rewrite.demo.shapes.model import save
from dit_rewrite.demo.shapes.relations import draw_pairs, lay_out, render, sample_related
from dit_rewrite.demo.shapes.training import add_noise, fit

HELD_OUT = 5000
HELD_OUT_SEED = 1 << 31  # disjoint from the training seeds; generators use 32 bits
NEEDED = 0.99
PLACE_WEIGHT = 0.05  # per square pixel


def loss_of(reader: PairReader, batch: int, generator: Generator) -> Tensor:
    """Return the mean cross-entropy of the two classes plus the weighted squared error of their places."""
    pairs = draw_pairs(batch, generator)
    layout = lay_out(pairs, generator)
    logits, places = reader(add_noise(render(pairs, layout), generator))
    classes = torch.stack([pairs.first, pairs.second], 1)
    half = torch.zeros_like(logits).scatter(1, classes, 0.5)
    found = places[torch.arange(batch)[:, None], classes]
    return F.cross_entropy(logits, half) + PLACE_WEIGHT * F.mse_loss(found, layout.centres)


def accuracy(reader: PairReader) -> float:
    """Return the fraction of held-out pictures for which both objects and their relation are read correctly."""
    images, _, pairs = sample_related(HELD_OUT, Generator().manual_seed(HELD_OUT_SEED))
    seen = read_objects(reader, images)
    return (seen.have_classes(pairs) & seen.in_relation(pairs)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets the weights")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    reader = PairReader()
    fit(reader, partial(loss_of, reader, arguments.batch), arguments.steps, arguments.rate)
    path = arguments.out / "pair_reader.safetensors"
    save(reader, path)
    right = accuracy(load_pair_reader(path))
    print(f"entirely right in {right:.2%} of {HELD_OUT} held-out pictures, read from {path}")
    if right < NEEDED:
        raise SystemExit(f"below {NEEDED:.0%}: train longer (--steps)")


if __name__ == "__main__":
    main()
