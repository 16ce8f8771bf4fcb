"""Two shapes in relation: pictures match their captions, and the bundled reader reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from dit_rewrite.demo.shapes import relations
from dit_rewrite.demo.shapes.data import CLASSES, COLOURS
from dit_rewrite.demo.shapes.flow_model import load_pair_reader, read_objects
from dit_rewrite.demo.shapes.relations import MAX_TOKENS, SIZE, Objects, Pairs
from dit_rewrite.errors import BadArgument

CAPTION = "a red circle left of a blue square"


def pair(first: str, second: str, vertical: int, n: int = 1) -> Pairs:
    return Pairs(*(torch.full((n,), value) for value in (CLASSES.index(first), CLASSES.index(second), vertical)))


def test_tokens_by_hand() -> None:
    """A start, the words, null tokens; capitals do not matter; the empty caption is a start alone."""
    start, null, red, circle = (relations.WORDS.index(word) for word in ("<start>", "<null>", "red", "circle"))
    tokens = relations.tokenise(["Red circle", relations.NULL_CAPTION])
    assert tokens.tolist() == [[start, red, circle, *[null] * 6], [start, *[null] * 8]]


@pytest.mark.parametrize("caption", [f"{CAPTION} of", "a pink circle", "<null>", "<start> red circle", "red circle."])
def test_too_many_words_or_an_unknown_one_are_refused(caption: str) -> None:
    assert len(CAPTION.split()) == MAX_TOKENS - 1, "the longest caption fits"
    relations.tokenise([CAPTION])
    with pytest.raises(BadArgument, match="caption=.*at most 8 of the words a, left"):
        relations.tokenise([CAPTION, caption])


def test_every_word_is_there_once_and_is_used() -> None:
    """Every word of the vocabulary occurs in the captions that the model is trained on."""
    said = relations.describe(relations.draw_pairs(500, Generator().manual_seed(1)), Generator().manual_seed(2))
    assert {word for caption in said for word in caption.split()} == set(relations.WORDS[2:])
    assert len(set(relations.WORDS)) == len(relations.WORDS)


@pytest.mark.parametrize(("vertical", "captions"), [
    (0, {CAPTION, "a blue square right of a red circle"}),
    (1, {"a red circle above a blue square", "a blue square below a red circle"}),
])  # fmt: skip
def test_either_object_is_named_first(vertical: int, captions: set[str]) -> None:
    asked = pair("red circle", "blue square", vertical, n=20)
    assert set(relations.describe(asked, Generator().manual_seed(0))) == captions


def test_pairs_are_of_two_classes() -> None:
    """Every class occurs in either place, and both arrangements are drawn."""
    pairs = relations.draw_pairs(2000, Generator().manual_seed(3))
    assert (pairs.first != pairs.second).all()
    assert [len(values.unique()) for values in pairs] == [20, 20, 2]


@pytest.mark.parametrize("vertical", [0, 1])
def test_each_object_lies_in_its_half_whole(vertical: int) -> None:
    """So they never overlap. Along the other axis, they lie anywhere."""
    layout = relations.lay_out(pair("red circle", "blue square", vertical, n=500), Generator().manual_seed(4))
    assert ((layout.radii >= 4.6) & (layout.radii <= 6.4)).all()
    slack = 1e-5
    assert (layout.centres >= layout.radii[:, :, None] - slack).all()
    assert (layout.centres <= SIZE - layout.radii[:, :, None] + slack).all()
    along, across = layout.centres[:, :, vertical], layout.centres[:, :, 1 - vertical]
    assert (along[:, 0] + layout.radii[:, 0] <= SIZE / 2 + slack).all()
    assert (along[:, 1] - layout.radii[:, 1] >= SIZE / 2 - slack).all()
    assert across.amin() < 6 and across.amax() > SIZE - 6


@pytest.mark.parametrize("vertical", [0, 1])
def test_a_picture_has_each_object_in_its_colour_and_place(vertical: int) -> None:
    """Its ink is centred on its place, and the other half does not depend on it."""
    one, other = pair("red circle", "blue square", vertical, n=50), pair("red circle", "white cross", vertical, n=50)
    layout = relations.lay_out(one, Generator().manual_seed(5))
    images, others = relations.render(one, layout), relations.render(other, layout)
    for i, colour in enumerate(("red", "blue")):
        x, y = layout.centres[:, i].long().T
        assert torch.allclose(images[torch.arange(50), :, y, x], torch.tensor(COLOURS[colour]), atol=1e-6)
    first_half, first_half_other = (x.narrow(3 - vertical, 0, SIZE // 2) for x in (images, others))
    assert torch.equal(first_half, first_half_other)
    assert all((a != b).any() for a, b in zip(images, others, strict=True))


def test_samples_repeat_with_their_seed() -> None:
    (a, said_a, pairs_a), (b, said_b, pairs_b) = (
        relations.sample_related(8, Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(a, b) and said_a == said_b
    assert all(torch.equal(x, y) for x, y in zip(pairs_a, pairs_b, strict=True))
    assert not torch.equal(a, relations.sample_related(8, Generator().manual_seed(6))[0])
    assert a.shape == (8, 3, SIZE, SIZE) and a.abs().amax() <= 1


@pytest.mark.parametrize(("circle", "square", "relations_"), [
    ((8.0, 16.0), (24.0, 16.0), {"left"}),
    ((24.0, 16.0), (8.0, 16.0), {"right"}),
    ((16.0, 8.0), (16.0, 24.0), {"above"}),
    ((16.0, 24.0), (16.0, 8.0), {"below"}),
    ((8.0, 8.0), (24.0, 24.0), {"left", "above"}),
    ((24.0, 8.0), (8.0, 24.0), {"right", "above"}),
    ((8.0, 8.0), (15.0, 15.0), set()),
])  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_which_relations_are_true(
    circle: tuple[float, float], square: tuple[float, float], relations_: set[str], turned: bool
) -> None:
    """For a circle and a square at these centres, in either order of reading."""
    classes, centres = [CLASSES.index("red circle"), CLASSES.index("blue square")], [circle, square]
    order = [1, 0] if turned else [0, 1]
    seen = Objects(torch.tensor([classes])[:, order], torch.tensor([centres])[:, order])
    asked = {
        "left": pair("red circle", "blue square", 0),
        "right": pair("blue square", "red circle", 0),
        "above": pair("red circle", "blue square", 1),
        "below": pair("blue square", "red circle", 1),
    }
    assert all(seen.have_classes(one).all() for one in asked.values())
    assert {name for name, one in asked.items() if seen.in_relation(one).all()} == relations_
    assert not seen.have_classes(pair("red circle", "blue circle", 0)).any()
    assert not seen.have_classes(pair("red circle", "red circle", 0)).any()


def test_the_bundled_reader_reads_real_images() -> None:
    """At least 99 % of images outside the training set are read entirely right; the opposite relation is never read."""
    pytest.importorskip("safetensors")
    images, _, pairs = relations.sample_related(2000, Generator().manual_seed(987654))
    seen = read_objects(load_pair_reader(), images)
    assert (seen.have_classes(pairs) & seen.in_relation(pairs)).float().mean() >= 0.99
    assert seen.in_relation(Pairs(pairs.second, pairs.first, pairs.vertical)).float().mean() < 0.01
