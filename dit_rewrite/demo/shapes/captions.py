"""A procedural data set with captions: one shape of a colour, a size and a place, and a sentence that says so.

The shapes are `shapes.data`'s, drawn at a named size and place. A caption always names the shape and the
colour; some templates leave the size or the place open, and then it may be any. Nothing is stored: see data.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from dit_rewrite.demo.shapes.data import COLOURS, SHAPES, SIZE, _distances
from dit_rewrite.errors import BadArgument

SIZES = (("small", "little"), ("large", "big"))  # the words of each
RADII = ((2.7, 3.4), (4.7, 5.4))  # in pixels
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
SLACK = 0.15  # how far from its place a shape may be, as a fraction of the room that it has
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
NULL_CAPTION = ""  # for classifier-free guidance: a start and no word


class Scenes(NamedTuple):
    """What ``n`` pictures show: indices ``(n,)`` int64 into SHAPES, COLOURS, SIZES, ROWS and COLUMNS."""

    shape: Tensor
    colour: Tensor
    size: Tensor
    row: Tensor
    column: Tensor

    @property
    def labels(self) -> Tensor:
        """The classes ``(n,)`` that the classifier reads: shape and colour, as in data.CLASSES."""
        return self.shape * len(COLOURS) + self.colour


def draw_scenes(n: int, generator: Generator) -> Scenes:
    """``n`` scenes, everything independent and uniform."""
    counts = (len(SHAPES), len(COLOURS), len(SIZES), len(ROWS), len(COLUMNS))
    return Scenes(*(torch.randint(count, (n,), generator=generator) for count in counts))


def centres(scenes: Scenes, radius: Tensor) -> Tensor:
    """The named places ``(2, n)``, x and y in pixels, of shapes that have ``radius`` ``(n,)``."""
    return radius + (SIZE - 2 * radius) * torch.stack([scenes.column, scenes.row]) / 2


def render(scenes: Scenes, generator: Generator) -> Tensor:
    """Pictures ``(n, 3, SIZE, SIZE)`` float32 in [-1, 1]; radius, place and ground vary within what is named."""
    n = len(scenes.shape)
    low, high = torch.tensor(RADII)[scenes.size].unbind(1)
    radius = low + (high - low) * torch.rand(n, generator=generator)
    astray = SLACK * (2 * torch.rand(2, n, generator=generator) - 1) * (SIZE - 2 * radius)
    centre = (centres(scenes, radius) + astray).clamp(radius, SIZE - radius)[:, :, None, None]
    pixel = torch.arange(SIZE) + 0.5
    x, y = pixel[None, None, :] - centre[0], pixel[None, :, None] - centre[1]
    distance = _distances(x, y, radius[:, None, None])[scenes.shape, torch.arange(n)]
    coverage = (0.5 - distance).clamp(0, 1)[:, None]
    ink = torch.tensor(list(COLOURS.values()))[scenes.colour][:, :, None, None]
    ground = -0.85 + 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    return ground + coverage * (ink - ground)


def name_place(row: int, column: int) -> str:
    """A place in words: "at the top left", "at the right", "in the middle"."""
    sides = [word for word in (ROWS[row], COLUMNS[column]) if word != "middle"]
    return f"at the {' '.join(sides)}" if sides else "in the middle"


def describe(scenes: Scenes, generator: Generator, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """One caption for each scene; the template and the word for the size are drawn."""
    n = len(scenes.shape)
    template = torch.randint(len(templates), (n,), generator=generator)
    synonym = torch.randint(2, (n,), generator=generator)
    colours = tuple(COLOURS)
    return [
        templates[t].format(shape=SHAPES[s], colour=colours[c], size=SIZES[z][w], place=name_place(row, column))
        for t, w, s, c, z, row, column in zip(*(x.tolist() for x in (template, synonym, *scenes)), strict=True)
    ]


def sample_captioned(n: int, generator: Generator) -> tuple[Tensor, list[str], Scenes]:
    """Draw ``n`` pictures ``(n, 3, SIZE, SIZE)`` in [-1, 1], a caption of each, and what they show."""
    scenes = draw_scenes(n, generator)
    return render(scenes, generator), describe(scenes, generator), scenes


def tokenise(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens ``(n, MAX_TOKENS)`` int64 of the captions, and their mask: bool, True where there is a token.

    Each row is a start, the words, and padding. Raises BadArgument for a word outside WORDS or too many words.
    """
    tokens = number_words(captions, WORDS, PAD, MAX_TOKENS)
    return tokens, tokens != WORDS.index(PAD)


def number_words(captions: Sequence[str], vocabulary: Sequence[str], padding: str, length: int) -> Tensor:
    """Tokens ``(n, length)`` int64 of the captions: a start, the words, and padding.

    The vocabulary begins with the start and the padding, in either order, which no caption may use. Raises BadArgument
    for a word outside of it or too many words.
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
