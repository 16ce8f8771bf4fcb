"""Costs of nodes: FLOPs by ATen's formulas, bytes by storage. Of sizes that depend on data they are upper bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis.graph import PRODUCTS, operands, packet
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.torch_compat import tree_map


def hint(size: int | torch.SymInt) -> int:
    """Return `size`, or its hint from the trace if it is symbolic (0 if there is none). Adds no Dynamo guard."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.hint is not None else 0


def largest(size: int | torch.SymInt) -> int:
    """Return `size` or its hint; for a size that depends on data, its maximum (0 if there is none)."""
    if isinstance(size, int) or size.node.hint is not None:
        return hint(size)
    most = torch_compat.value_bounds(size)[1]
    return int(most) if most.is_Integer else 0


def position(index: int | torch.SymInt | fx.Node | None, size: int) -> int:
    """Return `index` along an axis of length `size`, normalised to 0 .. size. None means the end."""
    if index is None:
        return size
    number = hint(index.meta["val"] if isinstance(index, fx.Node) else index)
    return min(number + size if number < 0 else number, size)


def shape(value: Tensor) -> tuple[int, ...]:
    """Return the shape of `value`, with hints for symbolic sizes."""
    return tuple(map(hint, value.shape))


def flops(nodes: Iterable[fx.Node]) -> int:
    """Return the floating-point operations of the contractions among `nodes`. A multiply-add counts as two."""
    return sum(int(contraction_flops(node, _shape)) for node in nodes)


def contraction_flops(node: fx.Node, shape_of: Callable[[fx.Node], Sequence[Any]]) -> Any:
    """Return the floating-point operations of a node, 0 unless it is a contraction, from the shapes of its operands.

    The sizes that `shape_of` returns may be numbers or sympy expressions.
    """
    if node.target is opaque_attention.OP:
        return sdpa_flop_count(*map(shape_of, operands(node)))
    formula = flop_registry.get(packet(node))
    if formula is None:
        return _product_flops(node, shape_of) if packet(node) in PRODUCTS else 0

    def replaced(argument: Any) -> Any:  # FLOP formulas take shapes in the place of tensors
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        return shape_of(argument) if isinstance(argument, fx.Node) and isinstance(value, Tensor) else argument

    args, kwargs, out = tree_map(replaced, (node.args, node.kwargs, node))
    return formula(*args, **kwargs, out_val=out)


def _product_flops(node: fx.Node, shape_of: Callable[[fx.Node], Sequence[Any]]) -> Any:
    return 2 * shape_of(node.all_input_nodes[0])[-1] * math.prod(shape_of(node))


def _shape(node: fx.Node) -> torch.Size:
    return torch.Size(map(largest, node.meta["val"].shape))


def numel(value: Tensor) -> int:
    """Return the number of elements of `value`, as `largest` gives its symbolic sizes."""
    return torch.Size(map(largest, value.shape)).numel()


def stored_bytes(node: fx.Node) -> int:
    """Return the bytes of the storage of the node's value, which a slot keeps alive. It may exceed those of a view."""
    value = node.meta["val"]
    return largest(value.untyped_storage().nbytes())


def tensor_bytes(node: fx.Node) -> int:
    """Bytes of the elements of the node's value, laid out without gaps."""
    return numel(node.meta["val"]) * int(node.meta["val"].element_size())


def vectors(node: fx.Node) -> int:
    """How many vectors along the last dimension the node's value holds."""
    return torch.Size(shape(node.meta["val"])[:-1]).numel()


def total_flops(graph: fx.Graph) -> int:
    """Return the FLOPs of a graph."""
    return flops(graph.nodes)
