"""Structural hashes of straight-line graphs, with which identical blocks of a model share compiled code."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import SymInt, Tensor, fx

from dit_rewrite.passes.analysis.graph import attribute


def structure(gm: fx.GraphModule) -> Hashable:
    """Return a key that is equal for graphs with equal ops and equal shapes, strides, dtypes and devices of inputs."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    return tuple(_describe(gm, node, number) for node in gm.graph.nodes)


def _describe(gm: fx.GraphModule, node: fx.Node, number: dict[fx.Node, int]) -> Hashable:
    if node.op == "placeholder":
        return "placeholder", _value(node.meta.get("val"))
    if node.op == "get_attr":
        return "get_attr", id(attribute(gm, node))  # the graphs keep the attribute alive, so the id is unique
    target = node.target if node.op == "call_function" else node.op
    return target, _freeze(node.args, number), _freeze(node.kwargs, number)


def _freeze(argument: Any, number: dict[fx.Node, int]) -> Hashable:
    if isinstance(argument, fx.Node):
        return "node", number[argument]
    if isinstance(argument, (tuple, list)):
        return tuple(_freeze(item, number) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _freeze(item, number)) for name, item in argument.items())
    return type(argument).__name__, str(argument)  # 1, 1.0 and True are equal but not interchangeable


def _value(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        sizes = tuple(map(str, (*value.shape, "/", *value.stride(), "/", value.storage_offset())))
        return sizes, value.dtype, value.device, value.requires_grad
    return str(value) if isinstance(value, SymInt) else repr(value)
