"""Sites inside attention: which cores are found or refused, the text beside the image, and the nesting of parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.attention_sites import (
    arguments,
    find_cores,
    find_shared,
    is_of_one_sequence,
    text_tokens,
)
from dit_rewrite.passes.analysis.probes import find_keys
from dit_rewrite.passes.analysis.site import Kind, Part, Site, close
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.rewrite.batch import batch_labels
from dit_rewrite.passes.rewrite.guarded_graph import Guarded, Guidance
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from tests.helpers.tracing import WIDTH, Attention, Toy, Traced, heads, linear, merged, mlp, norm, tokens, trace

aten = torch.ops.aten

# --- found and refused cores ------------------------------------------------------------------------------------------


@cache
def three() -> Traced:
    """Self-attention, cross-attention with a mask, and an MLP."""

    def cross(m: Toy, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(text)), heads(m.v(text))
        return m.o(merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)))

    def body(m: Toy, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = x + m.attn(m.norm(x))
        x = x + cross(m, m.norm(x), text, mask)
        return x + m.ff(m.norm(x))

    toy = Toy(body, norm=norm(), attn=Attention(), ff=mlp(), **{name: linear() for name in "qkvo"})
    return trace(toy, (tokens(), tokens(1, 2, 3, WIDTH), torch.ones(2, 1, 1, 3, dtype=torch.bool)))


def test_cores() -> None:
    """Each attention has a CORE and a CORE_STATE site; an MLP has none and is not refused."""
    of = three()
    self_attention, cross_attention, _ = of.sites().sites
    found, refused = find_cores(of.gm, of.sites().sites)
    assert refused == []
    assert [site.part for site in found] == [Part.CORE, Part.CORE_STATE] * 2
    assert [site.name for site in found[:2]] == ["attn.core", "attn.core_state"]
    assert [site.place for site in found] == [self_attention.name] * 2 + [cross_attention.name] * 2
    assert [site.kind for site in found] == [Kind.SELF] * 2 + [Kind.CROSS] * 2
    cores = [node for node in of.gm.graph.nodes if node.target is opaque_attention.OP]
    assert [site.values for site in found] == [(core.name,) for core in cores for _ in range(2)]
    for core, site in zip(cores, found[::2], strict=True):
        assert site.inputs == tuple(node.name for node in core.all_input_nodes)
    assert [len(site.inputs) for site in found] == [3, 3, 4, 4], "query, key, value, and a mask if there is one"
    assert all((site.sums, site.probes, site.entropy) == ((), (), None) for site in found)


def test_arguments() -> None:
    """Arguments are found by name, whether passed by position, by keyword or not at all."""
    of = three()
    first, second = (arguments(node) for node in of.gm.graph.nodes if node.target is opaque_attention.OP)
    assert first.keys() == second.keys() == {
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    }  # fmt: skip
    assert (first["attn_mask"], first["is_causal"], first["scale"]) == (None, False, None)
    assert (second["attn_mask"].name, second["scale"]) == (second["attn_mask"].name, 0.3)
    assert tuple(second["attn_mask"].meta["val"].shape) == (2, 1, 1, 3)


def test_one_sequence() -> None:
    """Queries and keys of equal shape count as tokens of one sequence."""
    cores = [node for node in three().gm.graph.nodes if node.target is opaque_attention.OP]
    assert [is_of_one_sequence(core) for core in cores] == [True, False]


Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2.0).softmax(-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.relu() @ (k.relu().mT @ v)


def by_samples(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A core for each sample, as in Mochi."""
    pairs = zip(q.split(1), k.split(1), v.split(1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*pair) for pair in pairs])


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (F.scaled_dot_product_attention, None),
        (causal, RefusalReason.CAUSAL),
        (shared_heads, RefusalReason.CAUSAL),
        (dropping, RefusalReason.CAUSAL),
        (by_hand, RefusalReason.NO_CORE),
        (linear_attention, RefusalReason.NO_CORE),
        (by_samples, RefusalReason.NO_CORE),
    ],
    ids=["plain", "causal", "shared heads", "dropout", "by hand", "linear", "by samples"],
)
def test_refusals(core: Core, reason: RefusalReason | None) -> None:
    """An attention has exactly one core of plain softmax attention, or is refused with a reason."""

    def body(m: Toy, x: Tensor) -> Tensor:
        return x + m.o(merged(core(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))))

    of = trace(Toy(body, **{name: linear() for name in "qkvo"}), (tokens(),))
    (site,) = of.sites().sites
    assert site.kind is Kind.SELF
    found, refused = find_cores(of.gm, [site])
    assert len(found) == (2 if reason is None else 0)
    assert [(r.node, r.path, r.reason) for r in refused] == (
        [] if reason is None else [(site.values[0], site.name, reason)]
    )


# --- text beside the image --------------------------------------------------------------------------------------------

TEXT, IMAGE, HEADS, SIZE = 3, 5, 2, 4


def joined(shapes: list[tuple[int, ...]], dim: int, then: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.Node:
    """Return a core whose values are `then` of a cat of parts with these shapes."""
    graph = fx.Graph()
    with FakeTensorMode():
        parts = [graph.placeholder(f"part_{i}") for i in range(len(shapes))]
        for part, shape in zip(parts, shapes, strict=True):
            part.meta["val"] = torch.empty(shape)
        value = then(graph, call(graph, aten.cat.default, parts, dim))
        core = graph.call_function(opaque_attention.OP, (value, value, value))
    graph.output((core,))
    return core


def call(graph: fx.Graph, target: Callable[..., Tensor], *arguments_: object) -> fx.Node:
    """Return a node with its fake value."""
    node = graph.call_function(target, arguments_)  # type: ignore[arg-type]
    node.meta["val"] = target(*fx.map_arg(arguments_, lambda n: n.meta["val"]))  # type: ignore[arg-type]
    return node


def as_it_is(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return node


def to_heads(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Bring (B, N, H, d) to the layout of attention, with a copy."""
    return call(graph, aten.clone.default, call(graph, aten.transpose.int, node, 1, 2))


def from_width(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Bring (B, N, H d) to the layout of attention."""
    shape = [2, node.meta["val"].shape[1], HEADS, SIZE]
    return to_heads(graph, call(graph, aten.view.default, node, shape))


def width(count: int) -> tuple[int, ...]:
    return (2, count, HEADS * SIZE)


def split(count: int) -> tuple[int, ...]:
    return (2, count, HEADS, SIZE)


@pytest.mark.parametrize(
    ("shapes", "then", "expected"),
    [
        ([split(TEXT), split(IMAGE)], to_heads, (TEXT, False)),
        ([split(IMAGE), split(TEXT)], to_heads, (TEXT, True)),
        ([width(TEXT), width(IMAGE)], from_width, (TEXT, False)),
        ([width(IMAGE), width(TEXT)], from_width, (TEXT, True)),
        ([split(IMAGE), split(IMAGE)], to_heads, (0, False)),  # the image cannot be identified
        ([split(TEXT), split(TEXT)], to_heads, (0, False)),
        ([split(TEXT), split(IMAGE), split(1)], to_heads, (0, False)),
        ([split(IMAGE)], to_heads, (0, False)),
    ],
    ids=["text first", "text last", "width, first", "width, last", "twice", "no image", "three", "one"],
)
def test_text(shapes: list[tuple[int, ...]], then: Callable[[fx.Graph, fx.Node], fx.Node], expected: object) -> None:
    """The number of tokens beside an image of five, and their side, if a cat along the tokens joins both."""
    assert text_tokens(joined(shapes, 1, then), IMAGE) == expected


@pytest.mark.parametrize(("first", "second", "last"), [(IMAGE, TEXT, True), (TEXT, IMAGE, False)])
def test_text_beside_an_image_in_heads(first: int, second: int, last: bool) -> None:
    """A cat of (B, H, N, d) along N, as in SD3."""
    shapes = [(2, HEADS, count, SIZE) for count in (first, second)]
    assert text_tokens(joined(shapes, 2, as_it_is), IMAGE) == (TEXT, last)


def test_heads_are_no_tokens() -> None:
    """A cat along the tokens of parts with equally many heads as image tokens does not identify the image."""
    shapes = [(2, IMAGE, count, SIZE) for count in (TEXT, TEXT + 1)]
    assert text_tokens(joined(shapes, 2, as_it_is), IMAGE) == (0, False)


def test_values_that_are_not_put_together() -> None:
    """The values are a projection of one sequence, although a cat comes before it."""
    (core, *_) = [node for node in three().gm.graph.nodes if node.target is opaque_attention.OP]
    assert text_tokens(core, 4) == (0, False)


# --- nesting ----------------------------------------------------------------------------------------------------------


def all_parts(of: Traced) -> tuple[Site, ...]:
    """Return sites for all parts of a graph's attentions, in arbitrary order."""
    attention = [site for site in of.sites().sites if site.kind is not Kind.MLP]
    cores, _ = find_cores(of.gm, attention)
    keys, _ = find_keys(of.gm, attention, of.captured.static)
    return close(of.gm.graph, [*cores, *keys, *find_shared(attention), *attention])


def test_parts_of_a_branch() -> None:
    """BRANCH, CFG_SHARED, CORE and CORE_STATE of one branch are nested; keys and values are inside too."""
    sites = all_parts(three())
    within = {site.name: None if site.parent is None else sites[site.parent].name for site in sites}
    first, second = (site.name for site in sites if site.part is Part.BRANCH)
    expected: dict[str, str | None] = {}
    for name in (first, second):
        expected |= {
            f"{name}.{Part.CORE_STATE}": f"{name}.{Part.CORE}",
            f"{name}.{Part.KV}": f"{name}.{Part.CFG_SHARED}",
            f"{name}.{Part.CORE}": f"{name}.{Part.CFG_SHARED}",
            f"{name}.{Part.CFG_SHARED}": name,
            name: None,
        }
    assert within == expected


def test_what_each_part_takes_with_it() -> None:
    """The closure of a CORE is the op alone, CFG_SHARED has the whole branch, and CORE_STATE has no node."""
    sites = all_parts(three())
    shared, branches = ([s.closure for s in sites if s.part is part] for part in (Part.CFG_SHARED, Part.BRANCH))
    assert shared == branches
    assert all(len(closure) > 5 for closure in branches)
    cores = [site for site in sites if site.part is Part.CORE]
    assert [site.closure for site in cores] == [frozenset(site.values) for site in cores]
    states = [site for site in sites if site.part is Part.CORE_STATE]
    assert [(site.closure, site.flops, site.bytes) for site in states] == [(frozenset(), 0, 0)] * 2
    # 2 samples, 2 heads, 4 x 4 and 4 x 3 scores, head size 4: 2 d for each score and 2 d for its value
    assert [site.flops for site in cores] == [4 * 2 * 2 * 16 * 4, 4 * 2 * 2 * 12 * 4]


@pytest.mark.parametrize("half", [True, False], ids=["half of the batch", "another call"])
def test_reuse_around_covers_and_half_of_a_batch_does_not(half: bool) -> None:
    """A core is still decided if only half of the batch is computed, but not if another call's values are reused."""
    of = three()
    sites = close(of.gm.graph, [site for site in all_parts(of) if site.part is not Part.KV])
    labels = {node.name: label for node, label in batch_labels(of.gm.graph, 2, of.captured.static).items()}
    shared = {Part.CFG_SHARED: Guidance(labels, 2, 0)} if half else {}
    with of.captured.fake_mode:
        guarded = insert_guards(
            of.gm, sites, [Guarded(i, "true", "", guidance=shared.get(site.part)) for i, site in enumerate(sites)]
        )
    covering = {
        site.name: None if parent is None else guarded.sites[parent].name
        for site, parent in zip(guarded.sites, guarded.parents, strict=True)
    }
    expected: dict[str, str | None] = {}
    for name in (site.name for site in sites if site.part is Part.BRANCH):
        guidance, core = f"{name}.{Part.CFG_SHARED}", f"{name}.{Part.CORE}"
        expected |= {f"{name}.{Part.CORE_STATE}": core, core: name if half else guidance, guidance: name, name: None}
    assert covering == expected


def test_shared() -> None:
    """Each attention may be shared across CFG, with its values; an MLP may not."""
    sites = three().sites().sites
    shared = find_shared(sites)
    assert [(site.place, site.values, site.part) for site in shared] == [
        (site.name, site.values, Part.CFG_SHARED) for site in sites[:2]
    ]
    assert sites[2].kind is Kind.MLP
