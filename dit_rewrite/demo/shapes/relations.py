"""A procedural data set of relations: two shapes, and a sentence that says which lies on which side of the other.

"a red circle left of a blue square" names everything but the sizes and the exact places, which vary: the two may lie on
a diagonal, of which a second relation is true too. Nothing is stored: see data.py.
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
APART = 8.0  # pixels between centres from which on a relation holds; in drawn pictures they are twice RADII[0] or more
RELATIONS = ("left of", "right of", "above", "below")
NULL = "<null>"
WORDS = (START, NULL, "a", "left", "right", "of", "above", "below", *COLOURS, *SHAPES)
MAX_TOKENS = 9
NULL_CAPTION = ""  # for classifier-free guidance


class Pairs(NamedTuple):
    """What is asked of ``n`` pictures, each ``(n,)`` int64: the class (data.CLASSES) of the object at the left or the
    top, of the other one, and whether one lies above the other (1) or beside it (0)."""

    first: Tensor
    second: Tensor
    vertical: Tensor


class Layout(NamedTuple):
    """Of ``n`` pictures the ground ``(n, 1, 1, 1)``, and of both objects the radii ``(n, 2)`` and the centres, x and y,
    ``(n, 2, 2)``, in pixels."""

    ground: Tensor
    radii: Tensor
    centres: Tensor


class Objects(NamedTuple):
    """What is seen in ``n`` pictures: the classes ``(n, 2)`` of two objects in any order, and their centres, x and y in
    pixels, ``(n, 2, 2)``."""

    classes: Tensor
    centres: Tensor

    def show(self, asked: Pairs) -> Tensor:
        """Where ``(n,)`` they are the two objects that were asked for, wherever they lie."""
        wanted = torch.stack([asked.first, asked.second], 1)
        return (self.classes.sort(1).values == wanted.sort(1).values).all(1)

    def lie(self, asked: Pairs) -> Tensor:
        """Where ``(n,)`` they lie as was asked, the object of the class ``asked.first`` being at the left or the top.

        Two relations may be true at once: of objects at the top left and the bottom right.
        """
        turned = self.classes[:, 0] != asked.first
        ahead = (self.centres[:, 1] - self.centres[:, 0]).gather(1, asked.vertical[:, None])[:, 0]
        return torch.where(turned, -ahead, ahead) >= APART


def draw_pairs(n: int, generator: Generator) -> Pairs:
    """``n`` pairs of different classes, uniform."""
    first = torch.randint(NUM_CLASSES, (n,), generator=generator)
    other = torch.randint(1, NUM_CLASSES, (n,), generator=generator)
    return Pairs(first, (first + other) % NUM_CLASSES, torch.randint(2, (n,), generator=generator))


def _layer(labels: Tensor, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each pixel an object covers ``(n, 1, SIZE, SIZE)``, and its colour ``(n, 3, 1, 1)``."""
    pixel = torch.arange(SIZE) + 0.5
    x, y = pixel[None, None, :] - centre[0][:, None, None], pixel[None, :, None] - centre[1][:, None, None]
    shape, colour = labels // len(COLOURS), labels % len(COLOURS)
    distance = _distances(x, y, radius[:, None, None])[shape, torch.arange(len(labels))]
    return (0.5 - distance).clamp(0, 1)[:, None], torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]


def lay_out(pairs: Pairs, generator: Generator) -> Layout:
    """Sizes and places in pixels, and the ground, within what is named; the two objects never overlap."""
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
    """Pictures ``(n, 3, SIZE, SIZE)`` float32 in [-1, 1]."""
    image = layout.ground.expand(-1, 3, SIZE, SIZE)
    for i, labels in enumerate((pairs.first, pairs.second)):
        coverage, ink = _layer(labels, layout.centres[:, i].T, layout.radii[:, i])
        image = image + coverage * (ink - image)
    return image


def _say(label: int) -> str:
    return f"a {list(COLOURS)[label % len(COLOURS)]} {SHAPES[label // len(COLOURS)]}"


def describe(pairs: Pairs, generator: Generator) -> list[str]:
    """One caption for each picture; which of the two objects is named first is drawn."""
    turned = torch.randint(2, (len(pairs.first),), generator=generator)
    captions = []
    for first, second, vertical, turn in zip(*(x.tolist() for x in (*pairs, turned)), strict=True):
        one, other = (second, first) if turn else (first, second)
        captions.append(f"{_say(one)} {RELATIONS[2 * vertical + turn]} {_say(other)}")
    return captions


def sample_related(n: int, generator: Generator) -> tuple[Tensor, list[str], Pairs]:
    """Draw ``n`` pictures ``(n, 3, SIZE, SIZE)`` in [-1, 1], a caption of each, and what they show."""
    pairs = draw_pairs(n, generator)
    return render(pairs, lay_out(pairs, generator)), describe(pairs, generator), pairs


def tokenise(captions: Sequence[str]) -> Tensor:
    """Tokens ``(n, MAX_TOKENS)`` int64 of the captions: a start, the words, and the null token as padding.

    Raises BadArgument for a word outside WORDS or too many words.
    """
    return number_words(captions, WORDS, NULL, MAX_TOKENS)
