"""A procedural data set of relations: an image of two shapes, and a sentence about their relative position.

"a red circle left of a blue square" leaves out the sizes and the exact positions, which vary. If the shapes are on a
diagonal, a second relation holds too. Images are generated and not stored: see data.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from dit_rewrite.demo.shapes.captions import START, number_words
from dit_rewrite.demo.shapes.data import COLOURS, NUM_CLASSES, SHAPES, _distances

SIZE = 32
RADII = (4.6, 6.4)  # in pixels
APART = 8.0  # minimum pixels between centres for a relation; generated images have at least twice RADII[0]
RELATIONS = ("left of", "right of", "above", "below")
NULL = "<null>"
WORDS = (START, NULL, "a", "left", "right", "of", "above", "below", *COLOURS, *SHAPES)
MAX_TOKENS = 9
NULL_CAPTION = ""  # for classifier-free guidance


class Pairs(NamedTuple):
    """The content of n images, each field (n,) int64: the class (data.CLASSES) of the object at the left or the top,
    that of the other object, and 1 if one is above the other, 0 if it is beside it."""

    first: Tensor
    second: Tensor
    vertical: Tensor


class Layout(NamedTuple):
    """The layout of n images: the background (n, 1, 1, 1), and the radii (n, 2) and centres (n, 2, 2), x and y, of both
    objects in pixels."""

    ground: Tensor
    radii: Tensor
    centres: Tensor


class Objects(NamedTuple):
    """The two objects that were read from each of n images, in any order: their classes (n, 2), and their centres
    (n, 2, 2), x and y in pixels."""

    classes: Tensor
    centres: Tensor

    def have_classes(self, wanted: Pairs) -> Tensor:
        """Return (n,) bool: whether the objects have the wanted classes."""
        classes = torch.stack([wanted.first, wanted.second], 1)
        return (self.classes.sort(1).values == classes.sort(1).values).all(1)

    def in_relation(self, wanted: Pairs) -> Tensor:
        """Return (n,) bool: whether the wanted relation holds, with `wanted.first` at the left or the top.

        Two relations may hold at once, for example for objects at the top left and the bottom right.
        """
        swapped = self.classes[:, 0] != wanted.first
        distance = (self.centres[:, 1] - self.centres[:, 0]).gather(1, wanted.vertical[:, None])[:, 0]
        return torch.where(swapped, -distance, distance) >= APART


def draw_pairs(n: int, generator: Generator) -> Pairs:
    """Draw `n` pairs of different classes, uniformly."""
    first = torch.randint(NUM_CLASSES, (n,), generator=generator)
    other = torch.randint(1, NUM_CLASSES, (n,), generator=generator)
    return Pairs(first, (first + other) % NUM_CLASSES, torch.randint(2, (n,), generator=generator))


def _layer(labels: Tensor, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coverage of each pixel by an object (n, 1, SIZE, SIZE), and its colour (n, 3, 1, 1)."""
    pixel = torch.arange(SIZE) + 0.5
    x, y = pixel[None, None, :] - centre[0][:, None, None], pixel[None, :, None] - centre[1][:, None, None]
    shape, colour = labels // len(COLOURS), labels % len(COLOURS)
    distance = _distances(x, y, radius[:, None, None])[shape, torch.arange(len(labels))]
    return (0.5 - distance).clamp(0, 1)[:, None], torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]


def lay_out(pairs: Pairs, generator: Generator) -> Layout:
    """Draw sizes, positions and backgrounds that agree with `pairs`. The two objects never overlap."""
    n = len(pairs.first)
    low, high = RADII
    ground = -0.85 + 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    radii, centres = [], []
    for far in (False, True):
        radius = low + (high - low) * torch.rand(n, generator=generator)
        near_edge = radius + (SIZE / 2 - 2 * radius) * torch.rand(n, generator=generator)
        along = SIZE - near_edge if far else near_edge
        across = radius + (SIZE - 2 * radius) * torch.rand(n, generator=generator)
        upright = (pairs.vertical == 1)[:, None]
        radii.append(radius)
        centres.append(torch.where(upright, torch.stack([across, along], 1), torch.stack([along, across], 1)))
    return Layout(ground, torch.stack(radii, 1), torch.stack(centres, 1))


def render(pairs: Pairs, layout: Layout) -> Tensor:
    """Return images (n, 3, SIZE, SIZE) float32 in [-1, 1]."""
    image = layout.ground.expand(-1, 3, SIZE, SIZE)
    for i, labels in enumerate((pairs.first, pairs.second)):
        coverage, ink = _layer(labels, layout.centres[:, i].T, layout.radii[:, i])
        image = image + coverage * (ink - image)
    return image


def _say(label: int) -> str:
    return f"a {list(COLOURS)[label % len(COLOURS)]} {SHAPES[label // len(COLOURS)]}"


def describe(pairs: Pairs, generator: Generator) -> list[str]:
    """Return a caption for each image, with the two objects in random order."""
    turned = torch.randint(2, (len(pairs.first),), generator=generator)
    captions = []
    for first, second, vertical, turn in zip(*(x.tolist() for x in (*pairs, turned)), strict=True):
        one, other = (second, first) if turn else (first, second)
        captions.append(f"{_say(one)} {RELATIONS[2 * vertical + turn]} {_say(other)}")
    return captions


def sample_related(n: int, generator: Generator) -> tuple[Tensor, list[str], Pairs]:
    """Draw `n` images (n, 3, SIZE, SIZE) in [-1, 1], with their captions and pairs."""
    pairs = draw_pairs(n, generator)
    return render(pairs, lay_out(pairs, generator)), describe(pairs, generator), pairs


def tokenise(captions: Sequence[str]) -> Tensor:
    """Return the tokens (n, MAX_TOKENS) int64 of captions: a start token, the words, and the null token as padding.

    Raises BadArgument for a word outside WORDS or too many words.
    """
    return number_words(captions, WORDS, NULL, MAX_TOKENS)
