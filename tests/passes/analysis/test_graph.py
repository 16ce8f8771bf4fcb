"""Dependence and closures against their definitions, on random and on hand-written graphs."""

from __future__ import annotations

import itertools
import operator

import networkx as nx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from dit_rewrite.passes.analysis.graph import Dependence, attribute, closures, is_contraction, operands, packet
from dit_rewrite.passes.capture import opaque_attention
from tests.helpers.tracing import Attention, Toy, linear, tokens, trace

aten = torch.ops.aten


@st.composite
def graphs(draw: st.DrawFn, largest: int = 14) -> fx.Graph:
    """Draw graphs with two or three inputs and sums of earlier nodes, some asserted, some returned, none dead."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(draw(st.integers(2, 3)))]
    for _ in range(draw(st.integers(1, largest))):
        arguments = draw(st.lists(st.sampled_from(nodes), min_size=2, max_size=2))
        nodes.append(graph.call_function(operator.add, tuple(arguments)))
        if draw(st.integers(0, 7)) == 0:
            graph.call_function(torch._assert, (nodes[-1], ""))
    returned = draw(st.lists(st.sampled_from(nodes[2:]), max_size=2))
    graph.output((nodes[-1], *returned))
    graph.eliminate_dead_code()
    return graph


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is operator.add]


def as_networkx(graph: fx.Graph) -> nx.DiGraph:
    edges = nx.DiGraph()
    edges.add_nodes_from(graph.nodes)
    edges.add_edges_from((argument, node) for node in graph.nodes for argument in node.all_input_nodes)
    return edges


def closure_by_definition(graph: fx.Graph, group: tuple[fx.Node, ...]) -> set[fx.Node]:
    """Return the calls that reach no output and no impure node once the group is removed."""
    edges = as_networkx(graph)
    exits = {node for node in graph.nodes if node.op == "output" or node.target is torch._assert}
    edges.remove_nodes_from(group)
    escaping = set(exits).union(*(nx.ancestors(edges, node) for node in exits))
    return {node for node in graph.nodes if node.op == "call_function" and node not in escaping}


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_dependence(graph: fx.Graph) -> None:
    """`depends`, `between` and `is_data` are reachability."""
    edges = as_networkx(graph)
    static = frozenset({0})
    dependence = Dependence(graph, static)
    reach = {node: nx.descendants(edges, node) | {node} for node in graph.nodes}
    inputs = graph.find_nodes(op="placeholder")
    for a, b in itertools.product(graph.nodes, repeat=2):
        assert dependence.depends(b, a) is (b in reach[a])
        between = {node for node in reach[a] if b in reach[node]} - {a}
        assert set(dependence.members(dependence.between(a, b))) == between
    for node in graph.nodes:
        assert dependence.is_data(node) is any(node in reach[source] for source in inputs[1:])


@settings(max_examples=50, deadline=None)
@given(graphs(), st.data())
def test_members_of_a_mask(graph: fx.Graph, data: st.DataObject) -> None:
    """`members` returns the nodes of a bit set in graph order."""
    dependence = Dependence(graph)
    nodes = list(graph.nodes)
    chosen = data.draw(st.lists(st.sampled_from(nodes), unique=True))
    assert dependence.members(dependence.mask(chosen)) == [node for node in nodes if node in chosen]


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_closure_of_a_group(graph: fx.Graph, data: st.DataObject) -> None:
    """The closure of one group equals its definition, with impure nodes."""
    group = tuple(data.draw(st.lists(st.sampled_from(calls(graph)), min_size=1, max_size=3, unique=True)))
    assert closures(graph, [group]) == [closure_by_definition(graph, group)]


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_closures_of_single_values(graph: fx.Graph, data: st.DataObject) -> None:
    """The closures of several values, computed together, equal those of each value alone."""
    values = data.draw(st.lists(st.sampled_from(calls(graph)), min_size=1, max_size=4, unique=True))
    assert closures(graph, [(value,) for value in values]) == [closure_by_definition(graph, (v,)) for v in values]


@settings(max_examples=200, deadline=None)
@given(graphs(largest=20), st.data())
def test_closures_of_several_groups(graph: fx.Graph, data: st.DataObject) -> None:
    """Closures of groups contain their values, are within the definition, and are nested or disjoint."""
    values = data.draw(st.lists(st.sampled_from(calls(graph)), min_size=1, max_size=6, unique=True))
    size = data.draw(st.integers(1, 3))
    groups = [tuple(values[i : i + size]) for i in range(0, len(values), size)]
    found = closures(graph, groups)
    for group, closure in zip(groups, found, strict=True):
        assert set(group) <= closure <= closure_by_definition(graph, group)
    for a, b in itertools.combinations(found, 2):
        assert a <= b or b <= a or not a & b


def test_closures_by_hand() -> None:
    """A producer with another reader stays out; a shared one belongs to the group; impure nodes keep their operands."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    shared, kept, asserted = (graph.call_function(operator.neg, (x,)) for _ in range(3))
    left = graph.call_function(operator.add, (shared, kept))
    right = graph.call_function(operator.add, (shared, asserted))
    graph.call_function(torch._assert, (asserted, ""))
    graph.output((left, right, kept))
    assert closures(graph, [(left, right)]) == [{left, right, shared}]
    assert closures(graph, [(left,), (right,)]) == [{left}, {right}]
    assert closures(graph, []) == []


def test_closure_of_a_value_that_is_returned_as_well() -> None:
    """A value that the graph returns has a closure too, because the cached value can be returned instead."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    inner = graph.call_function(operator.neg, (x,))
    value = graph.call_function(operator.neg, (inner,))
    graph.output((value, graph.call_function(operator.add, (x, value))))
    assert closures(graph, [(value,)]) == [{inner, value}]


def test_closures_without_impure_nodes() -> None:
    """What only a dropped impure node reads besides the value belongs to the value; others still count as outputs."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    dropped, kept = (graph.call_function(operator.neg, (x,)) for _ in range(2))
    value = graph.call_function(operator.add, (dropped, kept))
    check, _ = (graph.call_function(torch._assert, (node, "")) for node in (dropped, kept))
    graph.output((graph.call_function(operator.add, (x, value)),))
    assert closures(graph, [(value,)]) == [{value}]
    assert closures(graph, [(value,)], dropped={check}) == [{value, dropped}]


def test_contractions() -> None:
    """Products, convolutions and attention are contractions; elementwise ops, norms and reductions are not."""

    def body(m: Toy, x: torch.Tensor) -> torch.Tensor:
        x = m.conv(m.attn(x).transpose(1, 2)).transpose(1, 2)
        return (x @ x.transpose(1, 2)).softmax(-1) @ m.norm(x).relu() + x.mean()

    parts = {"attn": Attention(), "conv": torch.nn.Conv1d(8, 8, 1), "norm": torch.nn.LayerNorm(8)}
    graph = trace(Toy(body, **parts), (tokens(),)).gm.graph
    found = [node.name for node in graph.nodes if is_contraction(node)]
    assert found == ["addmm", "addmm_1", "addmm_2", "attention", "addmm_3", "convolution", "bmm", "bmm_1"]


def test_operands() -> None:
    """The factors of a product without its bias; query, key and value of attention without its mask."""
    graph = fx.Graph()
    a, b, c, d = (graph.placeholder(name) for name in "abcd")
    assert operands(graph.call_function(aten.addmm.default, (a, b, c))) == [b, c]
    assert operands(graph.call_function(aten.baddbmm.default, (a, b, c))) == [b, c]
    assert operands(graph.call_function(aten.mm.default, (a, b))) == [a, b]
    assert operands(graph.call_function(aten.convolution.default, (a, b, c, [1]))) == [a, b]
    assert operands(graph.call_function(opaque_attention.OP, (a, b, c, d))) == [a, b, c]
    assert operands(graph.call_function(opaque_attention.OP, (a, b, b, d))) == [a, b, b]


def test_packet_and_attribute() -> None:
    """The packet of any overload, None for a node that is no op, and an attribute by its dotted path."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert packet(graph.call_function(aten.add.Tensor, (x, x))) is aten.add
    assert packet(graph.call_function(aten.add.Scalar, (x, 1))) is aten.add
    assert packet(graph.call_function(operator.add, (x, x))) is None
    assert packet(x) is None
    holder = torch.nn.Module()
    holder.inner = linear()
    gm = fx.GraphModule(holder, graph)
    gm.inner = holder.inner
    assert attribute(gm, graph.get_attr("inner.weight")) is holder.inner.weight


def test_long_chain() -> None:
    """A chain as long as a deep model's works, because nothing recurses."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    values = []
    for _ in range(2000):
        node = graph.call_function(operator.add, (node, graph.call_function(operator.neg, (node,))))
        values.append(node.args[1])
    graph.output((node,))
    assert all(len(closure) == 1 for closure in closures(graph, [(value,) for value in values]))
    assert Dependence(graph).depends(node, values[0])
