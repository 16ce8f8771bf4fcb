"""The grid of an attention's tokens, where the graph shows that they are in row-major order of the latent's axes.

The proof has two parts. The dimension of the tokens is a product of one length per axis of the latent, in ascending
order: an op that cuts the image into windows, or puts the width before the height, leaves other factors. And no op
between the latent and the attention may shuffle tokens within a dimension: each one is pointwise, or has a rule for its
dimensions (views, products, convolutions, pieces), or normalises, or writes one of the concatenated parts anew. And
none of them may concatenate several pieces of one axis, or view tokens in a way that their dimension does not follow.
Nor may any op of the graph take two orders for one, as the sum of an image and its transpose does.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from dit_rewrite.passes.analysis.dimension_algebra import Dimension, Factor, product, size_of
from dit_rewrite.passes.analysis.dimension_rules import RULES, SPLITS, view
from dit_rewrite.passes.analysis.dimensions import Dimensions
from dit_rewrite.passes.analysis.graph import aten, is_contraction, is_copy, is_view, operands, packet

KEEPS_ORDER = {
    aten.native_layer_norm, aten.native_group_norm, aten.layer_norm, aten.group_norm, aten.rms_norm,
    aten._fused_rms_norm, aten._softmax, aten.softmax, aten.view_as_complex, aten.view_as_real, aten.copy,
}  # fmt: skip


class TokenGrid(NamedTuple):
    """The sizes of the grid, (H, W) or (T, H, W), and the number of tokens of text before it and behind it."""

    prefix: int
    sizes: tuple[int, ...]
    suffix: int


def token_grid(core: fx.Node, latent: fx.Node, dimensions: Dimensions) -> TokenGrid | None:
    """Return the grid of the tokens of an attention op, or None if the graph does not show it for query and key alike.

    `latent` is the input that the image comes from, `dimensions` are those of the graph.
    """
    given = operands(core)[:2]
    if any(type(node.meta["val"].shape[2]) is not int for node in given) or _joins_orders(latent, dimensions):
        return None
    found = {_grid(dimensions.of(node)[2], latent, dimensions) for node in given}
    if len(found) != 1 or not all(_keeps_order(node, latent, dimensions) for node in given):
        return None
    return found.pop()


def _grid(tokens: Dimension, latent: fx.Node, dimensions: Dimensions) -> TokenGrid | None:
    parts = list(_concatenated(tokens))
    axes = [_axes(part, latent, dimensions) for part in parts]
    image = [i for i, found in enumerate(axes) if found]
    if len(image) != 1:
        return None
    (place,) = image
    sizes = [size_of(part) for part in parts]
    return TokenGrid(sum(sizes[:place]), axes[place], sum(sizes[place + 1 :]))


def _concatenated(tokens: Dimension) -> Iterator[Dimension]:
    """Yield the dimensions that were concatenated to one, in order, or the dimension itself."""
    factors = [factor for factor in tokens if factor.size > 1]
    if len(factors) == 1 and factors[0].parts:
        for part in factors[0].parts:
            yield from _concatenated(part)
    else:
        yield tuple(factors)


def _axes(tokens: Dimension, latent: fx.Node, dimensions: Dimensions) -> tuple[int, ...]:
    """Return the sizes of a dimension that is a product of lengths along ascending axes of the latent, else ()."""
    axes = [_axis(factor, latent, dimensions) for factor in tokens]
    known = [axis for axis in axes if axis is not None]
    ascending = all(a < b for a, b in zip(known, known[1:], strict=False))
    return tuple(factor.size for factor in tokens) if len(known) == len(axes) and ascending else ()


def _joins_orders(latent: fx.Node, dimensions: Dimensions) -> bool:
    """Return whether some op requires two dimensions along different axes of the latent, or along the same axes in
    another order, to be equal. Its result has the tokens of both orders."""
    for pair in dimensions.equated:
        one, other = ([_axis(f, latent, dimensions, True) for f in each if f.size > 1] for each in pair)
        if one != other and None not in (*one, *other):
            return True
    return False


def _axis(factor: Factor, latent: fx.Node, dimensions: Dimensions, before: bool = False) -> int | None:
    """Return the axis of the latent that a factor measures, without the batch; None if it measures something else.

    `before`: before equal axes were given one symbol.
    """
    symbols = factor.expression.free_symbols
    if not (before and symbols and symbols <= dimensions.origin.keys()):
        symbols = dimensions.resolved(factor.expression).free_symbols
    origins = [dimensions.origin.get(symbol) for symbol in symbols]
    name, axis = origins[0] if len(origins) == 1 and origins[0] is not None else ("", 0)
    return axis if name == latent.name and axis > 0 else None


def _keeps_order(node: fx.Node, latent: fx.Node, dimensions: Dimensions) -> bool:
    """Return whether no op on any way from the latent to `node` may shuffle tokens."""
    behind, seen = {latent}, set[fx.Node]()
    for each in node.graph.nodes:
        if each not in behind and any(source in behind for source in each.all_input_nodes):
            behind.add(each)
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in seen or each is latent or each not in behind:
            continue
        seen.add(each)
        ordered = _is_ordered(each) and _is_followed(each, dimensions) or _writes_a_part(each, dimensions)
        if not ordered or _joins_pieces(each, latent, dimensions):
            return False
        waiting += each.all_input_nodes
    return True


def _is_ordered(node: fx.Node) -> bool:
    of = packet(node)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    known = of in RULES or of in SPLITS or of in KEEPS_ORDER or node.target is getitem
    return pointwise or known or is_contraction(node) or is_view(node) or is_copy(node)


def _is_followed(node: fx.Node, dimensions: Dimensions) -> bool:
    """Return whether a node is no view with other factors than its operand: one that divides the axes anew."""
    if RULES.get(packet(node)) is not view:
        return True
    before, after = (dimensions.of(each) for each in (node.args[0], node))
    sizes = [dimensions.resolved(product(tuple(f for each in shape for f in each))) for shape in (before, after)]
    return bool(sizes[0] == sizes[1])


def _joins_pieces(node: fx.Node, latent: fx.Node, dimensions: Dimensions) -> bool:
    """Return whether a node concatenates several pieces of an axis of the latent. They may be in any order, and their
    length alone does not show it: every second row, and then the others, are as many as all rows."""
    if packet(node) is not aten.cat:
        return False
    joined = (factor for dimension in dimensions.of(node) for factor in dimension)
    return any(sum(any(_axis(f, latent, dimensions) for f in part) for part in each.parts) > 1 for each in joined)


def _writes_a_part(node: fx.Node, dimensions: Dimensions) -> bool:
    """Return whether a node replaces one of the concatenated parts of a tensor by a tensor of the same dimension."""
    if packet(node) is not aten.slice_scatter or node.kwargs:
        return False
    base, source = (dimensions.of(argument) for argument in node.args[:2])
    axis: Any = node.args[2] if len(node.args) > 2 else 0
    start: Any = node.args[3] if len(node.args) > 3 else None
    if len(node.args) > 5 or not isinstance(start, int | None) or len(base[axis]) != 1:
        return False
    begin = 0
    for part in base[axis][0].parts:
        if begin == (start or 0) and size_of(part) == size_of(source[axis]):
            return dimensions.resolved(product(part)) == dimensions.resolved(product(source[axis]))
        begin += size_of(part)
    return False
