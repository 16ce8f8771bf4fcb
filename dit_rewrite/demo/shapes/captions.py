"""A procedural data set with captions: an image of a shape, and a sentence about its colour, size and position.

The shapes are those of `shapes.data`. A caption always names the shape and the colour; some templates leave out the
size or the position, which may then have any value. Images are generated and not stored: see data.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from dit_rewrite.demo.shapes.data import COLOURS, SHAPES, SIZE, _distances
from dit_rewrite.errors import BadArgument

SIZES = (("small", "little"), ("large", "big"))  # synonyms for each size
RADII = ((2.7, 3.4), (4.7, 5.4))  # in pixels
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
JITTER = 0.15  # maximum distance of a shape from its position, as a fraction of the free space
TEMPLATES = (
    "{colour} {shape}",
    "a {colour} {shape} on a dark ground",
    "a picture of a {size} {colour} {shape}",
    "a {colour} {shape} {place}",
    "a {size} {colour} {shape} {place}",
    "a {size} {colour} {shape} {place} of the picture",
    "{place} of the image is a {size} {colour} {shape}",
    "the {shape} {place} is {size} and it is {colour}",
    "there is a {size} {shape} {place} of the picture and it is {colour}",
)
PAD, START = "<pad>", "<start>"
WORDS = (
    *(PAD, START, "a", "the", "at", "in", "of", "on", "is", "it", "and", "there", "picture", "image", "dark", "ground"),
    *(word for words in SIZES for word in words),
    *COLOURS,
    *SHAPES,
    *("top", "bottom", "left", "right", "middle"),
)
MAX_TOKENS = 24
NULL_CAPTION = ""  # for classifier-free guidance: a start token and no words


class Scenes(NamedTuple):
    """The content of n images: indices (n,) int64 into SHAPES, COLOURS, SIZES, ROWS and COLUMNS."""

    shape: Tensor
    colour: Tensor
    size: Tensor
    row: Tensor
    column: Tensor

    @property
    def labels(self) -> Tensor:
        """The classes (n,) of the classifier: shape and colour, as in data.CLASSES."""
        return self.shape * len(COLOURS) + self.colour


def draw_scenes(n: int, generator: Generator) -> Scenes:
    """Draw `n` scenes; all fields are independent and uniform."""
    counts = (len(SHAPES), len(COLOURS), len(SIZES), len(ROWS), len(COLUMNS))
    return Scenes(*(torch.randint(count, (n,), generator=generator) for count in counts))


def centres(scenes: Scenes, radius: Tensor) -> Tensor:
    """Return the centres (2, n), x and y in pixels, of the named positions for shapes of `radius` (n,)."""
    return radius + (SIZE - 2 * radius) * torch.stack([scenes.column, scenes.row]) / 2


def render(scenes: Scenes, generator: Generator) -> Tensor:
    """Return images (n, 3, SIZE, SIZE) float32 in [-1, 1]. Radius, position and background vary within the scene."""
    n = len(scenes.shape)
    low, high = torch.tensor(RADII)[scenes.size].unbind(1)
    radius = low + (high - low) * torch.rand(n, generator=generator)
    jitter = JITTER * (2 * torch.rand(2, n, generator=generator) - 1) * (SIZE - 2 * radius)
    centre = (centres(scenes, radius) + jitter).clamp(radius, SIZE - radius)[:, :, None, None]
    pixel = torch.arange(SIZE) + 0.5
    x, y = pixel[None, None, :] - centre[0], pixel[None, :, None] - centre[1]
    distance = _distances(x, y, radius[:, None, None])[scenes.shape, torch.arange(n)]
    coverage = (0.5 - distance).clamp(0, 1)[:, None]
    ink = torch.tensor(list(COLOURS.values()))[scenes.colour][:, :, None, None]
    ground = -0.85 + 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    return ground + coverage * (ink - ground)


def name_place(row: int, column: int) -> str:
    """Return a position in words: "at the top left", "at the right", "in the middle"."""
    sides = [word for word in (ROWS[row], COLUMNS[column]) if word != "middle"]
    return f"at the {' '.join(sides)}" if sides else "in the middle"


def describe(scenes: Scenes, generator: Generator, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Return a caption for each scene, with a random template and a random synonym for the size."""
    n = len(scenes.shape)
    template = torch.randint(len(templates), (n,), generator=generator)
    synonym = torch.randint(2, (n,), generator=generator)
    colours = tuple(COLOURS)
    return [
        templates[t].format(shape=SHAPES[s], colour=colours[c], size=SIZES[z][w], place=name_place(row, column))
        for t, w, s, c, z, row, column in zip(*(x.tolist() for x in (template, synonym, *scenes)), strict=True)
    ]


def sample_captioned(n: int, generator: Generator) -> tuple[Tensor, list[str], Scenes]:
    """Draw `n` images (n, 3, SIZE, SIZE) in [-1, 1], with their captions and scenes."""
    scenes = draw_scenes(n, generator)
    return render(scenes, generator), describe(scenes, generator), scenes


def tokenise(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the tokens (n, MAX_TOKENS) int64 of captions, and their bool mask, which is False for padding.

    Each row has a start token, the words, and padding. Raises BadArgument for a word outside WORDS or too many words.
    """
    tokens = number_words(captions, WORDS, PAD, MAX_TOKENS)
    return tokens, tokens != WORDS.index(PAD)


def number_words(captions: Sequence[str], vocabulary: Sequence[str], padding: str, length: int) -> Tensor:
    """Return the tokens (n, length) int64 of captions: a start token, the words, and padding.

    The first two entries of `vocabulary` are the start and the padding token, in any order; captions may not contain
    them. Raises BadArgument for a word outside the vocabulary or too many words.
    """
    number = {word: i for i, word in enumerate(vocabulary)}
    tokens = torch.full((len(captions), length), number[padding])
    for row, caption in zip(tokens, captions, strict=True):
        words = caption.lower().split()
        if len(words) >= length or not set(words) <= set(vocabulary[2:]):
            allowed = f"at most {length - 1} of the words {', '.join(vocabulary[2:])}"
            raise BadArgument("tokenise", "caption", caption, allowed)
        row[: len(words) + 1] = torch.tensor([number[word] for word in (START, *words)])
    return tokens
