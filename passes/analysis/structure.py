"""When two straight-line graphs are the same code: identical blocks of a model share what was compiled for one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import SymInt, Tensor, fx

from dit_rewrite.passes.analysis.graph import attribute


def structure(gm: fx.GraphModule) -> Hashable:
    """Equal for graphs that compute the same of inputs of the same shapes, strides, dtypes and devices."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    return tuple(_describe(gm, node, number) for node in gm.graph.nodes)


def _describe(gm: fx.GraphModule, node: fx.Node, number: dict[fx.Node, int]) -> Hashable:
    if node.op == "placeholder":
        return "placeholder", _value(node.meta.get("val"))
    if node.op == "get_attr":
        return "get_attr", id(attribute(gm, node))  # held by both graphs, so that no other takes its id
    target = node.target if node.op == "call_function" else node.op
    return target, _freeze(node.args, number), _freeze(node.kwargs, number)


def _freeze(argument: Any, number: dict[fx.Node, int]) -> Hashable:
    if isinstance(argument, fx.Node):
        return "node", number[argument]
    if isinstance(argument, (tuple, list)):
        return tuple(_freeze(item, number) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _freeze(item, number)) for name, item in argument.items())
    return type(argument).__name__, str(argument)  # 1, 1.0 and True are equal, and not the same


def _value(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        sizes = tuple(map(str, (*value.shape, "/", *value.stride(), "/", value.storage_offset())))
        return sizes, value.dtype, value.device, value.requires_grad
    return str(value) if isinstance(value, SymInt) else repr(value)
