"""Selections of consecutive elements along one dimension, and what they pick of a cat or a pad."""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any

from torch import fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import aten, packet

_SLICE = (0, None, None, 1)  # what aten.slice takes for what is not given
Crop = tuple[int, Any, Any]  # a dimension, and where along it a part begins and ends


def crop_of(node: fx.Node) -> Crop | None:
    """Which part of its operand a slice, or an item of a split, is."""
    if packet(node) is aten.slice:
        given: list[Any] = [*node.args[1:], *_SLICE[len(node.args) - 1 :]]
        return (given[0], given[1] or 0, given[2]) if given[3] == 1 else None
    split = node.args[0] if node.target is getitem else None
    if not isinstance(split, fx.Node) or packet(split) not in (aten.split, aten.split_with_sizes):
        return None
    sizes: Any = split.args[1]
    item: Any = node.args[1]
    dim: Any = split.args[2] if len(split.args) > 2 else 0
    if packet(split) is aten.split:  # into parts of one size, but for the last
        return (dim, item * sizes, (item + 1) * sizes) if isinstance(sizes, int) else None
    start = sum(sizes[:item])
    return (dim, start, start + sizes[item])


def is_all(node: fx.Node, crop: Crop) -> bool:
    """A selection that leaves nothing out: under dynamic shapes ``x[:, n:]`` has one along its first dimension."""
    dim, start, end = crop
    size = cost.shape(node.meta["val"])[dim]
    return cost.position(start, size) == 0 and cost.position(end, size) == size


def part_of(node: fx.Node, crop: Crop) -> tuple[fx.Node | None, Crop | None]:
    """The operand of a cat or pad in which a selection lies, and what it selects of it unless that is all."""
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
    """The operands of a cat or pad that lie one behind the other along a dimension, and the padding before each."""
    rank = node.meta["val"].ndim
    operands, given = node.args[:2] if len(node.args) > 1 else (node.args[0], 0)
    axis: Any = rank - 1 - dim % rank  # from behind, as padding is given
    if packet(node) is aten.cat:
        if isinstance(given, int) and given % rank == dim % rank:
            yield from ((part, 0) for part in operands)  # type: ignore[union-attr, misc]
    elif all(n == 0 for k, n in enumerate(given) if k // 2 != axis):  # type: ignore[arg-type]
        yield operands, given[2 * axis]  # type: ignore[misc, index]
