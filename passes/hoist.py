"""Pass 01: what does not depend on the step is computed once per trajectory. Lossless.

A node is steady when it depends on nothing but weights and inputs that stay the same within a trajectory: text K and V,
caption projections, RoPE tables, condition encoders. The steady values that others read, and that are worth keeping,
make one site of their own, whose guard is that those inputs are the same objects as before, unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from dit_rewrite.passes import cost
from dit_rewrite.passes.graph import aten, is_contraction, packet

LARGE = 16384  # elements: below that nobody would notice
# Besides matrix products: what costs more than reading its result back does.
_DEAR = {
    aten.sin, aten.cos, aten.exp, aten.log, aten.pow, aten.tanh, aten.sigmoid, aten.silu, aten.gelu, aten.embedding,
    aten.index, aten.gather, aten.native_layer_norm, aten.native_group_norm, aten._softmax, aten.polar, aten.repeat,
}  # fmt: skip


def steady_values(graph: fx.Graph, steady_inputs: Iterable[int]) -> tuple[fx.Node, ...]:
    """The nodes to compute once per trajectory; `steady_inputs` are the positions of weights and steady inputs.

    Hoisted is what pays: a tensor that took something dear to make, and that something unsteady reads. All else that is
    steady (views of weights, small sums) is left where it is; no such node depends on a dear one.
    """
    steady = _steady(graph, set(steady_inputs))
    dear = _dear(steady)
    return tuple(node for node in steady if node in dear and any(user not in steady for user in node.users))


def _steady(graph: fx.Graph, inputs: set[int]) -> dict[fx.Node, None]:
    """The steady nodes, in the order of the graph."""
    placeholders = graph.find_nodes(op="placeholder")
    steady = dict.fromkeys(node for i, node in enumerate(placeholders) if i in inputs or not _is_tensor(node))
    for node in graph.nodes:
        computed = node.op == "call_function" and _may_move(node)
        if node.op == "get_attr" or (computed and all(argument in steady for argument in node.all_input_nodes)):
            steady[node] = None
    return steady


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _may_move(node: fx.Node) -> bool:
    """Not what draws random numbers or acts on something, nor what has a size that only its data tell."""
    tags = getattr(node.target, "tags", ())
    if node.is_impure() or torch.Tag.nondeterministic_seeded in tags or torch.Tag.dynamic_output_shape in tags:
        return False
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(part, Tensor) and not _unbacked(part) for part in parts)


def _unbacked(value: Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(value))


def _dear(steady: dict[fx.Node, None]) -> set[fx.Node]:
    """The steady nodes that took a contraction to make, or a dear function of many elements."""
    dear: set[fx.Node] = set()
    for node in steady:
        made = is_contraction(node) or (packet(node) in _DEAR and _is_large(node))
        if node.op == "call_function" and (made or any(argument in dear for argument in node.all_input_nodes)):
            dear.add(node)
    return dear


def _is_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and math.prod(cost.shape(value)) >= LARGE
