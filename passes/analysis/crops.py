"""Crops: selections of consecutive elements along one dimension, and the operand of a cat or pad that they select."""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any

from torch import fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import aten, packet

_SLICE = (0, None, None, 1)  # default arguments of aten.slice
Crop = tuple[int, Any, Any]  # dimension, start, end


def crop_of(node: fx.Node) -> Crop | None:
    """Return the crop that a slice, or an item of a split, selects of its operand. None for any other node."""
    if packet(node) is aten.slice:
        given: list[Any] = [*node.args[1:], *_SLICE[len(node.args) - 1 :]]
        return (given[0], given[1] or 0, given[2]) if given[3] == 1 else None
    split = node.args[0] if node.target is getitem else None
    if not isinstance(split, fx.Node) or packet(split) not in (aten.split, aten.split_with_sizes):
        return None
    sizes: Any = split.args[1]
    item: Any = node.args[1]
    dim: Any = split.args[2] if len(split.args) > 2 else 0
    if packet(split) is aten.split:  # all parts except the last have the same size
        return (dim, item * sizes, (item + 1) * sizes) if isinstance(sizes, int) else None
    start = sum(sizes[:item])
    return (dim, start, start + sizes[item])


def is_all(node: fx.Node, crop: Crop) -> bool:
    """Return whether `crop` selects all of `node`, as ``x[:, n:]`` does along dim 0 under dynamic shapes."""
    dim, start, end = crop
    size = cost.shape(node.meta["val"])[dim]
    return cost.position(start, size) == 0 and cost.position(end, size) == size


def part_of(node: fx.Node, crop: Crop) -> tuple[fx.Node | None, Crop | None]:
    """Return the operand of a cat or pad that contains `crop`, and the crop of that operand (None if all of it).

    Returns (None, None) if no operand contains all of the crop.
    """
    dim, *ends = crop
    total = cost.shape(node.meta["val"])[dim]
    start, end = (cost.position(index, total) for index in ends)
    at = 0
    for part, padding in _parts(node, dim):
        at += padding
        length = cost.shape(part.meta["val"])[dim]
        if at <= start and end <= at + length:
            return part, None if (start, end) == (at, at + length) else (dim, start - at, end - at)
        at += length
    return None, None


def _parts(node: fx.Node, dim: int) -> Iterator[tuple[fx.Node, int]]:
    """Yield the operands of a cat or pad along a dimension, each with the size of the padding before it."""
    rank = node.meta["val"].ndim
    operands, given = node.args[:2] if len(node.args) > 1 else (node.args[0], 0)
    axis: Any = rank - 1 - dim % rank  # counted from the last dimension, as in the argument of a pad
    if packet(node) is aten.cat:
        if isinstance(given, int) and given % rank == dim % rank:
            yield from ((part, 0) for part in operands)  # type: ignore[union-attr, misc]
    elif all(n == 0 for k, n in enumerate(given) if k // 2 != axis):  # type: ignore[arg-type]
        yield operands, given[2 * axis]  # type: ignore[misc, index]
