"""Boundaries of the residual stream, and the base of each stream, on toys and on hand-written graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.analysis.spans import Stream, find_spans
from dit_rewrite.passes.rewrite.printing import op_counts
from tests.helpers.streams import SHAPES, flux, stream_of, traced, with_spans
from tests.helpers.tracing import made_by, tokens, trace

aten = torch.ops.aten


def shapes(nodes: Sequence[fx.Node]) -> list[tuple[int, ...]]:
    return [tuple(node.meta["val"].shape) for node in nodes]


def spans_of(name: str) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """Return every span of a toy, with the shapes of its values."""
    stream = stream_of(name)
    count = stream.found.num_layers
    every = [(i, j) for i in range(count) for j in range(i + 1, count + 1)]
    found = {blocks: stream.pairs(*blocks) for blocks in every}
    return {blocks: sorted(shapes([value for value, _ in pairs])) for blocks, pairs in found.items() if pairs}


IMAGE, WORDS, BOTH = (2, 4, 8), (2, 3, 8), (2, 7, 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single", dict.fromkeys([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], [IMAGE])),
        ("joint", dict.fromkeys([(0, 1), (0, 2), (1, 2)], [WORDS, IMAGE])),
        ("dropped", {(0, 1): [WORDS, IMAGE], (0, 2): [IMAGE], (1, 2): [IMAGE]}),
        # text and image are joined before block 2, and the image is sliced out after block 4
        (
            "flux",
            {
                **dict.fromkeys([(0, 1), (0, 2), (1, 2)], [WORDS, IMAGE]),
                **dict.fromkeys([(0, 5), (1, 5), (2, 5)], [IMAGE]),
                **dict.fromkeys([(2, 3), (2, 4), (3, 4), (3, 5), (4, 5)], [BOTH]),
            },
        ),
        ("post-norm", dict.fromkeys([(0, 1), (1, 2), (2, 3)], [IMAGE])),  # from one norm to the next
        ("skipping", {(0, 1): [IMAGE], (0, 2): [IMAGE, IMAGE], (1, 2): [IMAGE], (2, 3): [(8, 8)]}),
        ("added skip", {**dict.fromkeys([(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)], [IMAGE]), (0, 2): [IMAGE, IMAGE]}),
    ],
)
def test_spans(name: str, expected: dict[tuple[int, int], list[tuple[int, ...]]]) -> None:
    """The spans of a toy and the shapes of their values."""
    assert spans_of(name) == expected


def test_splits_are_slices() -> None:
    """The result is the same whether the image is sliced or split out of the sequence."""
    assert spans_of("flux split") == spans_of("flux")


def test_a_stream_that_is_reshaped_between_blocks() -> None:
    """With alternating blocks over space and time, every span has a base of the stream's shape at one of its ends."""
    found = spans_of("latte")
    assert set(found) == {(i, j) for i in range(4) for j in range(i + 1, 5)}
    assert all(len(values) == 1 and torch.Size(values[0]).numel() == 2 * 3 * 4 * 8 for values in found.values())


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_bases_are_alike(name: str) -> None:
    """A value and its base have one shape and dtype; the base comes first, and both are computed from the stream."""
    stream = stream_of(name)
    for first, end in spans_of(name):
        for value, base in stream.pairs(first, end) or ():
            assert shapes([value]) == shapes([base])
            assert value.meta["val"].dtype == base.meta["val"].dtype
            assert stream.position[base] < stream.position[value]
            assert {value, base} <= stream.moving.keys()


@pytest.mark.parametrize(
    ("name", "alive"),
    [
        ("single", [1, 1, 1, 1]),
        ("joint", [2, 2, 2]),
        ("dropped", [2, 2, 1]),
        ("flux", [2, 2, 2, 1, 1, 1]),
        ("latte", [1, 1, 1, 1, 1]),
        ("post-norm", [1, 1, 1, 1]),
        ("skipping", [1, 1, 2, 1]),
        ("added skip", [1, 1, 2, 1]),
    ],
)
def test_boundaries(name: str, alive: list[int]) -> None:
    """One boundary before the first block and one after each. Only streams are live there; a skip is one more."""
    boundaries = stream_of(name).boundaries
    assert [len(boundary.streams) for boundary in boundaries] == alive
    positions = [boundary.position for boundary in boundaries]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("name", SHAPES)
def test_each_block_lies_between_its_boundaries(name: str) -> None:
    """Every contraction of a branch is between the boundaries of its block."""
    stream = stream_of(name)
    ends = [boundary.position for boundary in stream.boundaries]
    for site in stream.found.sites:
        for value in site.values:
            position = stream.position[stream.nodes[value]]
            assert ends[site.layer] < position <= ends[site.layer + 1]


def test_what_moves() -> None:
    """The moving nodes are the inputs of the first block and all nodes computed from them; no weight, no modulation."""
    stream = stream_of("single")
    assert [made_by(root) for root in stream.roots] == ["addmm"]
    assert stream.moving.keys().isdisjoint(traced("single").captured.placeholders)
    signals = [node for node in traced("single").gm.graph.nodes if made_by(node) == "silu"]
    assert len(signals) == 2 * 3, "one and a view of it in each block"
    assert stream.moving.keys().isdisjoint(signals)
    assert [root.name for root in stream_of("post-norm").roots] == ["inputs_0"]


def test_a_span_takes_all_that_lies_in_it() -> None:
    """If the last two of three blocks are reused, the first block, one sum and the head remain."""
    rewritten = with_spans(traced("single"), [(1, 3)], branches=False)
    (site,) = rewritten.sites
    assert (site.span, site.layer, str(site.kind), str(site.part)) == ((1, 3), 1, "span", "span")
    assert site.name == "blocks.1..blocks.2"
    counts = op_counts(rewritten.variant((True,)).gm)
    assert counts["dit_rewrite.attention"] == 1
    assert counts["aten.addmm"] == 1 + 7 + 1  # enter, the first block with its modulation, the head
    assert rewritten.variant((True,)).cached == ((0, 0),)


def test_reusing_all_blocks_of_flux() -> None:
    """The embedding of the image, its change and the head remain; nothing of the text."""
    rewritten = with_spans(traced("flux"), [(0, 5)], branches=False)
    variant = rewritten.variant((True,))
    counts = op_counts(variant.gm)
    assert counts["dit_rewrite.attention"] == counts["aten.native_layer_norm"] == 0
    assert counts["aten.addmm"] + counts["aten.bmm"] == 2
    assert counts["aten.add"] <= 2, "the change, and possibly the head's bias"
    names = [placeholder.name for placeholder in rewritten.traced.captured.placeholders]
    assert not any("text" in names[i] for i in variant.inputs)


def test_names_and_order() -> None:
    """The name of one block, or of the first and last of several; shorter spans first."""
    found, refused = find_spans(stream_of("single"), dict.fromkeys([(0, 3), (2, 3), (0, 2)], range(3)))
    assert [site.name for site in found] == ["blocks.2", "blocks.0..blocks.1", "blocks.0..blocks.2"]
    assert [site.span for site in found] == [(2, 3), (0, 2), (0, 3)]
    assert refused == []


@pytest.mark.parametrize(
    ("name", "blocks", "path"),
    [
        ("post-norm", (1, 3), "blocks.1..blocks.2"),
        ("post-norm", (0, 3), "blocks.0..blocks.2"),
        ("skipping", (0, 3), "blocks.0..blocks.2"),
        ("flux", (0, 3), "blocks.0..singles.0"),
    ],
)
def test_no_counterpart(name: str, blocks: tuple[int, int], path: str) -> None:
    """A norm, projection or cat in between has no base: the span is refused with its name."""
    found, refused = find_spans(stream_of(name), {blocks: range(*blocks)})
    assert found == []
    assert [(refusal.path, refusal.reason) for refusal in refused] == [(path, RefusalReason.NO_COUNTERPART)]


def test_spans_within_one_another() -> None:
    """A block is inside the stack, both have the same value, and each branch is inside its block."""
    rewritten = with_spans(traced("single"), [(1, 2), (1, 3), (2, 3)])
    names = [site.name for site in rewritten.sites]
    parents = {names[i]: None if p is None else names[p] for i, p in enumerate(rewritten.guarded.parents)}
    assert parents == {
        "blocks.0.attn": None,
        "blocks.0.ff": None,
        "blocks.1.attn": "blocks.1",
        "blocks.1.ff": "blocks.1",
        "blocks.2.attn": "blocks.2",
        "blocks.2.ff": "blocks.2",
        "blocks.1": "blocks.1..blocks.2",
        "blocks.2": "blocks.1..blocks.2",
        "blocks.1..blocks.2": None,
    }
    stack, last = (next(site for site in rewritten.sites if site.span == span) for span in ((1, 3), (2, 3)))
    assert stack.values == last.values
    assert stack.bases != last.bases


@pytest.mark.parametrize("formats", [(None,), ("int8", None, "fp8", "bf16")], ids=["as they are", "converted"])
@pytest.mark.parametrize("name", SHAPES)
def test_random_tables(name: str, formats: tuple[str | None, ...]) -> None:
    """Nested spans and branches, reused at random, equal the oracle bit for bit."""
    every = sorted(spans_of(name), key=lambda blocks: (blocks[1] - blocks[0], blocks))
    chosen: list[tuple[int, int]] = []
    for first, end in reversed(every):
        if not any(a < first < b < end or first < a < end < b for a, b in chosen):
            chosen.append((first, end))
    rewritten = with_spans(traced(name), chosen, formats=formats)
    if formats == (None,):
        rewritten.check_reuse_0()
    rewritten.check(rewritten.random_table(0))


# --- by hand ----------------------------------------------------------------------------------------------------------


class Graph:
    """Builds a graph node by node. Tensors have shapes and no data."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = op(*values[0], **values[1])
        return node

    def block(self, x: fx.Node, weight: fx.Node, path: str) -> fx.Node:
        """Add a residual branch of one product."""
        product = self(aten.mm.default, x, weight)
        product.meta["nn_module_stack"] = {"": (f"L['self'].{path}.linear", object)}
        return self(aten.add.Tensor, x, product)

    def stream(self, *outputs: fx.Node) -> Stream:
        self.graph.output(tuple(outputs))
        gm = fx.GraphModule({}, self.graph)
        return Stream(gm.graph, find_sites(gm, frozenset({1})))


def built() -> tuple[Graph, fx.Node, fx.Node]:
    g = Graph()
    return g, g.input("x", 4, 4), g.input("weight", 4, 4)


def test_two_blocks_by_hand() -> None:
    """x + x W, twice: three boundaries, and the base of each span is the sum before it."""
    g, x, weight = built()
    one = g.block(x, weight, "blocks.0")
    two = g.block(one, weight, "blocks.1")
    stream = g.stream(two)
    assert [boundary.streams for boundary in stream.boundaries] == [(x,), (one,), (two,)]
    assert stream.pairs(0, 1) == [(one, x)]
    assert stream.pairs(1, 2) == [(two, one)]
    assert stream.pairs(0, 2) == [(two, x)]
    assert stream.walk(two, [x].__contains__) == [two, one, x]


def test_a_cast_between_blocks() -> None:
    """If the stream is cast between blocks, the sum before the cast is the value."""
    g, x, weight = built()
    one = g.block(x, weight, "blocks.0")
    cast = g(aten._to_copy.default, one, dtype=torch.float64)
    wide = g(aten._to_copy.default, weight, dtype=torch.float64)
    two = g.block(cast, wide, "blocks.1")
    stream = g.stream(two)
    assert stream.pairs(0, 1) == [(one, x)]
    assert stream.pairs(1, 2) == [(two, cast)]
    assert stream.pairs(0, 2) is None


def test_a_gain_between_blocks() -> None:
    """A stream that is scaled by a weight has no base."""
    g, x, weight = built()
    one = g.block(x, weight, "blocks.0")
    scaled = g(aten.mul.Tensor, one, weight)
    two = g.block(scaled, weight, "blocks.1")
    stream = g.stream(two)
    assert stream.pairs(0, 2) is None


def test_a_position_added_between_blocks() -> None:
    """A tensor that does not move may be added to the stream; it is part of the change."""
    g, x, weight = built()
    one = g.block(x, weight, "blocks.0")
    placed = g(aten.add.Tensor, one, weight)
    two = g.block(placed, weight, "blocks.1")
    assert g.stream(two).pairs(0, 2) == [(two, x)]


@pytest.mark.parametrize(
    ("start", "end", "same"),
    [(2, 6, True), (2, 9223372036854775807, True), (0, 4, False), (1, 5, False), (1, 6, False), (2, 5, False)],
)
def test_the_part_of_a_cat(start: int, end: int, same: bool) -> None:
    """A slice of a cat is the operand at this place."""
    g, x, weight = built()
    text = g.input("text", 2, 4)
    one = g.block(x, weight, "blocks.0")
    words = g(aten.add.Tensor, text, g(aten.mm.default, text, weight))
    words.args[1].meta["nn_module_stack"] = {"": ("L['self'].blocks.0.text", object)}  # type: ignore[union-attr]
    joined = g(aten.cat.default, [words, one])
    two = g.block(joined, weight, "blocks.1")
    image = g(aten.slice.Tensor, two, 0, start, end)
    stream = g.stream(image)
    assert stream.pairs(0, 2) == ([(image, x)] if same else None)
    way = stream.walk(image, [x, text].__contains__)
    assert way == ([image, two, joined, one, x] if same else None)


@pytest.mark.parametrize("dim", [0, -2, 1])
def test_along_another_dimension(dim: int) -> None:
    """Slices along another dimension do not separate the operands of a cat; dim -2 of 2 is dim 0."""
    g, x, weight = built()
    one = g.block(x, weight, "blocks.0")
    joined = g(aten.cat.default, [one, g(aten.neg.default, one)], dim)
    image = g(aten.slice.Tensor, joined, 0, 0, 4)
    stream = g.stream(image)
    way = stream.walk(image, [x].__contains__)
    assert way == (None if dim == 1 else [image, joined, one, x])


def test_every_second_token() -> None:
    """A slice with a step is not an operand of a cat."""
    g, x, weight = built()
    one = g.block(x, weight, "blocks.0")
    joined = g(aten.cat.default, [one, one])
    image = g(aten.slice.Tensor, joined, 0, 0, 8, 2)
    assert g.stream(image).walk(image, [x].__contains__) is None


def test_a_graph_without_sums() -> None:
    """A graph without sums has no stream, boundary or span."""
    g, x, weight = built()
    stream = g.stream(g(aten.mm.default, x, weight))
    assert (stream.boundaries, stream.roots, list(stream.moving)) == ((), [], [])


def test_dynamic_sizes() -> None:
    """Boundaries, pairs and results are the same if the number of tokens is symbolic."""
    calls = [(tokens(i, 2, 4, 8), tokens(9 + i, 2, 3, 8)) for i in range(3)]
    graph = trace(flux(doubles=1, singles=1), *calls, dynamic=True)
    stream = Stream(graph.gm.graph, graph.sites())
    assert [len(stream.pairs(*blocks) or ()) for blocks in ((0, 1), (0, 2), (1, 2))] == [2, 1, 1]
    rewritten = with_spans(graph, [(0, 1), (0, 2), (1, 2)], formats=(None, "int8"))
    rewritten.check(rewritten.random_table(3))
