"""How the dimensions of an op's result follow from those of its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from dit_rewrite.passes.analysis.dimension_algebra import (
    Dimension,
    Factor,
    Shape,
    Sizes,
    constant,
    fixed,
    product,
    size_of,
)
from dit_rewrite.passes.analysis.graph import PRODUCTS, aten, operands, packet

Rule = Callable[[Sizes, fx.Node, list[int]], Shape | None]


def attention(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    """Query, key and value of shape (..., tokens, channels), and a mask that is broadcast to (..., queries, keys)."""
    query, key, value = (known.of(each) for each in operands(node))
    for one, other in (*zip(query[:-2], key[:-2], strict=True), *zip(key[:-2], value[:-2], strict=True)):
        known.equate(one, other, fixed=True)
    known.equate(query[-1], key[-1], fixed=True)
    known.equate(key[-2], value[-2])
    mask = known.of(node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"))
    for one, other in zip(reversed(mask), reversed((*query[:-1], key[-2])), strict=False):
        known.equate(one, other)
    return (*query[:-1], value[-1])


def pointwise(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    """Operands that are broadcast, or a result that is like its first operand."""
    broadcast = torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet(node) is aten.where
    read = [shape for argument in node.all_input_nodes if len(shape := known.of(argument)) <= len(sizes)]
    found = []
    for axis, size in enumerate(sizes):
        aligned = [shape[axis - len(sizes)] for shape in read if len(shape) >= len(sizes) - axis]
        equal = [dimension for dimension in aligned if size_of(dimension) == size]
        found.append(known.one_of(equal if broadcast else equal[:1]) if equal else known.fresh(size))
    return tuple(found)


def _contraction(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    """A matrix product of (..., m, k) and (..., k, n), or (n, k) for a linear layer."""
    first, second = (known.of(each) for each in operands(node))
    inner, outer = (-1, -2) if packet(node) is aten.linear else (-2, -1)
    known.equate(first[-1], second[inner], fixed=True)
    for one, other in zip(first[:-2], second[:-2], strict=False):
        known.equate(one, other, fixed=True)
    return (*first[:-1], fixed(second[outer]))


def _convolution(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    """Each position of the result is a window of the operand."""
    image, weight = known.of(node.args[0]), known.of(node.args[1])
    stride, padding, dilation, transposed, _, groups = node.args[3:9]
    if transposed:
        return (image[0], *map(known.fresh, sizes[1:]))
    if groups == 1:
        known.equate(image[1], weight[1], fixed=True)
    spatial = [
        _windows(image[2 + i], size_of(weight[2 + i]), *(_of_axis(each, i) for each in (stride, padding, dilation)))
        for i in range(len(sizes) - 2)
    ]
    return (image[0], fixed(weight[0]), *((Factor(e, size),) for e, size in zip(spatial, sizes[2:], strict=True)))


def _of_axis(setting: Any, axis: int) -> int:
    return int(setting[axis] if len(setting) > 1 else setting[0])


def _windows(length: Dimension, window: int, stride: int, padding: int, dilation: int) -> sympy.Expr:
    """Return the number of windows. Patches that divide the captured length are taken to divide every length."""
    whole = product(length)
    if stride == window and padding == 0 and dilation == 1 and size_of(length) % window == 0:
        return whole / window
    reach = whole + 2 * padding - dilation * (window - 1) - 1
    return (reach if stride == 1 else sympy.floor(reach / stride)) + 1


def view(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape | None:
    """The factors keep their order, and each dimension of the view takes the next of them."""
    factors = [factor for dimension in known.of(node.args[0]) for factor in dimension]
    found: list[list[Factor]] = []
    for size in sizes:
        taken, left = [], size
        if size == 1 and factors and factors[0].size == 1:
            taken.append(factors.pop(0))
        while left > 1:
            if not factors:
                return None
            factor = factors.pop(0)
            if left % factor.size and factor.size % left:
                return None
            if left % factor.size:  # the inner part of a divided dimension is fixed: a window, or a head
                inner = factor.size // left
                factors.insert(0, Factor(sympy.Integer(inner), inner, fixed=factor.fixed))
                factor = Factor(factor.expression / inner, left, fixed=factor.fixed)
            taken.append(factor)
            left //= factor.size
        found.append(taken)
    if found:
        found[-1] += factors  # only factors of size 1 are left
    return tuple(map(tuple, found))


def _dim(node: fx.Node, position: int, rank: int, otherwise: int = 0) -> int:
    given: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", otherwise)
    return int(given) % max(rank, 1)


def _transpose(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape = list(known.of(node.args[0]))
    if packet(node) is aten.t:
        return tuple(reversed(shape))
    a, b = (_dim(node, position, len(shape)) for position in (1, 2))
    shape[a], shape[b] = shape[b], shape[a]
    return tuple(shape)


def _permute(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape = known.of(node.args[0])
    return tuple(shape[i] for i in node.args[1])  # type: ignore[union-attr,index,misc]


def _unsqueeze(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape, axis = known.of(node.args[0]), _dim(node, 1, len(sizes))
    return (*shape[:axis], (), *shape[axis:])


def _squeeze(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape = known.of(node.args[0])
    given: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    axes = {axis % len(shape) for axis in ([given] if isinstance(given, int) else given)}
    return tuple(d for axis, d in enumerate(shape) if axis not in axes or size_of(d) > 1)


def _expand(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape = known.of(node.args[0])
    shape = (*[()] * (len(sizes) - len(shape)), *shape)
    return tuple(d if size_of(d) == size else known.fresh(size) for d, size in zip(shape, sizes, strict=True))


def _cat(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shapes = [shape for each in node.args[0] if len(shape := known.of(each)) == len(sizes)]  # type: ignore[union-attr]
    axis = _dim(node, 1, len(sizes))
    found = [known.one_of([shape[i] for shape in shapes]) if i != axis else () for i in range(len(sizes))]
    parts = tuple(shape[axis] for shape in shapes)
    found[axis] = (Factor(sympy.Add(*map(product, parts)), sizes[axis], parts),)
    return tuple(found)


def _stack(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shapes, axis = [known.of(each) for each in node.args[0]], _dim(node, 1, len(sizes))  # type: ignore[union-attr]
    found = [known.one_of(equal) for equal in zip(*shapes, strict=True)]
    return (*found[:axis], constant(len(shapes)), *found[axis:])


def _slice(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape = list(known.of(node.args[0]))
    axis = _dim(node, 1, len(shape))
    start = node.args[2] if len(node.args) > 2 else None
    step = node.args[4] if len(node.args) > 4 else 1
    length = size_of(shape[axis])
    begin = _place(known, start, length, 0)
    if step == 1:
        shape[axis] = _piece(known, shape[axis], begin, sizes[axis])
    elif isinstance(step, int) and sizes[axis] * step == length:
        shape[axis] = (Factor(product(shape[axis]) / step, sizes[axis]),)
    else:
        shape[axis] = known.fresh(sizes[axis])
    return tuple(shape)


def _place(known: Sizes, index: Any, length: int, otherwise: int) -> int:
    index = index.meta["val"] if isinstance(index, fx.Node) else index
    place = otherwise if index is None else known.number(index)
    return max(place + length, 0) if place < 0 else min(place, length)


def _piece(known: Sizes, whole: Dimension, begin: int, size: int) -> Dimension:
    """Return the dimension of a piece: the whole, or some of the parts that were concatenated."""
    if size == size_of(whole):
        return whole
    if len(whole) == 1:
        ends = [0]
        for part in whole[0].parts:
            ends.append(ends[-1] + size_of(part))
        if begin in ends and begin + size in ends:
            parts = whole[0].parts[ends.index(begin) : ends.index(begin + size)]
            together = (Factor(sympy.Add(*map(product, parts)), size, parts),)
            return parts[0] if len(parts) == 1 else together
    return known.fresh(size)


def _select(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape = known.of(node.args[0])
    axis = _dim(node, 1, len(shape))
    return (*shape[:axis], *shape[axis + 1 :])


def _reduce(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    shape = known.of(node.args[0])
    given: Any = node.args[1] if len(node.args) > 1 else None
    axes = {axis % len(shape) for axis in ([given] if isinstance(given, int) else given or range(len(shape)))}
    kept = len(sizes) == len(shape)
    return tuple(() if axis in axes else d for axis, d in enumerate(shape) if kept or axis not in axes)


def _embedding(known: Sizes, node: fx.Node, sizes: list[int]) -> Shape:
    return (*known.of(node.args[1]), known.of(node.args[0])[-1])


def pieces(known: Sizes, node: fx.Node, sizes: Sequence[list[int]]) -> Iterator[Shape]:
    """Yield the shapes of the pieces of a tensor."""
    shape = known.of(node.args[0])
    drops = packet(node) is aten.unbind
    axis, begin = _dim(node, 1 if drops else 2, len(shape)), 0
    for piece in sizes:
        if drops:
            yield (*shape[:axis], *shape[axis + 1 :])
            continue
        yield (*shape[:axis], _piece(known, shape[axis], begin, piece[axis]), *shape[axis + 1 :])
        begin += piece[axis]


SPLITS = {aten.split, aten.split_with_sizes, aten.chunk, aten.unbind}
RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm, *PRODUCTS), _contraction),
    aten.convolution: _convolution,
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), view),
    **dict.fromkeys((aten.transpose, aten.t), _transpose),
    aten.permute: _permute,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.expand: _expand,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.slice: _slice,
    aten.select: _select,
    **dict.fromkeys((aten.mean, aten.sum, aten.amax, aten.amin, aten.var), _reduce),
    aten.embedding: _embedding,
}
