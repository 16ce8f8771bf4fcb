"""Which keys belong to the condition: by the inputs of the parts of a cat, in joint attention and in one sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dit_rewrite.passes.analysis.condition_keys import condition_keys
from dit_rewrite.passes.capture import opaque_attention
from tests.helpers.streams import traced
from tests.helpers.tracing import Toy, Traced, heads, linear, merged, tokens, trace

IMAGE, TEXT = (2, 4, 8), (2, 3, 8)


def cores(of: Traced) -> list[fx.Node]:
    return [node for node in of.gm.graph.nodes if node.target is opaque_attention.OP]


def positions(of: Traced, shape: tuple[int, ...]) -> set[int]:
    """The positions of the inputs of a shape."""
    inputs = enumerate(of.gm.graph.find_nodes(op="placeholder"))
    return {i for i, node in inputs if tuple(node.meta["val"].shape) == shape}


def found(of: Traced, given: set[int]) -> list[tuple[int, int] | None]:
    return [condition_keys(core, of.captured.static, given) for core in cores(of)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("joint", [(4, 3)] * 2),  # the text comes last, in each layer
        ("flux", [(4, 3)] * 2 + [(0, 3)] * 3),  # and first in the single blocks, whose cat lies before all of them
        ("single", [None] * 3),
        ("latte", [None] * 4),
    ],
)
def test_toys(name: str, expected: list[tuple[int, int] | None]) -> None:
    of = traced(name)
    assert found(of, positions(of, TEXT)) == expected


def test_a_text_that_moves_is_no_condition() -> None:
    """Without a known conditioning, and where the conditioning is the image, nothing is proven of the text."""
    of = traced("joint")
    assert found(of, set()) == [None] * 2
    assert found(of, positions(of, IMAGE)) == [(0, 4)] * 2


def one_sequence(*order: str, mixed: bool = False, only_keys: bool = False) -> Traced:
    """Attention over parts in this order: the image, the text, a token of the time, and the image's own condition."""

    def body(m: Toy, x: Tensor, text: Tensor, time: Tensor, depth: Tensor) -> Tensor:
        text = text + x.mean(1, keepdim=True) if mixed else text
        parts = {"image": m.a(x), "text": m.b(text) * time[:, None, None], "depth": m.b(depth)}
        parts["time"] = time[:, None, None].expand(-1, 1, 8)
        y = torch.cat([parts[part] for part in order], 1)
        v = torch.cat([parts[part] for part in reversed(order)], 1) if only_keys else y
        return y + m.c(merged(F.scaled_dot_product_attention(heads(y), heads(m.a(y)), heads(m.b(v)))))

    shapes = (IMAGE, TEXT, (2,), (2, 5, 8))
    return trace(Toy(body, a=linear(), b=linear(), c=linear()), tuple(tokens(i, *s) for i, s in enumerate(shapes)))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (("text", "time", "image"), (0, 3)),  # the time's token depends on no conditioning
        (("depth", "text", "image"), (0, 8)),  # neighbours are one run
        (("text", "image", "depth"), (7, 5)),  # the longest of two runs
        (("image", "time"), None),
        (("text", "depth"), None),  # there is no image
    ],
)
def test_one_sequence(order: tuple[str, ...], expected: tuple[int, int] | None) -> None:
    of = one_sequence(*order)
    assert found(of, positions(of, TEXT) | positions(of, (2, 5, 8))) == [expected]


def test_a_text_that_reads_the_image_is_no_condition() -> None:
    of = one_sequence("text", "image", mixed=True)
    assert found(of, positions(of, TEXT)) == [None]


def test_keys_and_values_must_agree() -> None:
    of = one_sequence("text", "image", only_keys=True)
    assert found(of, positions(of, TEXT)) == [None]
