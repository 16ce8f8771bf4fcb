"""The grid of an attention's tokens: images, videos and text in one sequence, and orders that are not proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit_rewrite.passes.analysis.dimensions import Dimensions
from dit_rewrite.passes.analysis.output_sites import find_latent
from dit_rewrite.passes.analysis.token_grid import TokenGrid, token_grid
from dit_rewrite.passes.capture import opaque_attention
from tests.helpers.tracing import WIDTH, Attention, Toy, Traced, linear, tokens, trace

Order = Callable[[Tensor], Tensor]
IMAGE, VIDEO, TEXT = (2, 3, 4, 6), (2, 3, 2, 4, 6), (2, 5, WIDTH)


def found(of: Traced) -> list[TokenGrid | None]:
    graph, captured = of.gm.graph, of.captured
    latent = find_latent(graph, captured.static | captured.conditioning)
    assert latent is not None
    dimensions = Dimensions(graph, captured.static | captured.ambient)
    return [token_grid(node, latent, dimensions) for node in graph.nodes if node.target is opaque_attention.OP]


def image(order: Order, shape: tuple[int, ...] = IMAGE) -> Traced:
    """Patches of 2 x 2 of a latent of 4 x 6, put in order, and an attention."""

    def body(m: Toy, latent: Tensor) -> Tensor:
        x = order(m.patch(latent))
        return m.head(x + m.attn(x))

    return trace(Toy(body, patch=nn.Conv2d(3, WIDTH, 2, 2), attn=Attention(), head=linear()), (tokens(0, *shape),))


def cut(x: Tensor) -> Tensor:
    """Windows of 1 x 3 tokens, as in Swin: the batch has the windows, and an attention sees one."""
    return x.unflatten(3, (2, 3)).unflatten(2, (2, 1)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


@pytest.mark.parametrize(
    ("order", "grid"),
    [
        (lambda x: x.flatten(2).transpose(1, 2), TokenGrid(0, (2, 3), 0)),
        (lambda x: x.permute(0, 2, 3, 1).flatten(0, 1), TokenGrid(0, (3,), 0)),  # each row by itself
        (lambda x: x.permute(0, 3, 2, 1).flatten(1, 2), None),  # the width before the height
        (lambda x: x.flatten(2).transpose(1, 2)[:, torch.tensor([5, 3, 1, 0, 2, 4])], None),  # shuffled
        (lambda x: x.flatten(2).transpose(1, 2).flip(1), None),
        (lambda x: x.roll(1, 3).flatten(2).transpose(1, 2), None),
        (lambda x: torch.cat([y := x.flatten(2).transpose(1, 2)[:, 2:], y[:, :2]], 1), None),
        (lambda x: torch.cat([x[:, :, 1::2], x[:, :, ::2]], 2).flatten(2).transpose(1, 2), None),  # odd rows first
    ],
    ids=["rows", "one row", "columns", "shuffled", "flipped", "rolled", "pieces", "odd and even"],
)
def test_orders_of_an_image(order: Order, grid: TokenGrid | None) -> None:
    assert found(image(order)) == [grid]


SQUARE = (2, 3, 4, 4)


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("order", "shape"),
    [
        (lambda x: rows(x + x.transpose(2, 3)), SQUARE),
        (lambda x: (x + x.transpose(2, 3)).permute(0, 2, 3, 1).flatten(0, 1), SQUARE),
        (lambda x: rows(torch.cat([x, x.transpose(2, 3)], 1).unflatten(1, (2, -1)).sum(1)), SQUARE),
        (lambda x: rows(x) + rows(x.transpose(2, 3)), IMAGE),
        (lambda x: rows(x + x.transpose(2, 3).reshape(x.shape)), IMAGE),
    ],
    ids=["sum", "one row of a sum", "side by side", "sum of tokens", "divided anew"],
)
def test_an_image_and_its_transpose_have_no_order(order: Order, shape: tuple[int, ...]) -> None:
    assert found(image(order, shape)) == [None]


def test_windows_of_an_image_are_no_grid_of_it() -> None:
    """Their tokens are a part of the width, which is no axis of the latent."""
    assert found(image(cut, (2, 3, 4, 12))) == [None]


def test_patches_by_reshaping() -> None:
    """As unpatchified in reverse: (b, c, h 2, w 2) to (b, h w, c 2 2)."""

    def body(m: Toy, latent: Tensor) -> Tensor:
        x = latent.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = m.enter(x)
        return m.head(x + m.attn(x))

    of = trace(Toy(body, enter=linear(12), attn=Attention(), head=linear()), (tokens(0, *IMAGE),))
    assert found(of) == [TokenGrid(0, (2, 3), 0)]


@pytest.mark.parametrize("joined", [True, False], ids=["all of it", "space and time in turn"])
def test_a_video(joined: bool) -> None:
    def body(m: Toy, latent: Tensor) -> Tensor:
        x = m.patch(latent).permute(0, 2, 3, 4, 1)
        if joined:
            x = x.flatten(1, 3)
            return m.head(x + m.first(x))
        x = x.flatten(0, 1).flatten(1, 2)
        x = x + m.first(x)
        x = x.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
        return m.head(x + m.second(x))

    parts = {"patch": nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2)), "first": Attention(), "second": Attention()}
    of = trace(Toy(body, head=linear(), **parts), (tokens(0, *VIDEO),))
    grids = [(2, 2, 3)] if joined else [(2, 3), (2,)]
    assert found(of) == [TokenGrid(0, grid, 0) for grid in grids]


@pytest.mark.parametrize(
    ("order", "expected"),
    [("xt", (0, 5)), ("tx", (5, 0)), ("txt", (5, 5)), ("ttx", (10, 0)), ("xx", None), ("tt", None)],
)
def test_text_in_the_sequence(order: str, expected: tuple[int, int] | None) -> None:
    """Any number of texts, before and behind; two images have no common grid, and a text has none."""

    def body(m: Toy, latent: Tensor, text: Tensor) -> Tensor:
        image = m.patch(latent).flatten(2).transpose(1, 2)
        y = torch.cat([image if part == "x" else m.enter(text) for part in order], 1)
        return m.head(y + m.attn(y)) + image.sum()

    parts = {"patch": nn.Conv2d(3, WIDTH, 2, 2), "enter": linear(), "attn": Attention(), "head": linear()}
    of = trace(Toy(body, **parts), (tokens(0, *IMAGE), tokens(1, *TEXT)))
    assert found(of) == [None if expected is None else TokenGrid(expected[0], (2, 3), expected[1])]


@pytest.mark.parametrize("start", [5, 4])
def test_a_part_that_is_written_anew(start: int) -> None:
    """As by rotary positions in place. Tokens that are written one place before their own are another order."""

    def body(m: Toy, latent: Tensor, text: Tensor) -> Tensor:
        image = m.patch(latent).flatten(2).transpose(1, 2)
        y = torch.cat([m.enter(text), image], 1)
        z = y.clone()
        z[:, start : start + 6] = 2 * y[:, 5:]
        return m.head(y + m.attn(z))

    parts = {"patch": nn.Conv2d(3, WIDTH, 2, 2), "enter": linear(), "attn": Attention(), "head": linear()}
    of = trace(Toy(body, **parts), (tokens(0, *IMAGE), tokens(1, *TEXT)))
    assert found(of) == [TokenGrid(5, (2, 3), 0) if start == 5 else None]


def test_tokens_as_a_latent_have_one_axis() -> None:
    """As FLUX gets them: nothing shows rows and columns."""
    of = trace(Toy(lambda m, x: m.head(x + m.attn(x)), attn=Attention(), head=linear()), (tokens(0, 2, 12, WIDTH),))
    assert found(of) == [TokenGrid(0, (12,), 0)]
