"""Queries on a functional graph: dependence, closures of values, and classes of ops."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from operator import getitem
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from dit_rewrite.passes.capture import opaque_attention

aten = torch.ops.aten

_VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.alias, aten.unsqueeze, aten.squeeze, aten.permute, aten.transpose,
    aten.t, aten.expand, aten.detach,
}  # fmt: skip
_COPIES = {aten._to_copy, aten.clone}
PRODUCTS = {aten.linear, aten._int_mm, aten._weight_int8pack_mm, aten._weight_int4pack_mm}  # without a FLOP formula
_EXIT = "exit"


def packet(node: fx.Node) -> Any:
    """Return the overload packet of a call (``aten.add`` for ``aten.add.Tensor``), or None."""
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the attribute of `gm` that a get_attr node refers to."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph. Its nodes have the same names."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(gm, graph)


def is_view(node: fx.Node) -> bool:
    """Return whether `node` is a view of all elements of its first operand."""
    return packet(node) in _VIEWS


def returns_view(node: fx.Node) -> bool:
    """Return whether the schema of an op says that its result may share memory with its first operand."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


def is_copy(node: fx.Node) -> bool:
    """Return whether `node` is a cast or copy of its first operand."""
    return packet(node) in _COPIES


def is_constant_scale(node: fx.Node) -> bool:
    """Return whether `node` multiplies or divides a tensor by a Python number."""
    return packet(node) in (aten.mul, aten.div) and not isinstance(node.args[1], fx.Node)


def is_contraction(node: fx.Node) -> bool:
    """Return whether `node` is a matrix product, convolution or attention (has a FLOP formula or is in `PRODUCTS`)."""
    return node.target is opaque_attention.OP or packet(node) in flop_registry or packet(node) in PRODUCTS


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a contraction without addmm's bias: two, or query, key and value of an attention."""
    if node.target is opaque_attention.OP:
        return list(node.args[:3])  # type: ignore[arg-type]  # not `all_input_nodes`: key and value may be one node
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return tensors[1:3] if packet(node) in (aten.addmm, aten.baddbmm) else tensors[:2]


class Dependence:
    """Ancestors and descendants of every node of a graph as bit sets.

    A bit set is an int whose bit i stands for node i of the graph. ``static`` are the positions of the placeholders
    that are parameters or buffers.
    """

    def __init__(self, graph: fx.Graph, static: Iterable[int] = ()) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._ancestors = self._close([node.all_input_nodes for node in self.nodes], range(len(self.nodes)))
        placeholders = graph.find_nodes(op="placeholder")
        data = {node for i, node in enumerate(placeholders) if i not in set(static)}
        self._data = self.mask(data)
        self._contractions = self.mask(node for node in self.nodes if is_contraction(node))

    def _close(self, edges: list[list[fx.Node]], order: Iterable[int]) -> list[int]:
        closed = [0] * len(self.nodes)
        for i in order:
            bits = 1 << i
            for other in edges[i]:
                bits |= closed[self.position[other]]
            closed[i] = bits
        return closed

    @cached_property
    def _descendants(self) -> list[int]:
        return self._close([list(node.users) for node in self.nodes], reversed(range(len(self.nodes))))

    def mask(self, nodes: Iterable[fx.Node]) -> int:
        """Return `nodes` as a bit set."""
        bits = 0
        for node in nodes:
            bits |= 1 << self.position[node]
        return bits

    def members(self, mask: int) -> list[fx.Node]:
        """Return the nodes of a bit set in graph order."""
        found = []
        while mask:
            low = mask & -mask
            found.append(self.nodes[low.bit_length() - 1])
            mask ^= low
        return found

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Return whether `node` is, or is computed from, the node `on`."""
        return bool(self._ancestors[self.position[node]] >> self.position[on] & 1)

    def is_data(self, node: fx.Node) -> bool:
        """Return whether `node` depends on an input that is neither a parameter nor a buffer."""
        return bool(self._ancestors[self.position[node]] & self._data)

    def between(self, start: fx.Node, end: fx.Node) -> int:
        """Return the nodes on the paths from `start` (excluded) to `end` (included) as a bit set."""
        ways = self._descendants[self.position[start]] & self._ancestors[self.position[end]]
        return ways & ~(1 << self.position[start])

    def contractions(self, mask: int) -> list[fx.Node]:
        """Return the contractions in a bit set."""
        return self.members(mask & self._contractions)


def needed(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return `nodes`, the output, impure nodes, and all their ancestors."""
    found: set[fx.Node] = set()
    stack = [*nodes, *(node for node in graph.nodes if node.is_impure())]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def ancestors(ends: Iterable[fx.Node], given: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that `ends` are computed from, themselves included, up to those that are given."""
    stop = set(given)
    found: set[fx.Node] = set()
    stack = [node for node in ends if node not in stop]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(argument for argument in node.all_input_nodes if argument not in stop)
    return found


def closures(
    graph: fx.Graph,
    groups: Sequence[Sequence[fx.Node]],
    operands: Sequence[Sequence[fx.Node]] = (),
    dropped: Collection[fx.Node] = (),
) -> list[frozenset[fx.Node]]:
    """Return the closure of each group of values: the nodes from which every path to an output passes the group.

    These are the nodes that the group post-dominates, including the values. A closure contains no placeholders and
    attributes, and no getitem of a tuple that is computed outside of it, because only tensors are passed in. One
    dominator tree of the reversed graph serves all groups: each group gets an artificial node that all paths from its
    values pass. If groups share a value, they must be nested, with the inner group first.

    `operands` has for each group the nodes that are read even if its values come from a slot (the input of a span, a
    probe). The users of the values count as users of these nodes. The impure nodes `dropped` do not count as outputs.
    """
    gates: dict[fx.Node, list[Any]] = {}
    for i, group in enumerate(groups):
        for value in group:
            gates.setdefault(value, []).append(("group", i))
    reverse: nx.DiGraph[Any] = nx.DiGraph()
    for node in graph.nodes:
        inward = [*reversed(gates.get(node, [])), node]
        reverse.add_edges_from(itertools.pairwise(inward))
        for user in node.users:
            reverse.add_edge(user, inward[0])
        if node.op == "output" or (not node.users and node.is_impure() and node not in dropped):
            reverse.add_edge(_EXIT, inward[0])
    for i, read in enumerate(operands):
        users = list(reverse.predecessors(("group", i))) if read else ()
        reverse.add_edges_from((user, gates.get(node, [node])[-1]) for node in read for user in users)
    tree: nx.DiGraph[Any] = nx.DiGraph()
    for node, dominator in nx.immediate_dominators(reverse, _EXIT).items():
        if dominator is not None and dominator != node:
            tree.add_edge(dominator, node)
    return [
        _computed(nx.descendants(tree, ("group", i)) if ("group", i) in tree else (), group)
        for i, group in enumerate(groups)
    ]


def _computed(nodes: Iterable[Any], values: Sequence[fx.Node]) -> frozenset[fx.Node]:
    found = {n for n in nodes if isinstance(n, fx.Node) and n.op == "call_function"}
    return frozenset(n for n in found if n.target is not getitem or n in values or n.args[0] in found)
