"""Compute some of the tokens of a branch: an analysis of the values that these need, and the graph that computes them.

The analysis walks from the value of a branch back to the inputs of its closure. Some tokens of a value need either the
same tokens of an operand, or all of it (weights, or the keys and values of a condition); row_rules.py has the rule for
each op. A value that is needed in both ways, such as the tokens of self-attention, which are queries and keys, makes
the tokens depend on one another: then nothing is proven, and the branch cannot be computed in part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis.graph import ancestors, aten, is_contraction
from dit_rewrite.passes.rewrite.codec import inline
from dit_rewrite.passes.rewrite.fake import evaluate
from dit_rewrite.passes.rewrite.row_rules import Needs, Place, Rows, resized, rule_of

BEFORE = 2.0**-10  # right before a node, after the nodes that decode a slot for it (slot.py)


@dataclass(frozen=True)
class Tokens:
    """The values that some of the ``size`` tokens of a value need. The tokens are in dimension ``dim``.

    ``places`` maps each needed node to the place of the tokens in it; to None if it is needed as a whole.
    ``tables``: nodes that are computed as a whole, although only some tokens of them are needed. They take no
    contraction, like tables of positions.
    """

    dim: int
    size: int
    places: Mapping[fx.Node, Place | None]
    tables: frozenset[fx.Node] = frozenset()


def find_tokens(value: fx.Node, closure: Iterable[fx.Node]) -> Tokens | None:
    """Return the values that some tokens of `value` need, or None if these are not proven to be computable alone.

    The tokens are in the largest dimension of the value between batch and channels; without a batch, in the first.
    `closure` are the nodes, in graph order, that only the value depends on. Other nodes are read as they are.
    """
    dim = token_dim(value.meta["val"])
    return None if dim is None else _Search(value, dim, list(closure)).run()


def token_dim(value: Tensor) -> int | None:
    """Return the dimension of the tokens of a value, or None if there is none of a constant size above 1."""
    sizes = {dim: value.shape[dim] for dim in range(value.ndim > 2, value.ndim - 1)}
    known = {dim: size for dim, size in sizes.items() if type(size) is int and size > 1}
    return max(known, key=known.__getitem__, default=None)


class _Search:
    def __init__(self, value: fx.Node, dim: int, closure: Sequence[fx.Node]) -> None:
        self.value, self.dim, self.closure, self.inside = value, dim, closure, set(closure)
        self.size = int(value.meta["val"].shape[dim])
        self.places: dict[fx.Node, Place | None] = {value: Place(dim)}
        self.tables: set[fx.Node] = set()

    def run(self) -> Tokens | None:
        for node in reversed(self.closure):
            if node in self.places and not self._visit(node):
                return None
        return Tokens(self.dim, self.size, self.places, frozenset(self.tables))

    def _visit(self, node: fx.Node) -> bool:
        """Record the needs of a node, and return whether they agree with those of other readers of its operands."""
        needs = self._needs(node, self.places[node])
        if needs is None and self._is_table(node):
            self.tables.add(node)
            needs = self._needs(node, None)
        return needs is not None and all(self.places.setdefault(o, place) == place for o, place in needs)

    def _needs(self, node: fx.Node, place: Place | None) -> Needs | None:
        if node.is_impure() or any("val" not in operand.meta for operand in node.all_input_nodes):
            return None
        if place is None:
            return [(operand, None) for operand in node.all_input_nodes]
        if node.target is getitem:
            return [(node.all_input_nodes[0], place)]
        return rule_of(node)(Rows(node, place, self.size))

    def _is_table(self, node: fx.Node) -> bool:
        """Return whether all of a tensor is computed without a contraction and without side effects."""
        computed = ancestors([node], [n for a in self.inside for n in a.all_input_nodes if n not in self.inside])
        plain = isinstance(node.meta.get("val"), Tensor) and self._needs(node, None) is not None
        return plain and not any(map(is_contraction, computed & self.inside))


@dataclass(frozen=True)
class RowWriter:
    """Appends to `graph` the nodes that compute `count` tokens of a value; `rows` is the node with their indices.

    ``env`` maps the nodes that a closure reads to nodes of `graph`; ``position`` has the positions of the captured
    nodes, and ``home`` that of the value. New nodes get positions in between (insert_guards.py).
    """

    graph: fx.Graph
    env: Mapping[Any, fx.Node]
    position: Mapping[fx.Node, int]
    home: int
    rows: fx.Node
    count: int

    def write(self, value: fx.Node, closure: Sequence[fx.Node], tokens: Tokens) -> fx.Node:
        """Return the node with the tokens of `value`."""
        made: dict[fx.Node, fx.Node] = {}
        indices: dict[Place, fx.Node] = {}
        inside = set(closure)

        def gathered(node: fx.Node, whole: fx.Node, place: Place) -> fx.Node:
            reader = min(self.position[user] for user in node.users if user in inside)
            return self._gathered(whole, place, tokens.size, reader, indices)

        def read(node: fx.Node) -> fx.Node:
            if node not in made:
                whole, place = self.env[node], tokens.places[node]
                made[node] = whole if place is None else gathered(node, whole, place)
            return made[node]

        for node in closure:
            place = tokens.places.get(node)
            if place is not None and node not in tokens.tables:
                made[node] = self._some(node, place, read)
            elif node in tokens.places:
                whole = made[node] = self.graph.node_copy(node, read)
                whole.meta["position"] = self.position[node]
                if place is not None:
                    made[node] = gathered(node, whole, place)
        return made[value]

    def _some(self, node: fx.Node, place: Place, read: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Copy a node for some tokens."""
        target, args = (node.target, node.args) if node.target is getitem else resized(node, place, self.count)
        args, kwargs = fx.map_arg((args, node.kwargs), read)
        at = self.position[node]
        return self._call(node.name, target, args, kwargs, {"position": at, "home": at, **_path(node)})

    def _gathered(
        self, whole: fx.Node, place: Place, tokens: int, reader: int, indices: dict[Place, fx.Node]
    ) -> fx.Node:
        """Gather the tokens of a node that is computed as a whole, right before its first reader."""
        layout = place.at(0)
        if layout not in indices:
            spread = [self.rows]
            if (place.outer, place.inner) != (1, 1):
                spread = inline(self.graph, lambda r: (_spread(r, place, tokens),), spread, 0, self.home)
            (indices[layout],) = spread
        args = (whole, place.dim, indices[layout])
        meta = {"position": reader - BEFORE, "home": reader}
        return self._call(f"{whole.name}_rows", aten.index_select.default, args, {}, meta)

    def _call(self, name: str, target: Any, args: Any, kwargs: Any, meta: dict[str, Any]) -> fx.Node:
        new = self.graph.create_node("call_function", target, args, kwargs, name)
        mode = torch_compat.detect_fake_mode([self.rows.meta["val"]])
        new.meta = {**meta, "val": evaluate(mode, target, args, kwargs)}
        return new


def _spread(rows: Tensor, place: Place, tokens: int) -> Tensor:
    """Return the indices of rows in a dimension that they share with others."""
    outer = torch.arange(place.outer, device=rows.device) * tokens
    inner = torch.arange(place.inner, device=rows.device)
    return ((outer[:, None, None] + rows[None, :, None]) * place.inner + inner).flatten()


def _path(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
