"""Straight-line variants: skipped nodes are gone, and the others keep their order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx

from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.capture.capture import one_graph
from dit_rewrite.passes.rewrite.guarded_graph import Guarded
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from dit_rewrite.passes.rewrite.printing import op_counts
from dit_rewrite.passes.rewrite.segments import whole
from dit_rewrite.passes.rewrite.specialise import normalise, specialise
from tests.helpers.toys import AROUND_A_JOINT, BLOCKS, CONSTANT, EXAMPLES, HALVES, JOINT, NESTED, SIBLINGS, Example
from tests.helpers.tracing import Toy, linear, mlp, norm, tokens, trace
from tests.references.oracle import Rewritten, same

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


def input_names(rewritten: Rewritten, positions: tuple[int, ...]) -> set[str]:
    """Return the names of the captured inputs of a variant."""
    placeholders = rewritten.traced.captured.placeholders
    return {placeholders[i].name for i in positions}


def test_normalise() -> None:
    """Sites inside a reused site count as reused; sites around and beside it do not."""
    parents = (1, 2, None, None, 3)
    assert normalise((False, False, True, False, False), parents) == (True, True, True, False, False)
    assert normalise((False, True, False, False, True), parents) == (True, True, False, False, True)
    assert normalise((True, False, False, True, False), parents) == (True, False, False, True, True)
    assert normalise([False] * 5, parents) == (False,) * 5
    assert normalise((), ()) == ()


@every_example
def test_every_row(example: Example) -> None:
    """Each of at most 32 rows equals an interpreter with a dictionary, after a step that computes all sites."""
    rewritten = example.rewritten()
    for row in itertools.product((False, True), repeat=example.sites):
        rewritten.check([(False,) * example.sites, row])


@every_example
def test_all_computed_is_the_captured_graph(example: Example) -> None:
    """The computing variant has the captured nodes in captured order, with the sites' values as additional outputs.

    It copies only values that are views of other tensors.
    """
    rewritten = example.rewritten()
    variant = rewritten.variant((False,) * example.sites)
    captured = rewritten.traced.gm.graph
    calls = [node for node in variant.gm.graph.nodes if node.op == "call_function"]
    copies = [str(node.target) for node in calls if "home" in node.meta]
    assert copies == ["aten.clone.default"] * (2 if example in (HALVES, AROUND_A_JOINT) else 0)
    assert [str(node.target) for node in calls if "home" not in node.meta] == [
        str(node.target) for node in captured.nodes if node.op == "call_function"
    ]
    read = tuple(i for i, node in enumerate(rewritten.traced.captured.placeholders) if node.users)
    assert variant.inputs == read
    assert variant.cached == ()
    assert [name for site in rewritten.sites for name in site.values] == rewritten.names(variant.fresh)


@every_example
def test_order_of_what_is_left(example: Example) -> None:
    """In every variant, the nodes have the order of the captured graph."""
    rewritten = example.rewritten()
    for row in itertools.product((False, True), repeat=example.sites):
        variant = rewritten.variant(row)
        positions = [node.meta["position"] for node in variant.gm.graph.nodes if node.op == "call_function"]
        assert positions == sorted(positions)
        assert len(set(positions)) == len(positions)
        variant.gm.graph.lint()


def test_reused_attention_takes_its_producers_with_it() -> None:
    """If the attention of both blocks is reused, cores, projections, norms and modulation are gone, and gates stay."""
    rewritten = BLOCKS.rewritten()
    assert [str(site.kind) for site in rewritten.sites] == ["self", "mlp", "self", "mlp"]
    before = op_counts(rewritten.traced.gm)
    after = op_counts(rewritten.variant((True, False, True, False)).gm)
    assert (before["dit_rewrite.attention"], after["dit_rewrite.attention"]) == (2, 0)
    assert (before["aten.native_layer_norm"], after["aten.native_layer_norm"]) == (4, 2)
    # each block: modulation 1, attention 4, MLP 2; the head 1
    assert (before["aten.addmm"], after["aten.addmm"]) == (15, 7)
    # each branch adds shift, 1 + scale and itself
    assert (before["aten.add"], after["aten.add"]) == (12, 8)


def test_reused_blocks_leave_the_stream() -> None:
    """If all sites are reused, gates and stream remain, and of the weights those of modulation and head."""
    rewritten = BLOCKS.rewritten()
    variant = rewritten.variant((True,) * 4)
    counts = op_counts(variant.gm)
    assert counts["aten.addmm"] == 3
    assert counts["aten.mul"] == 4
    assert counts["aten.add"] == 4
    assert counts["aten.native_layer_norm"] == counts["dit_rewrite.attention"] == counts["aten.relu"] == 0
    weights = {name for name in input_names(rewritten, variant.inputs) if name.endswith(("weight", "bias"))}
    assert len(weights) == 6
    assert all("modulate" in name or "head" in name for name in weights)
    assert len(variant.cached) == 4
    assert variant.fresh == ()


def test_unread_input_is_dropped() -> None:
    """An input that only a reused branch reads is not an input of the variant."""
    toy = Toy(lambda m, x, text: x + m.ff(m.enter(text) * x), ff=mlp(), enter=linear())
    rewritten = Rewritten.of(trace(toy, (tokens(), tokens(1))))
    assert len(rewritten.variant((False,)).inputs) == 2 + 6
    assert len(rewritten.variant((True,)).inputs) == 1


def test_joint_core_goes_with_its_values() -> None:
    """A reused joint site drops the core and the projections of both streams."""
    rewritten = JOINT.rewritten()
    assert [str(site.kind) for site in rewritten.sites] == ["joint", "mlp", "mlp", "joint", "mlp"]
    counts = op_counts(rewritten.traced.gm)
    assert counts["dit_rewrite.attention"] == 2
    both = rewritten.variant((True, False, False, True, False))
    assert op_counts(both.gm)["dit_rewrite.attention"] == 0
    assert op_counts(both.gm)["aten.addmm"] == 4  # two MLPs: only the second core reads the text's
    first = rewritten.variant((True, False, False, False, False))
    assert op_counts(first.gm)["dit_rewrite.attention"] == 1
    assert first.cached == ((0, 0), (0, 1))


def test_text_that_feeds_the_last_joint_site_alone() -> None:
    """The text's MLP, which only the second layer's attention reads, is dropped with it."""
    rewritten = JOINT.rewritten()
    assert rewritten.sites[2].name == "text_ff"
    assert rewritten.guarded.parents == (None, None, 3, None, None)
    variant = rewritten.variant((False, False, False, True, False))
    assert variant.row == (False, False, True, True, False)
    assert (2, 0) not in variant.fresh
    assert op_counts(variant.gm)["aten.relu"] == 2


def test_halves_share_one_projection() -> None:
    """The MLP whose output goes to two streams is dropped if its site is reused."""
    rewritten = HALVES.rewritten()
    assert op_counts(rewritten.traced.gm)["aten.relu"] == 2
    assert op_counts(rewritten.variant((True, False)).gm)["aten.relu"] == 1
    assert op_counts(rewritten.variant((True, True)).gm)["aten.cat"] == 0


def test_nested_rows() -> None:
    """If an outer site is reused, inner decisions give the same variant, without their values."""
    rewritten = NESTED.rewritten()
    assert rewritten.guarded.parents == (1, 2, None)
    variants = [rewritten.variant((a, b, True)) for a in (False, True) for b in (False, True)]
    for variant in variants:
        assert variant.row == (True, True, True)
        assert variant.cached == ((2, 0),)
        assert variant.fresh == ()
        assert op_counts(variant.gm) == {"aten.add": 1}
    inner = rewritten.variant((True, False, False))
    assert inner.cached == ((0, 0),)
    assert inner.fresh == ((1, 0), (2, 0))
    assert op_counts(inner.gm)["aten.addmm"] == 2


def test_site_inside_a_computed_one() -> None:
    """If an inner site is reused and the outer one computes, the rest of the outer branch remains."""
    rewritten = SIBLINGS.rewritten()
    assert rewritten.guarded.parents == (2, 2, None, None)
    counts = op_counts(rewritten.variant((True, False, False, False)).gm)
    assert counts["dit_rewrite.attention"] == 0
    assert counts["aten.addmm"] == 2 + 2 + 2  # enter and leave, the inner MLP, the last one
    rewritten = AROUND_A_JOINT.rewritten()
    assert op_counts(rewritten.variant((True, False)).gm)["aten.addmm"] == 1


@every_example
def test_stored(example: Example) -> None:
    """Only values of sites marked as stored are returned, and the outputs do not change by one bit."""
    rewritten = example.rewritten()
    never = (False,) * example.sites
    for site in range(example.sites):
        stored = tuple(i == site for i in range(example.sites))
        variant = rewritten.variant(never, stored)
        assert variant.fresh == tuple((site, k) for k in range(len(rewritten.sites[site].values)))
        outputs, _ = rewritten.run(variant, 0, {})
        assert same(outputs, rewritten.traced.returned[0])
    assert rewritten.variant(never, never).fresh == ()
    assert rewritten.variant((True,) * example.sites, (True,) * example.sites).fresh == ()


def test_constant() -> None:
    """A tensor attribute is in the variants that read it, and in no other."""
    rewritten = CONSTANT.rewritten()
    assert len(rewritten.variant((False,)).gm.graph.find_nodes(op="get_attr")) == 1
    assert len(rewritten.variant((True,)).gm.graph.find_nodes(op="get_attr")) == 0


def test_guarded_graph_stays_as_it_is() -> None:
    """Specialising, and modifying the variant, does not change the guarded graph."""
    rewritten = JOINT.rewritten()
    before = rewritten.guarded.gm.code
    variant = rewritten.variant((False,) * 5)
    for node in list(variant.gm.graph.nodes):
        node.meta.clear()
    assert rewritten.guarded.gm.code == before
    assert all("val" in node.meta for node in rewritten.traced.captured.placeholders)
    rewritten.check([(False,) * 5, (True,) * 5])


def test_symbolic_sizes_stay() -> None:
    """Every variant of a dynamic graph takes its symbolic sizes, even one without ops that read them."""
    rewritten = NESTED.rewritten(dynamic=True)
    placeholders = rewritten.traced.captured.placeholders
    symbolic = {i for i, node in enumerate(placeholders) if isinstance(node.meta["val"], torch.SymInt)}
    assert len(symbolic) == 2
    for row in itertools.product((False, True), repeat=3):
        assert symbolic <= set(rewritten.variant(row).inputs)
    last = rewritten.variant((True, True, True))
    assert op_counts(last.gm) == {"aten.add": 1}
    unread = [node for node in last.gm.graph.find_nodes(op="placeholder") if not node.users]
    assert len(unread) == 2


def test_dynamic_variant_at_other_sizes() -> None:
    """A variant specialised at one size works at another."""
    toy = Toy(lambda m, x: x + m.ff(m.norm(x)), ff=mlp(), norm=norm())
    rewritten = Rewritten.of(trace(toy, (tokens(0, 2, 4, 8),), (tokens(1, 3, 6, 8),), dynamic=True))
    compute, reuse = (rewritten.variant((decision,)) for decision in (False, True))
    for step in range(2):
        outputs, values = rewritten.run(compute, step, {})
        assert list(values) == [rewritten.sites[0].values[0]]
        assert same(outputs, rewritten.traced.returned[step])
        assert same(rewritten.run(reuse, step, values)[0], outputs)


def test_effects_stay() -> None:
    """An impure node runs in every variant, even if it reads a node inside a reused branch."""

    def body(m: Toy, x: torch.Tensor) -> torch.Tensor:
        hidden = m.enter(x)
        torch._assert_async((hidden < 1e6).all(), "too large")
        return x + m.leave(hidden)

    rewritten = Rewritten.of(trace(Toy(body, enter=linear(), leave=linear()), (tokens(),)))
    asserts = [name for name in op_counts(rewritten.traced.gm) if "assert" in name]
    assert len(asserts) == 1
    computed, reused = (op_counts(rewritten.variant((decision,)).gm) for decision in (False, True))
    assert (computed["aten.addmm"], reused["aten.addmm"]) == (2, 1)
    assert computed[asserts[0]] == reused[asserts[0]] == 1


def test_hand_built_graph() -> None:
    """A graph written node by node, with results that can be checked by hand."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    product = graph.call_function(torch.ops.aten.mm.default, (x, weight))
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, product))
    graph.output((total,))
    for node in (x, weight, product, total):
        node.meta["val"] = torch.empty(2, 2, device="meta")
    gm = fx.GraphModule({}, graph)
    sites = find_sites(gm, frozenset({1})).sites
    assert [(site.values, site.streams, site.closure) for site in sites] == [
        ((product.name,), ("x",), frozenset({product.name}))
    ]
    guarded = insert_guards(gm, sites, [Guarded(0, "true", "reuse")])
    one, two = torch.eye(2), torch.full((2, 2), 2.0)
    compute, reuse = (specialise(guarded, (decision,), whole(gm, sites)) for decision in (False, True))
    assert (compute.inputs, compute.cached, compute.outputs, compute.fresh) == ((0, 1), (), (3,), ((0, 0),))
    assert (reuse.inputs, reuse.cached, reuse.outputs, reuse.fresh) == ((0,), ((0, 0),), (3,), ())
    total, fresh = compute.gm(one, two)
    assert torch.equal(fresh, two)
    assert torch.equal(total, one + 2)
    assert torch.equal(reuse.gm(3 * one, fresh)[0], 3 * one + 2)


def test_an_assertion_about_a_size_does_not_keep_a_reused_branch() -> None:
    """The check of a slice, whose length is unknown to the trace, is made where the branch is computed.

    That of the mask, which each step reads, is made in each.
    """

    def body(toy: Toy, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = mask.nonzero()
        torch._check(kept.shape[0] <= 4)
        hidden = toy.first(toy.norm(x)).relu()
        torch._check(hidden[:, -kept.shape[0] :].shape[1] == kept.shape[0])
        return (x + toy.second(hidden)) * kept.sum()

    with one_graph():
        traced = trace(Toy(body, norm=norm(), first=linear(), second=linear()), (tokens(), torch.tensor([1, 0, 1, 1])))
    rewritten = Rewritten.of(traced)
    computing, reusing = (op_counts(rewritten.variant((reused,)).gm) for reused in (False, True))
    assert computing["aten._assert_scalar"] == op_counts(traced.gm)["aten._assert_scalar"]
    assert computing["aten.addmm"] == 2
    assert reusing["aten.addmm"] == 0
    assert 0 < reusing["aten._assert_scalar"] < computing["aten._assert_scalar"]
