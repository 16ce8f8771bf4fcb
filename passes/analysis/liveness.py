"""How much memory the values of a graph take while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import getitem

from torch import Tensor, fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import is_view, returns_view
from dit_rewrite.torch_compat import tree_leaves


def peak_bytes(nodes: Sequence[fx.Node], counted: Collection[fx.Node], kept: Iterable[fx.Node]) -> int:
    """Return the most bytes that the values of `counted` nodes take at any moment while `nodes` run in order.

    A value is freed after the last node that reads it or a view of it; the values of `kept` are not freed. A view takes
    no bytes of its own.
    """
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        last.update((owner(read), i) for read in (node, *node.all_input_nodes))
    last.update((owner(node), len(nodes)) for node in kept)
    freed: list[int] = [0] * (len(nodes) + 1)
    for node, i in last.items():
        freed[i] += _bytes(node) if node in counted else 0
    alive = most = 0
    for node, after in zip(nodes, freed, strict=False):
        alive += _bytes(node) if node in counted and owner(node) is node else 0
        most = max(most, alive)
        alive -= after
    return most


def owner(node: fx.Node) -> fx.Node:
    """Return the node whose memory the value of `node` is, or is a view of, or is one tensor of."""
    while is_view(node) or node.target is getitem or returns_view(node):
        node = node.all_input_nodes[0]
    return node


def _bytes(node: fx.Node) -> int:
    tensors = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return sum(cost.numel(value) * value.element_size() for value in tensors)
