"""Pass 01: what does not depend on the step is computed once per trajectory. Lossless.

A node is steady when it depends on nothing but weights and inputs that stay the same within a trajectory: text K and V,
caption projections, condition encoders. The steady values that others read, and that are worth keeping, make one site
of their own, whose guard is that those inputs are the same objects as before, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
import torch
from torch import Tensor, fx

from dit_rewrite.passes.analysis.graph import aten, is_contraction, is_view, packet
from dit_rewrite.passes.analysis.unbacked import is_unbacked

_SHAPED = {aten.full_like, aten.zeros_like, aten.ones_like, aten.new_full, aten.new_zeros, aten.new_ones}


def invariant_values(graph: fx.Graph, steady_inputs: Iterable[int]) -> tuple[fx.Node, ...]:
    """Return the nodes to compute once per trajectory; `steady_inputs` are the positions of weights and conditioning.

    Hoist only values derived from a contraction that a node outside the invariant ones reads, and only the results of
    contractions themselves: elementwise ops on them stay in each step, since a kernel of their own could round
    differently from one that fuses them with their reader, and hoisting must not change a bit.
    """
    steady = invariant_nodes(graph, steady_inputs)
    while True:
        frontier = [node for node in _dear(steady) if any(user not in steady for user in node.users)]
        refused = [node for node in frontier if not is_contraction(storage(node))]
        if not refused:
            return tuple(dict.fromkeys(map(storage, frontier)))  # views of them are free in each step
        steady = _without(steady, refused)


def _without(steady: dict[fx.Node, None], refused: list[fx.Node]) -> dict[fx.Node, None]:
    """The steady nodes less the refused ones and all that is computed from them."""
    gone = set(refused)
    for node in steady:
        if any(argument in gone for argument in node.all_input_nodes):
            gone.add(node)
    return dict.fromkeys(node for node in steady if node not in gone)


def storage(node: fx.Node) -> fx.Node:
    """Return the node whose memory `node` is a view of; the node itself if it is no view."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def invariant_nodes(graph: fx.Graph, inputs: Iterable[int]) -> dict[fx.Node, None]:
    """The nodes that depend on these inputs and on sizes of tensors alone, in the order of the graph.

    A number that is no size may be another one in each step, as a timestep is.
    """
    inputs = set(inputs)
    placeholders = graph.find_nodes(op="placeholder")
    sizes = _sizes(placeholders)
    steady = dict.fromkeys(node for i, node in enumerate(placeholders) if i in inputs or _is_size(node, sizes))
    for node in graph.nodes:
        computed = node.op == "call_function" and _may_move(node)
        if node.op == "get_attr" or (computed and all(argument in steady for argument in _read(node))):
            steady[node] = None
    return steady


def _read(node: fx.Node) -> list[fx.Node]:
    """What a node's values depend on: not the tensor of which `full_like` and its kind take nothing but the shape."""
    likes = node.args[0] if packet(node) in _SHAPED else None
    return [argument for argument in node.all_input_nodes if argument is not likes]


def _sizes(placeholders: Iterable[fx.Node]) -> set[sympy.Symbol]:
    """The symbols in the shapes and strides of the tensors among some inputs."""
    tensors = (value for node in placeholders if isinstance(value := node.meta.get("val"), Tensor))
    numbers = (number for tensor in tensors for number in (*tensor.shape, *tensor.stride()))
    return {s for number in numbers if isinstance(number, torch.SymInt) for s in number.node.expr.free_symbols}


def _is_size(node: fx.Node, sizes: set[sympy.Symbol]) -> bool:
    """Whether an input is no tensor, and no number but one that follows from the sizes of tensors."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value.node.expr.free_symbols <= sizes
    return not isinstance(value, Tensor | int | float)


def _may_move(node: fx.Node) -> bool:
    """Not what draws random numbers or acts on something, nor what has a size that only its data tell."""
    tags = getattr(node.target, "tags", ())
    if node.is_impure() or torch.Tag.nondeterministic_seeded in tags or torch.Tag.dynamic_output_shape in tags:
        return False
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(part, Tensor) and not is_unbacked(part) for part in parts)


def _dear(steady: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """The steady nodes that took a contraction to make."""
    dear: dict[fx.Node, None] = {}
    for node in steady:
        if node.op == "call_function" and (is_contraction(node) or any(arg in dear for arg in node.all_input_nodes)):
            dear[node] = None
    return dear
