"""Trajectory-invariant nodes, which hoisting computes once per trajectory.

A node is trajectory-invariant if it depends only on weights and on inputs that stay the same within a trajectory.
Examples are text keys and values, caption projections and condition encoders.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
import torch
from torch import Tensor, fx

from dit_rewrite.passes.analysis.graph import aten, is_contraction, is_view, packet
from dit_rewrite.passes.analysis.unbacked import is_unbacked

_SHAPED = {aten.full_like, aten.zeros_like, aten.ones_like, aten.new_full, aten.new_zeros, aten.new_ones}


def invariant_values(graph: fx.Graph, invariant_inputs: Iterable[int]) -> tuple[fx.Node, ...]:
    """Return the nodes to hoist; `invariant_inputs` are the positions of weights and other invariant inputs.

    Hoist only values that are derived from a contraction and read by a node that is not invariant. Each hoisted value
    is a contraction; views of it are free in each step. Elementwise functions of it stay in each step, because a
    separate kernel may round differently than one that is fused with the reader, and hoisting must not change any bit.
    """
    invariant = invariant_nodes(graph, invariant_inputs)
    while True:
        derived = _contains_contraction(invariant)
        frontier = [node for node in derived if any(user not in invariant for user in node.users)]
        refused = [node for node in frontier if not is_contraction(storage(node))]
        if not refused:
            return tuple(dict.fromkeys(map(storage, frontier)))
        invariant = _without(invariant, refused)


def _without(invariant: dict[fx.Node, None], refused: list[fx.Node]) -> dict[fx.Node, None]:
    """Return the invariant nodes except `refused` and all nodes that are computed from these."""
    gone = set(refused)
    for node in invariant:
        if any(argument in gone for argument in node.all_input_nodes):
            gone.add(node)
    return dict.fromkeys(node for node in invariant if node not in gone)


def storage(node: fx.Node) -> fx.Node:
    """Return the node whose memory `node` is a view of; the node itself if it is no view."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def invariant_nodes(graph: fx.Graph, inputs: Iterable[int]) -> dict[fx.Node, None]:
    """Return the nodes that depend only on the inputs at the positions `inputs` and on tensor sizes, in graph order.

    Other number inputs are not invariant, because they may differ in each step, as a timestep does.
    """
    inputs = set(inputs)
    placeholders = graph.find_nodes(op="placeholder")
    sizes = _sizes(placeholders)
    invariant = dict.fromkeys(node for i, node in enumerate(placeholders) if i in inputs or _is_size(node, sizes))
    for node in graph.nodes:
        computed = node.op == "call_function" and _may_move(node)
        if node.op == "get_attr" or (computed and all(argument in invariant for argument in _read(node))):
            invariant[node] = None
    return invariant


def _read(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that the values of `node` depend on. `full_like` and similar ops read only a shape."""
    likes = node.args[0] if packet(node) in _SHAPED else None
    return [argument for argument in node.all_input_nodes if argument is not likes]


def _sizes(placeholders: Iterable[fx.Node]) -> set[sympy.Symbol]:
    """Return the symbols in the shapes and strides of the tensors among `placeholders`."""
    tensors = (value for node in placeholders if isinstance(value := node.meta.get("val"), Tensor))
    numbers = (number for tensor in tensors for number in (*tensor.shape, *tensor.stride()))
    return {s for number in numbers if isinstance(number, torch.SymInt) for s in number.node.expr.free_symbols}


def _is_size(node: fx.Node, sizes: set[sympy.Symbol]) -> bool:
    """Return whether an input is a number that follows from tensor sizes, or neither a tensor nor a number."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value.node.expr.free_symbols <= sizes
    return not isinstance(value, Tensor | int | float)


def _may_move(node: fx.Node) -> bool:
    """Return whether `node` may be hoisted: it is pure, deterministic, and has no data-dependent size."""
    tags = getattr(node.target, "tags", ())
    if node.is_impure() or torch.Tag.nondeterministic_seeded in tags or torch.Tag.dynamic_output_shape in tags:
        return False
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(part, Tensor) and not is_unbacked(part) for part in parts)


def _contains_contraction(invariant: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """Return the invariant nodes that are, or are computed from, a contraction."""
    derived: dict[fx.Node, None] = {}
    for node in invariant:
        if node.op == "call_function" and (is_contraction(node) or any(arg in derived for arg in node.all_input_nodes)):
            derived[node] = None
    return derived
