"""Keep float arguments as graph inputs, so that a model whose time is a Python number does not recompile at each step.

Dynamo passes a float as a 0-dimensional tensor and calls its `item`. AOTAutograd turns arithmetic on the number into
arithmetic on the tensor, but makes the number a constant if an op fills a tensor with it. This pass replaces such an op
by a sum of zeros and the number, which gives the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dit_rewrite.torch_compat import scalar_tensor_decompositions

_LIST = (torch.tensor, torch.scalar_tensor, *scalar_tensor_decompositions)


def keep_floats(gm: fx.GraphModule) -> int:
    """Rewrite the ops of Dynamo's graph that fill a tensor with a float input. Returns how many were rewritten."""
    items = [node for node in gm.graph.find_nodes(op="call_method", target="item") if _is_input(node.args[0])]
    count = 0
    for item in items:
        for user in list(item.users):
            fill = _FILLS.get(user.target) if _is_float(user) else None
            filled = None if fill is None else fill(gm.graph, user, item)
            if filled is not None:
                user.replace_all_uses_with(filled)
                gm.graph.erase_node(user)
                count += 1
    if count:
        gm.recompile()
    return count


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _is_float(node: fx.Node) -> bool:
    """Return whether an op makes a floating-point tensor. An integer tensor plus a float would have another dtype."""
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _expanded(graph: fx.Graph, node: fx.Node, item: fx.Node, shape: Any, dtype: Any, device: Any) -> fx.Node:
    """Return a node that makes a tensor of the given shape filled with `item`."""
    with graph.inserting_before(node):
        zeros = graph.call_function(torch.zeros, (shape,), {"dtype": dtype, "device": device})
        return graph.call_function(torch.add, (zeros, item))


def _like(graph: fx.Graph, node: fx.Node, item: fx.Node, like: fx.Node, shape: Any = None) -> fx.Node:
    """Return a node that makes a tensor with the dtype, device and shape of `like`, filled with `item`."""
    with graph.inserting_before(node):
        shape = graph.call_method("size", (like,)) if shape is None else shape
        kwargs = {k: node.kwargs.get(k) or graph.call_function(getattr, (like, k)) for k in ("dtype", "device")}
    return _expanded(graph, node, item, shape, **kwargs)


def _default(node: fx.Node) -> tuple[Any, Any]:
    """Return the dtype and device arguments of an op, or torch's defaults."""
    return node.kwargs.get("dtype") or torch.get_default_dtype(), node.kwargs.get(
        "device"
    ) or torch.get_default_device()


def _full(graph: fx.Graph, node: fx.Node, item: fx.Node) -> fx.Node | None:
    given = dict(zip(("size", "fill_value"), node.args, strict=False)) | node.kwargs
    return _expanded(graph, node, item, given["size"], *_default(node)) if given.get("fill_value") is item else None


def _full_like(graph: fx.Graph, node: fx.Node, item: fx.Node) -> fx.Node | None:
    given = dict(zip(("input", "fill_value"), node.args, strict=False)) | node.kwargs
    like: Any = given["input"]
    return _like(graph, node, item, like) if given.get("fill_value") is item else None


def _new_full(graph: fx.Graph, node: fx.Node, item: fx.Node) -> fx.Node | None:
    given = dict(zip(("self", "size", "fill_value"), node.args, strict=False)) | node.kwargs
    like: Any = given["self"]
    return _like(graph, node, item, like, given["size"]) if given.get("fill_value") is item else None


def _tensor(graph: fx.Graph, node: fx.Node, item: fx.Node) -> fx.Node | None:
    value = node.args[0] if node.args else None
    depth = 0
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value, depth = value[0], depth + 1
    return _expanded(graph, node, item, (1,) * depth, *_default(node)) if value is item else None


_FILLS: dict[Any, Callable[[fx.Graph, fx.Node, fx.Node], fx.Node | None]] = {
    torch.full: _full,
    torch.full_like: _full_like,
    "new_full": _new_full,
    **dict.fromkeys(_LIST, _tensor),
}
