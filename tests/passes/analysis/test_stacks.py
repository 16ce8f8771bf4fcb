"""Stacks of toys: with refiners, pads and cats, control blocks, and norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.probes import Probes
from dit_rewrite.passes.analysis.spans import Stream
from dit_rewrite.passes.analysis.stacks import Stacks
from dit_rewrite.passes.rewrite.printing import op_counts
from tests.helpers.streams import Joint, Plain, Single, flux, joint, post_norm, single, skipping, with_spans
from tests.helpers.toys import STEPS
from tests.helpers.tracing import WIDTH, Toy, Traced, linear, tokens, trace

IMAGE, TEXT = (2, 4, WIDTH), (2, 3, WIDTH)


def plain(count: int) -> nn.ModuleList:
    return nn.ModuleList(Plain() for _ in range(count))


def refined() -> Toy:
    """Image and text have a refiner each, are padded to one sequence, and pass the main blocks together."""

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        x, text = m.enter(x), m.text_enter(text)
        for block in m.image_refiner:
            x = block(x)
        for block in m.text_refiner:
            text = block(text)
        x = torch.cat([F.pad(x, (0, 0, 0, 1)), text], dim=1)
        for block in m.layers:
            x = block(x)
        return m.head(x)[:, :4]

    parts = {"image_refiner": plain(2), "text_refiner": plain(1), "layers": plain(3)}
    return Toy(body, enter=linear(), text_enter=linear(), head=linear(), **parts)


def context() -> Toy:
    """A refined text is the context of joint blocks, half of whose channels are new in each."""

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        x = m.enter(x)
        for block in m.refiner:
            text = block(text)
        for block, new in zip(m.blocks, m.news, strict=True):
            text = torch.cat([text[:, :, : WIDTH // 2], new(text)[:, :, WIDTH // 2 :]], dim=-1)
            x, text = block(x, text)
        x = torch.cat([text, x], dim=1)
        for block in m.singles:
            x = block(x)
        return m.head(x[:, 3:])

    blocks, singles = nn.ModuleList([Joint(), Joint()]), nn.ModuleList([Single(), Single()])
    news = nn.ModuleList([linear(), linear()])
    return Toy(body, enter=linear(), refiner=plain(2), blocks=blocks, news=news, singles=singles, head=linear())


def control(scaled: bool) -> Toy:
    """A control block runs before each main block, and its stream is added to the main stream afterwards."""

    def body(m: Toy, x: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
        x, c = m.enter(x), m.hint(hint)
        for i, block in enumerate(m.blocks):
            if i < 2:
                c = m.control[i](c)
            x = block(x)
            if i < 2:
                x = x + (m.leave(c) if scaled else c)
        return m.head(x), m.head(c)

    return Toy(body, enter=linear(), hint=linear(), leave=linear(), control=plain(2), blocks=plain(3), head=linear())


def between(change: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Callable[[], Toy]:
    """Two of three blocks are between a change of the stream and its inverse."""

    def body(m: Toy, x: Tensor) -> Tensor:
        x = m.blocks[0](m.enter(x))
        x = back(m.blocks[2](m.blocks[1](change(x))))
        return m.head(m.norm(x))

    return lambda: Toy(body, enter=linear(), blocks=plain(3), norm=nn.LayerNorm(WIDTH), head=linear())


def masked() -> Toy:
    """Padding is set to zero after each block."""

    def body(m: Toy, x: Tensor, mask: Tensor) -> Tensor:
        x = m.enter(x)
        for block in m.blocks:
            x = block(x).masked_fill(mask > 0, 0.0)
            x = torch.where(mask > 1, 0.0, x)
        return m.head(x)

    return Toy(body, enter=linear(), blocks=plain(3), head=linear())


def equal() -> Toy:
    """As FLUX, but text and image have equally many tokens and are separated by a chunk."""

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        x, text = m.enter(x), m.text_enter(text)
        for block in m.blocks:
            x, text = block(x, text)
        x = torch.cat([text, x], dim=1)
        for block in m.singles:
            x = block(x)
        return m.head(x.chunk(2, dim=1)[1])

    blocks, singles = nn.ModuleList([Joint(), Joint()]), nn.ModuleList([Single()])
    return Toy(body, enter=linear(), text_enter=linear(), blocks=blocks, singles=singles, head=linear())


def embedder() -> Toy:
    """A sum outside of any block before and after the stack."""

    def body(m: Toy, x: Tensor) -> Tensor:
        x = m.norm(x + m.before(x))
        for block in m.blocks:
            x = block(x)
        x = m.head(m.norm(x))
        return x + m.behind(x)

    parts = {name: linear() for name in ("before", "behind", "head")}
    return Toy(body, blocks=plain(2), norm=nn.LayerNorm(WIDTH), **parts)


def skipped() -> Toy:
    """The input of the first block is added after the last one, in a sum whose branch contains all blocks."""

    def body(m: Toy, x: Tensor) -> Tensor:
        first = x = m.enter(x)
        for block in m.blocks:
            x = block(x)
        return m.head(x + first)

    return Toy(body, enter=linear(), blocks=plain(3), head=linear())


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 2, 1))


def permuted(x: Tensor) -> Tensor:
    return x[:, torch.tensor([2, 0, 3, 1])]


TOYS: dict[str, tuple[Callable[[], Toy], tuple[tuple[int, ...], ...]]] = {
    "single": (single, (IMAGE, (2, 1, WIDTH))),
    "joint": (joint, (IMAGE, TEXT)),
    "flux": (flux, (IMAGE, TEXT)),
    "refined": (refined, (IMAGE, TEXT)),
    "context": (context, (IMAGE, TEXT)),
    "control": (lambda: control(scaled=True), (IMAGE, IMAGE)),
    "added control": (lambda: control(scaled=False), (IMAGE, IMAGE)),
    "padded": (between(padded, lambda x: x[:, 2:6]), (IMAGE,)),
    "cropped": (between(padded, lambda x: x[:, 1:5]), (IMAGE,)),
    "permuted": (between(permuted, lambda x: x), (IMAGE,)),
    "masked": (masked, (IMAGE, (2, 4, 1))),
    "equal": (equal, (IMAGE, IMAGE)),
    "embedder": (embedder, (IMAGE,)),
    "skipped": (skipped, (IMAGE,)),
    "post-norm": (post_norm, (IMAGE,)),
    "skipping": (skipping, (IMAGE,)),
}


@cache
def traced(name: str) -> Traced:
    build, shapes = TOYS[name]
    calls = [tuple(tokens(10 * step + i, *shape) for i, shape in enumerate(shapes)) for step in range(STEPS)]
    return trace(build(), *calls)


def stacks_of(name: str) -> Stacks:
    return Stacks(Stream(traced(name).gm.graph, traced(name).sites()))


def path(stacks: Stacks, layers: tuple[int, ...]) -> list[str]:
    """Return the paths of the blocks."""
    blocks = {site.layer: site.block for site in stacks.stream.found.sites}
    return [blocks[layer] for layer in layers]


def blocks(container: str, *numbers: int) -> list[str]:
    return [f"{container}.{number}" for number in numbers]


@pytest.mark.parametrize(
    ("name", "main"),
    [
        ("single", blocks("blocks", 0, 1, 2)),
        ("joint", blocks("blocks", 0, 1)),
        ("flux", [*blocks("blocks", 0, 1), *blocks("singles", 0, 1, 2)]),
        ("refined", blocks("layers", 0, 1, 2)),
        ("context", [*blocks("blocks", 0, 1), *blocks("singles", 0, 1)]),
        ("control", blocks("blocks", 0, 1, 2)),
        ("added control", blocks("blocks", 0, 1, 2)),
        ("padded", blocks("blocks", 0, 1, 2)),
        ("cropped", blocks("blocks", 1, 2)),  # the slice does not undo the pad
        ("permuted", blocks("blocks", 1, 2)),
        ("masked", blocks("blocks", 0, 1, 2)),
        ("equal", [*blocks("blocks", 0, 1), "singles.0"]),
        ("embedder", blocks("blocks", 0, 1)),
        ("skipped", blocks("blocks", 0, 1, 2)),
        ("post-norm", ["blocks.0"]),
        ("skipping", blocks("blocks", 0, 1)),
    ],
)
def test_the_main_stack(name: str, main: list[str]) -> None:
    """The main stack has the blocks with bases of the stream with most FLOPs."""
    stacks = stacks_of(name)
    assert path(stacks, stacks.find().layers) == main


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("flux", []),
        ("refined", [("image_refiner.0..image_refiner.1", "OTHER_STACK"), ("text_refiner.0", "OTHER_STACK")]),
        ("context", [("refiner.0..refiner.1", "NO_COUNTERPART")]),  # except half of its channels
        ("control", [("control.0..control.1", "OTHER_STACK")]),
        ("permuted", [("blocks.0", "OTHER_STACK")]),
        ("cropped", [("blocks.0", "OTHER_STACK")]),
        ("post-norm", [("blocks.1..blocks.2", "OTHER_STACK")]),
    ],
)
def test_what_is_left_out(name: str, left_out: list[tuple[str, str]]) -> None:
    """Blocks of another stream, and blocks of this stream without a base, are left out with a reason."""
    refused = stacks_of(name).find().refused
    assert sorted((refusal.path, refusal.reason.name) for refusal in refused) == left_out


def test_a_stack_by_its_container() -> None:
    """A pattern selects the module list of the blocks; other blocks are not reported."""
    stacks = stacks_of("refined")
    named = {name: stacks.find(name) for name in ("image_refiner", "*_refiner", "layers", "refiner", "layers.0")}
    assert path(stacks, named["image_refiner"].layers) == path(stacks, named["*_refiner"].layers)
    assert path(stacks, named["image_refiner"].layers) == blocks("image_refiner", 0, 1)
    assert [r.path for r in named["*_refiner"].refused] == ["text_refiner.0"]
    assert named["layers"].layers == stacks.find().layers
    assert named["layers"].refused == ()
    for name in ("refiner", "layers.0"):
        assert named[name].layers == ()
        assert [refusal.reason for refusal in named[name].refused] == [RefusalReason.NO_STACK]


def test_a_part_of_a_chain_by_its_container() -> None:
    """The single blocks of a chain of double and single blocks."""
    stacks = stacks_of("flux")
    assert path(stacks, stacks.find("singles").layers) == blocks("singles", 0, 1, 2)
    assert path(stacks, stacks.find("blocks").layers) == blocks("blocks", 0, 1)


def test_a_graph_without_sums() -> None:
    """A graph without sums has no blocks and no stack."""
    toy = Toy(lambda m, x: m.head(x), head=linear())
    graph = trace(toy, (tokens(0),))
    stack = Stacks(Stream(graph.gm.graph, graph.sites())).find()
    assert stack.layers == ()
    assert [refusal.reason for refusal in stack.refused] == [RefusalReason.NO_STACK]


@pytest.mark.parametrize("name", [name for name in TOYS if name not in ("post-norm",)])
def test_values_of_the_stack(name: str) -> None:
    """Every part of a main stack after its first block has values; reuse 0 is exact, and so is reuse."""
    stacks = stacks_of(name)
    layers = stacks.find().layers
    for first, end in ((layers[0], layers[-1] + 1), (layers[1], layers[-1] + 1)):
        rewritten = with_spans(traced(name), [(first, end)], stack=layers)
        rewritten.check_reuse_0()
        rewritten.check(rewritten.random_table(first))


@pytest.mark.parametrize(("name", "attentions"), [("refined", 4), ("context", 3), ("control", 3), ("masked", 1)])
def test_what_runs_when_the_rest_is_reused(name: str, attentions: int) -> None:
    """With the other blocks reused, the main stack's first block and its inputs run: refiners, or the control block."""
    layers = stacks_of(name).find().layers
    rewritten = with_spans(traced(name), [(layers[1], layers[-1] + 1)], branches=False, stack=layers)
    assert op_counts(rewritten.variant((True,)).gm)["dit_rewrite.attention"] == attentions


@pytest.mark.parametrize("name", ["refined", "context", "control"])
def test_the_first_block_is_the_main_stack_s(name: str) -> None:
    """similarity("first_block") measures the main stack, and not a refiner that runs before it."""
    graph = traced(name)
    probes = Probes(graph.gm, graph.sites(), graph.captured.static)
    stacks = stacks_of(name)
    first = stacks.find().layers[0]
    pair = probes._main
    assert pair is not None
    sums = {total.name for total, layer in stacks.stream.layer.items() if layer == first}
    assert pair[0].name in sums
    assert pair[0].meta["val"].shape[1] == (8 if name == "refined" else 4)
