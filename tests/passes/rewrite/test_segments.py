"""Segments: together they equal the whole graph, exchange only required values, and share code if they are equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dit_rewrite.passes.analysis.graph import copied
from dit_rewrite.passes.analysis.probes import Probes
from dit_rewrite.passes.analysis.site import Probe
from dit_rewrite.passes.analysis.structure import structure
from dit_rewrite.passes.rewrite.printing import op_counts
from dit_rewrite.passes.rewrite.segments import Segments, crossing_bytes, cut, relevant, whole
from dit_rewrite.passes.rewrite.specialise import Variant, specialise
from tests.helpers.streams import SHAPES, Plain, single, traced, with_spans
from tests.helpers.toys import EXAMPLES, Block, Example
from tests.helpers.tracing import WIDTH, Toy, linear, tokens, trace
from tests.references.oracle import Rewritten, same

aten = torch.ops.aten


def variants(rewritten: Rewritten, row: tuple[bool, ...], measured: bool = False) -> list[Variant]:
    """Return the variant of every segment for a row."""
    segments = rewritten.cut(measured)
    depends = relevant(rewritten.gm, segments, rewritten.sites, measured)
    return [
        specialise(rewritten.guarded, [row[i] and i in own for i in range(len(row))], segments, k)
        for k, own in enumerate(depends)
    ]


def branches(name: str) -> Rewritten:
    """A toy with every branch guarded."""
    return Rewritten.of(traced(name))


# --- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [("single", 4), ("joint", 3), ("dropped", 3), ("flux", 6), ("latte", 5), ("post-norm", 4), ("skipping", 4)],
)
def test_count(name: str, count: int) -> None:
    """One segment per block (the first with the nodes before it), and one for the nodes after the last block."""
    rewritten = branches(name)
    assert rewritten.cut().count == count
    assert rewritten.whole.count == 1


@pytest.mark.parametrize("name", SHAPES)
def test_every_node_has_one_place(name: str) -> None:
    """No segment reads from a later one; constants belong to each segment that reads them."""
    rewritten = branches(name)
    segments, nodes = rewritten.cut(), list(rewritten.gm.graph.nodes)
    assert len(segments.of) == len(nodes)
    place = dict(zip(nodes, segments.of, strict=True))
    for node in nodes:
        own = place[node]
        for argument in node.all_input_nodes if own is not None and argument_matters(node) else ():
            given = place[argument]
            assert given is None or argument.op == "placeholder" or given <= own


def argument_matters(node: fx.Node) -> bool:
    return node.op == "call_function"


@pytest.mark.parametrize("name", SHAPES)
def test_all_segments_have_all_ops(name: str) -> None:
    """All segments together have the ops of the captured graph, each once."""
    rewritten = branches(name)
    never = (False,) * len(rewritten.sites)
    counts = [op_counts(variant.gm) for variant in variants(rewritten, never)]
    together = sum(counts[1:], counts[0])
    clones = together["aten.clone"] - op_counts(rewritten.gm)["aten.clone"]
    assert clones >= 0, "values that cross a cut may be copied to be contiguous"
    together["aten.clone"] -= clones
    assert +together == op_counts(rewritten.gm)


@pytest.mark.parametrize("name", SHAPES)
def test_exports_are_what_is_needed_and_no_more(name: str) -> None:
    """A segment exports exactly those of its nodes that another segment reads or that the graph returns."""
    rewritten = branches(name)
    segments, nodes = rewritten.cut(), list(rewritten.gm.graph.nodes)
    place = dict(zip(nodes, segments.of, strict=True))
    needed = {
        i
        for i, node in enumerate(nodes)
        if node.op == "call_function"
        and any(user.op == "output" or place[user] not in (None, place[node]) for user in node.users)
    }
    exported = [p for exports in segments.exports for p in exports]
    assert len(exported) == len(set(exported))
    assert set(exported) == needed
    assert all(segments.of[p] == k for k, exports in enumerate(segments.exports) for p in exports)


def test_the_stream_alone_crosses() -> None:
    """With three blocks, two cuts pass the stream and the last one the input of the head.

    Each is 2 samples x 4 tokens x 8 numbers x 4 bytes.
    """
    rewritten = branches("single")
    segments = rewritten.cut()
    nodes = list(rewritten.gm.graph.nodes)
    handed = [[tuple(nodes[p].meta["val"].shape) for p in exports] for exports in segments.exports]
    assert handed[:3] == [[(2, 4, WIDTH)]] * 3
    assert crossing_bytes(rewritten.gm, segments) == 3 * 2 * 4 * WIDTH * 4
    assert crossing_bytes(rewritten.gm, rewritten.whole) == 0


def test_bases_cross_where_a_span_is_guarded() -> None:
    """The stream before a guarded span crosses the cuts to the place where the change is added."""
    rewritten = with_spans(traced("single"), [(0, 3)], branches=False)
    segments, nodes = rewritten.cut(), list(rewritten.gm.graph.nodes)
    (site,) = rewritten.sites
    base = next(i for i, node in enumerate(nodes) if node.name == site.bases[0])
    assert base in segments.exports[0]
    assert base not in branches("single").cut().exports[0]
    adding = variants(rewritten, (True,))[2]
    assert adding.inputs == (base,)
    assert op_counts(adding.gm) == {"aten.add": 1}


# --- conditioning -----------------------------------------------------------------------------------------------------


def conditioned() -> tuple[Rewritten, Segments]:
    """Three blocks and a signal for all of them, one for the second alone, and one for the last two."""

    def body(m: Toy, x: Tensor, signal: Tensor, text: Tensor) -> Tensor:
        shared, own, late = m.shared(signal), m.own(text), m.late(text)
        x = m.blocks[0](x * shared)
        x = m.blocks[1](x * shared + own + late)
        return m.blocks[2](x * shared + late)

    toy = Toy(body, shared=linear(), own=linear(), late=linear(), blocks=nn.ModuleList(Plain() for _ in range(3)))
    rewritten = Rewritten.of(trace(toy, (tokens(), tokens(1, 2, 1, WIDTH), tokens(2, 2, 1, WIDTH))))
    return rewritten, rewritten.cut()


def test_conditioning_is_computed_where_it_is_read() -> None:
    """A node that only one block reads is in its segment; a node that several read is in the first."""
    rewritten, segments = conditioned()
    never = (False,) * len(rewritten.sites)
    names = [placeholder.name for placeholder in rewritten.traced.captured.placeholders]
    read = [{names[i] for i in variant.inputs if i < len(names)} for variant in variants(rewritten, never)]
    assert [bool(exports) for exports in segments.exports] == [True, True, True, False], "nothing follows the last"
    assert {"shared_weight", "late_weight"} <= read[0]
    assert "own_weight" in read[1]
    assert not {"own_weight"} & (read[0] | read[2])
    assert not {"shared_weight", "late_weight"} & (read[1] | read[2] | read[3])
    rewritten.check([never])


# --- segments in sequence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_reuse_0(example: Example) -> None:
    """With nothing reused, the segments return the model's outputs bit for bit."""
    rewritten = example.rewritten()
    never = (False,) * example.sites
    segments = rewritten.cut()
    for step in range(3):
        outputs, stored = rewritten.string(segments, variants(rewritten, never), step, {})
        assert same(outputs, list(rewritten.traced.returned[step]))
        assert sorted(stored) == rewritten.slots


def test_outputs_that_are_no_results() -> None:
    """An input that is returned, a result that is returned twice, and None: the outputs are those of the graph."""

    def body(m: Toy, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        z = m.block(x)
        return y, z, x, z, None, 3, z + y

    rewritten = Rewritten.of(trace(Toy(body, block=Plain()), *[(tokens(i), tokens(9 + i)) for i in range(3)]))
    rewritten.check_reuse_0()
    rewritten.check([(False, False), (True, False), (True, True)])
    variant = rewritten.variant((True, True))
    assert len(variant.outputs) == len(set(variant.outputs)) == 2
    assert min(variant.outputs) >= len(rewritten.traced.captured.placeholders)


def test_what_is_inside_a_reused_span_does_not_run() -> None:
    """If a stack is reused, the segments inside have no nodes, and the one where it ends adds the change."""
    rewritten = with_spans(traced("single"), [(1, 3)], branches=False)
    first, second, third, last = variants(rewritten, (True,))
    assert (second.outputs, second.fresh, op_counts(second.gm)) == ((), (), {})
    assert op_counts(third.gm) == {"aten.add": 1}
    never = variants(rewritten, (False,))
    assert structure(first.gm) == structure(never[0].gm)
    assert structure(last.gm) == structure(never[3].gm)


def test_slots_are_filled_by_the_segment_that_has_the_value() -> None:
    """The segment of its block fills each slot, once."""
    rewritten = branches("joint")
    fresh = [variant.fresh for variant in variants(rewritten, (False,) * len(rewritten.sites))]
    blocks = [sorted({rewritten.sites[i].layer for i, _ in slots}) for slots in fresh]
    assert blocks == [[0], [1], []]
    assert sorted(slot for slots in fresh for slot in slots) == rewritten.slots


def test_effects_run_once() -> None:
    """An impure node runs in exactly one segment, whatever is reused."""

    def body(m: Toy, x: Tensor) -> Tensor:
        x = m.blocks[0](x)
        torch._assert_async((x < 1e6).all(), "too large")
        return m.blocks[1](x)

    rewritten = Rewritten.of(trace(Toy(body, blocks=nn.ModuleList([Plain(), Plain()])), (tokens(),)))
    for row in ((False,) * 4, (True,) * 4):
        counts = [op_counts(variant.gm) for variant in variants(rewritten, row)]
        asserts = [sum(n for name, n in c.items() if "assert" in name) for c in counts]
        assert sum(asserts) == 1


# --- the decisions that a segment depends on --------------------------------------------------------------------------


def test_a_segment_depends_on_the_sites_of_its_block() -> None:
    """A segment depends on the sites of its block, and on a span that it is a part of."""
    rewritten = with_spans(traced("single"), [(1, 3)])
    names = [site.name for site in rewritten.sites]
    depends = relevant(rewritten.gm, rewritten.cut(), rewritten.sites, False)
    assert [{names[i] for i in own} for own in depends] == [
        {"blocks.0.attn", "blocks.0.ff"},
        {"blocks.1.attn", "blocks.1.ff", "blocks.1..blocks.2"},
        {"blocks.2.attn", "blocks.2.ff", "blocks.1..blocks.2"},
        set(),
    ]
    assert relevant(rewritten.gm, rewritten.whole, rewritten.sites, False) == [tuple(range(len(names)))]


def measured(name: str, spans: list[tuple[int, int]], probe: str) -> Rewritten:
    """A toy with spans that read a probe, and branches that do not."""
    of = traced(name)
    gm, found = copied(of.gm), of.sites()
    rewritten = with_spans(of, spans)
    probes = Probes(gm, found, of.captured.static)
    nodes = [None if site.span is None else probes.of(probe, site) for site in rewritten.sites]
    sites = zip(rewritten.sites, nodes, strict=True)
    parts = [replace(site, probes=() if node is None else (Probe(probe, node),)) for site, node in sites]
    return Rewritten.with_parts(of, gm, parts, {i: None for i in range(len(parts))})


@pytest.mark.parametrize(("name", "first"), [("single", 1), ("joint", 1), ("flux", 1), ("latte", 1)])
def test_a_measured_span_is_decided_behind_its_probe(name: str, first: int) -> None:
    """The first block and its change are computed before the other blocks are decided, as in first-block caching."""
    end = traced(name).sites().num_layers
    rewritten = measured(name, [(first, end)], "first_block")
    segments = rewritten.cut(measured=True)
    (span,) = [i for i, site in enumerate(rewritten.sites) if site.span is not None]
    (probe,) = rewritten.sites[span].awaited
    position = [node.name for node in rewritten.gm.graph.nodes].index(probe)
    assert position in segments.exports[0]
    depends = relevant(rewritten.gm, segments, rewritten.sites, True)
    assert span not in depends[0]
    assert span in depends[1]
    assert all(rewritten.sites[i].layer == 0 for i in depends[0])
    for seed in range(2):
        rewritten.check(rewritten.random_table(seed), measured=True)


def test_no_segment_for_a_probe_alone() -> None:
    """The change across the first block is computed in the segment of the first block."""
    assert measured("single", [(1, 3)], "first_block").cut(measured=True).count == 4


def test_a_probe_within_a_block_cuts_it() -> None:
    """The modulated input is computed before the attention is decided: its norm is a segment of its own."""
    rewritten = measured("single", [(0, 3)], "modulated_input")
    segments = rewritten.cut(measured=True)
    assert segments.count == 5
    (span,) = [i for i, site in enumerate(rewritten.sites) if site.span is not None]
    depends = relevant(rewritten.gm, segments, rewritten.sites, True)
    assert span not in depends[0]
    assert span in depends[1]
    first = variants(rewritten, (True,) * len(rewritten.sites), measured=True)[0]
    assert op_counts(first.gm)["aten.native_layer_norm"] == 1
    assert op_counts(first.gm)["dit_rewrite.attention"] == 0
    for seed in range(2):
        rewritten.check(rewritten.random_table(seed), measured=True)


@pytest.mark.parametrize("name", ["single", "joint"])
@pytest.mark.parametrize("probe", ["first_block", "modulated_input"])
def test_no_site_is_decided_before_the_one_around_it(name: str, probe: str) -> None:
    """A segment before the probe of a span does not depend on sites inside the span."""
    rewritten = measured(name, [(0, traced(name).sites().num_layers)], probe)
    (span,) = [i for i, site in enumerate(rewritten.sites) if site.span is not None]
    depends = relevant(rewritten.gm, rewritten.cut(measured=True), rewritten.sites, True)
    first = min(k for k, own in enumerate(depends) if span in own)
    early = [rewritten.sites[i].name for own in depends[:first] for i in own if rewritten.guarded.parents[i] == span]
    assert early == []


# --- equal segments ---------------------------------------------------------------------------------------------------


def test_identical_blocks_are_one() -> None:
    """The middle four of six blocks have the same code for the same decisions."""
    of = trace(single(6), (tokens(), tokens(1, 2, 1, WIDTH)))
    rewritten = Rewritten.of(of)
    for row in ((False,) * 12, (True,) * 12, (True, False) * 6):
        found = [structure(variant.gm) for variant in variants(rewritten, row)]
        assert len(found) == 7
        assert len(set(found[1:6])) == 1
        assert len(set(found)) <= 3
    mixed = [structure(variant.gm) for variant in variants(rewritten, (True,) * 4 + (False,) * 8)]
    assert mixed[1] != mixed[2] == mixed[3]


def test_shared_code_computes_each_block() -> None:
    """The code of the second block with the weights and the stream of the third computes the third block."""
    rewritten = branches("single")
    never = (False,) * len(rewritten.sites)
    made = variants(rewritten, never)
    assert structure(made[1].gm) == structure(made[2].gm)
    borrowed = [made[0], made[1], replace_code(made[2], made[1].gm), made[3]]
    outputs, _ = rewritten.string(rewritten.cut(), borrowed, 1, {})
    assert same(outputs, list(rewritten.traced.returned[1]))


def replace_code(variant: Variant, gm: fx.GraphModule) -> Variant:
    return replace(variant, gm=gm)


def test_blocks_of_other_widths_are_others() -> None:
    """Two blocks with different modules, or with a different number, have different structures."""

    class Gained(Block):
        gain = 1.0

        def forward(self, x: Tensor, signal: Tensor) -> Tensor:
            return super().forward(x * self.gain, signal)

    def body(m: Toy, x: Tensor, signal: Tensor) -> Tensor:
        x = m.enter(x)
        for block in m.blocks:
            x = block(x, signal)
        return m.head(x)

    gained = [Gained() for _ in range(4)]
    for block, gain in zip(gained, (0.5, 0.5, 0.5, 0.25), strict=True):
        block.gain = gain
    toy = Toy(body, enter=linear(), blocks=nn.ModuleList(gained), head=linear())
    rewritten = Rewritten.of(trace(toy, (tokens(), tokens(1, 2, 1, WIDTH))))
    found = [structure(variant.gm) for variant in variants(rewritten, (False,) * len(rewritten.sites))]
    assert found[1] == found[2] != found[3]


def test_one_segment_is_the_whole_graph() -> None:
    """Without cuts nothing crosses, and the exports are the outputs."""
    for name in SHAPES:
        rewritten = branches(name)
        segments = whole(rewritten.gm, rewritten.sites)
        nodes = list(rewritten.gm.graph.nodes)
        assert {nodes[p] for p in segments.exports[0]} == set(rewritten.gm.graph.output_node().all_input_nodes)
        assert segments.holding(range(len(nodes))) == {0}
        assert cut(rewritten.gm, rewritten.found, (), False).count > 1
