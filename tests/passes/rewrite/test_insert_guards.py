"""The guarded graph is executable, shows its guards, and does not modify the captured graph."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import Tensor

from dit_rewrite.passes.analysis.graph import attribute
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute
from dit_rewrite.passes.rewrite.guarded_graph import Guarded
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from dit_rewrite.passes.rewrite.printing import op_counts, readable
from tests.helpers.toys import AROUND_A_JOINT, BLOCKS, CONSTANT, EXAMPLES, HALVES, JOINT, NESTED, SIBLINGS, Example
from tests.helpers.tracing import Toy, mlp, tokens, trace
from tests.references.oracle import Rewritten

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


@every_example
def test_number_of_sites(example: Example) -> None:
    """Each toy has the number of sites that the tests expect."""
    assert len(example.rewritten().sites) == example.sites


@every_example
@pytest.mark.parametrize("seed", range(4))
def test_random_tables(example: Example, seed: int) -> None:
    """With random decisions, the guarded graph and its variants equal an interpreter with a dictionary."""
    rewritten = example.rewritten()
    for number in range(8):
        rewritten.check(rewritten.random_table(100 * seed + number))


@every_example
def test_reuse_0(example: Example) -> None:
    """If all sites are guarded and computed, the model's outputs do not change by one bit."""
    example.rewritten().check_reuse_0()


@pytest.mark.parametrize("example", [BLOCKS, NESTED, HALVES], ids=lambda example: example.name)
def test_dynamic_shapes(example: Example) -> None:
    """The same holds for graphs with symbolic sizes."""
    rewritten = example.rewritten(dynamic=True)
    rewritten.check_reuse_0()
    for seed in range(4):
        rewritten.check(rewritten.random_table(seed))


@every_example
def test_some_sites_guarded(example: Example) -> None:
    """Any single site can be guarded, without those inside and around it."""
    for position in range(example.sites):
        rewritten = example.rewritten((position,))
        assert rewritten.guarded.parents == (None,)
        rewritten.check([(False,), (True,), (True,)])


def test_parent_of_a_site_whose_enclosing_one_is_not_guarded() -> None:
    """If the middle of three nested sites is not guarded, the parent of the inner one is the outer one."""
    innermost, middle, outermost = range(3)
    rewritten = NESTED.rewritten((innermost, outermost))
    assert rewritten.guarded.parents == (1, None)
    for seed in range(4):
        rewritten.check(rewritten.random_table(seed))
    assert NESTED.rewritten((middle,)).guarded.parents == (None,)


def test_order_of_guarded_sites() -> None:
    """Sites may be guarded in any order, which is the order of decisions and values."""
    rewritten = SIBLINGS.rewritten((2, 3, 1, 0))
    assert rewritten.guarded.parents == (None, None, 0, 0)
    rewritten.check(rewritten.random_table(0))


def test_captured_graph_stays_as_it_is() -> None:
    """Guarding does not modify the captured graph."""
    traced = BLOCKS.traced()
    before = readable(traced.gm)
    insert_guards(traced.gm, traced.sites().sites, [Guarded(i, "true", "reuse") for i in range(4)])
    assert readable(traced.gm) == before


def test_nothing_guarded() -> None:
    """Without guarded sites the graph equals the captured one."""
    traced = BLOCKS.traced()
    guarded = insert_guards(traced.gm, traced.sites().sites, [])
    assert op_counts(guarded.gm) == op_counts(traced.gm)
    assert guarded.parents == ()


def test_ops_are_moved_and_not_copied() -> None:
    """Every op of the captured graph is in the guarded graph exactly once, inside or outside of a subgraph."""
    for example in EXAMPLES:
        rewritten = example.rewritten()
        counts = op_counts(rewritten.guarded.gm)
        values = sum(len(site.values) for site in rewritten.sites)
        assert counts["cache_or_compute"] == example.sites
        assert counts["getitem"] >= values
        del counts["cache_or_compute"], counts["getitem"]
        captured = op_counts(rewritten.traced.gm)
        del captured["getitem"]
        parts = 2 if example in (HALVES, AROUND_A_JOINT) else 0  # views of other tensors: the slot stores a copy
        assert counts - captured == Counter({"aten.clone": parts} if parts else {})
        assert captured - counts == Counter()


def test_inputs_and_outputs() -> None:
    """Inputs: those captured, a decision per site, slot tensors. Outputs: those captured, slot tensors."""
    rewritten = JOINT.rewritten()
    assert sorted(len(site.values) for site in rewritten.sites) == [1, 1, 1, 1, 2]
    placeholders = rewritten.guarded.gm.graph.find_nodes(op="placeholder")
    assert len(placeholders) == rewritten.guarded.num_inputs + 5 + 6
    assert rewritten.guarded.num_inputs == len(rewritten.traced.captured.placeholders)
    assert rewritten.guarded.num_outputs == 1
    assert len(rewritten.guarded.gm.graph.output_node().args[0]) == 1 + 6


def test_node_carries_site_guard_and_strategy() -> None:
    """The node and the printed graph show site, guard and strategy."""
    traced = trace(Toy(lambda m, x: x + m.ff(x), ff=mlp()), (tokens(),))
    guarded = insert_guards(traced.gm, traced.sites().sites, [Guarded(0, "Ne(Mod(step, 3), 0)", "reuse")])
    (node,) = guarded.gm.graph.find_nodes(op="call_function", target=cache_or_compute)
    assert node.kwargs == {"site": "ff", "guard": "Ne(Mod(step, 3), 0)", "strategy": "reuse"}
    lines = readable(guarded.gm).splitlines()
    (call,) = [line for line in lines if "cache_or_compute(" in line]
    assert call.endswith("site='ff', guard='Ne(Mod(step, 3), 0)', strategy='reuse')")
    indented = [line for line in lines if line.startswith("    ")]
    assert sum("aten.addmm" in line for line in indented) == 2
    assert sum("aten.addmm" in line for line in lines) == 2  # none outside of the subgraph
    assert any(line.startswith("def compute_ff(") for line in lines)


def test_names_that_differ_in_a_dot_alone() -> None:
    """Two sites whose names differ only in a dot have different subgraphs."""

    def body(m: Toy, x: Tensor) -> Tensor:
        x = x + m.a_b(x)
        return x + m.a.b(x)

    holder = Toy(lambda m, x: x, b=mlp())
    calls = [(tokens(step),) for step in range(4)]
    rewritten = Rewritten.of(trace(Toy(body, a_b=mlp(), a=holder), *calls))
    assert [site.name for site in rewritten.sites] == ["a_b", "a.b"]
    rewritten.check([(False, False), (True, False), (False, True), (True, True)])


def test_constant_inside_a_closure() -> None:
    """An attribute that only a branch reads moves into its subgraph."""
    rewritten = CONSTANT.rewritten()
    (call,) = rewritten.guarded.gm.graph.find_nodes(op="call_function", target=cache_or_compute)
    body = attribute(rewritten.guarded.gm, call.args[2])
    outside = [node for node in rewritten.guarded.gm.graph.find_nodes(op="get_attr") if node is not call.args[2]]
    assert len(body.graph.find_nodes(op="get_attr")) + len(outside) == 1
