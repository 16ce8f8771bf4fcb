"""Rules of rows.py: for each op, the parts of its operands that some tokens of its result need.

A rule gets a call and the place of the tokens in its result. It returns each operand with the place of the tokens in
it, or with None if the operand is needed as a whole; or it returns None if a token of the result depends on other
tokens of an operand, or if that is not proven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dit_rewrite.passes.analysis.attention_sites import arguments
from dit_rewrite.passes.analysis.graph import PRODUCTS, aten, operands, packet
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.rewrite.batch_rules import schema_arguments, tensor
from dit_rewrite.torch_compat import OpOverload


class Place(NamedTuple):
    """Where the tokens are in a value: in dimension `dim`, whose size is outer * tokens * inner in row-major order."""

    dim: int
    outer: int = 1
    inner: int = 1

    def at(self, dim: int) -> Place:
        """Return the same place in another dimension."""
        return self._replace(dim=dim)


Needs = list[tuple[fx.Node, Place | None]]


@dataclass(frozen=True)
class Rows:
    """A call of which some of the `tokens` are needed, at `place` of its result."""

    node: fx.Node
    place: Place
    tokens: int

    def argument(self, name: str) -> Any:
        """Return the argument called `name` in the schema, or None."""
        return schema_arguments(self.node).get(name)

    @property
    def result(self) -> Tensor:
        """The result, or the first member of a tuple. Members differ only in dimensions without tokens."""
        return tensor(self.node)  # type: ignore[return-value]

    @property
    def first(self) -> Tensor:
        return tensor(self.node.all_input_nodes[0])  # type: ignore[return-value]

    def of_first(self, dim: int, *others: fx.Node) -> Needs:
        """Return the tokens in dimension `dim` of the first operand, and all of the others."""
        return [(self.node.all_input_nodes[0], self.place.at(dim)), *((other, None) for other in others)]


def rule_of(node: fx.Node) -> Callable[[Rows], Needs | None]:
    """Return the rule of a node's op. The rule of an unknown op proves nothing."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or not isinstance(node.target, OpOverload):
        return _unknown
    return _RULES.get(packet(node), _broadcast if torch.Tag.pointwise in tags else _unknown)


def resized(node: fx.Node, place: Place, count: int) -> tuple[Any, tuple[Any, ...]]:
    """Return the target and the arguments of a call for `count` tokens. Views become reshapes, because the tokens that
    were gathered lie in memory otherwise than all of them."""
    if packet(node) not in _SIZED:
        return node.target, node.args
    operand, sizes, *rest = node.args
    sizes = list(sizes)  # type: ignore[arg-type]
    sizes[place.dim] = place.outer * count * place.inner
    return node.target if packet(node) is aten.expand else aten.reshape.default, (operand, sizes, *rest)


def _unknown(rows: Rows) -> None:
    return None


def _size(value: Tensor, dim: int) -> int | None:
    """Return a size, or None if it is symbolic."""
    size = value.shape[dim]
    return size if type(size) is int else None


def _aligned(rows: Rows, operand: fx.Node, place: Place) -> tuple[bool, Place | None]:
    """Return whether an operand that is broadcast to the result has the tokens at `place` or does not vary with them,
    and where."""
    value = operand.meta["val"]
    if not isinstance(value, Tensor):
        return True, None
    dim = place.dim - (rows.result.ndim - value.ndim)
    size = 1 if dim < 0 else _size(value, dim)
    if size == 1:
        return True, None
    return size == place.outer * rows.tokens * place.inner, place.at(dim)


def _broadcast(rows: Rows) -> Needs | None:
    found = [(operand, *_aligned(rows, operand, rows.place)) for operand in rows.node.all_input_nodes]
    return [(operand, place) for operand, _, place in found] if all(fits for _, fits, _ in found) else None


def _viewed(rows: Rows) -> Needs | None:
    """A view keeps the row-major order of elements, so the tokens keep their distance there."""
    after, before = rows.result.shape, rows.first.shape
    if not all(type(size) is int for size in (*after, *before)):
        return None
    distance = rows.place.inner * after[rows.place.dim + 1 :].numel()
    for dim, size in enumerate(before):
        step = before[dim + 1 :].numel()
        if step and distance % step == 0 and size >= rows.tokens and size % (distance // step * rows.tokens) == 0:
            inner = distance // step
            return [(rows.node.all_input_nodes[0], Place(dim, size // (inner * rows.tokens), inner))]
    return None


def _dims(rows: Rows, name: str, rank: int) -> set[int]:
    given = rows.argument(name)
    return {dim % rank for dim in ([given] if isinstance(given, int) else given or range(rank))}


def _reduces(rows: Rows) -> Needs | None:
    """A reduction over other dims."""
    rank = rows.first.ndim
    gone = _dims(rows, "dim", rank)
    kept = [dim for dim in range(rank) if rows.argument("keepdim") or dim not in gone]
    dim = kept[rows.place.dim]
    return None if dim in gone else rows.of_first(dim)


def _beside(rows: Rows) -> Needs | None:
    """The op acts along another dim, which all operands and results have."""
    if rows.place.dim in _dims(rows, "dim", rows.result.ndim):
        return None
    return [(operand, rows.place) for operand in rows.node.all_input_nodes]


def _selects(rows: Rows) -> Needs:
    (gone,) = _dims(rows, "dim", rows.first.ndim)
    return rows.of_first(rows.place.dim + (rows.place.dim >= gone))


def _inserts(rows: Rows) -> Needs | None:
    (new,) = _dims(rows, "dim", rows.result.ndim)
    if new == rows.place.dim:
        return None
    dim = rows.place.dim - (rows.place.dim > new)
    return [(operand, rows.place.at(dim)) for operand in rows.node.all_input_nodes]


def _squeezes(rows: Rows) -> Needs:
    before = rows.first.shape
    gone = _dims(rows, "dim", len(before))
    kept = [dim for dim in range(len(before)) if dim not in gone or _size(rows.first, dim) != 1]
    return rows.of_first(kept[rows.place.dim])


def _transposes(rows: Rows) -> Needs:
    rank = rows.result.ndim
    pair = (0, 1) if packet(rows.node) is aten.t else tuple(rows.argument(n) % rank for n in ("dim0", "dim1"))
    swapped = dict([pair, pair[::-1]])
    return rows.of_first(swapped.get(rows.place.dim, rows.place.dim))


def _permutes(rows: Rows) -> Needs:
    return rows.of_first(rows.argument("dims")[rows.place.dim] % rows.result.ndim)


def _slices(rows: Rows) -> Needs | None:
    """A slice along another dim, or one that selects all tokens."""
    if _size(rows.first, rows.place.dim) == rows.place.outer * rows.tokens * rows.place.inner:
        return [(operand, rows.place if i == 0 else None) for i, operand in enumerate(rows.node.all_input_nodes)]
    return None


def _multiplies(rows: Rows) -> Needs | None:
    """A product of rows and a matrix, with a bias that is broadcast."""
    left, right = operands(rows.node)
    if rows.place.dim == rows.result.ndim - 1 or rows.result.ndim != left.meta["val"].ndim:
        return None
    needs: Needs = [(left, rows.place), (right, None)]
    for other in set(rows.node.all_input_nodes) - {left, right}:
        fits, place = _aligned(rows, other, rows.place)
        if not fits:
            return None
        needs.append((other, place))
    return needs


def _multiplies_batch(rows: Rows) -> Needs | None:
    """A product for each entry of dim 0, where the tokens are the entries or the rows of the left factor."""
    if rows.place.dim:
        return _multiplies(rows)
    needs: Needs = [(operand, rows.place) for operand in operands(rows.node)]
    return needs if len(rows.node.all_input_nodes) == 2 else None


def _attends(rows: Rows) -> Needs | None:
    """Attention, where the tokens are the queries, or a dim that is treated separately."""
    given, rank, place = arguments(rows.node), rows.result.ndim, rows.place
    if place.dim == rank - 1 or given["is_causal"] or given["enable_gqa"]:
        return None
    separate = place.dim < rank - 2
    needs: Needs = [(given["query"], place)]
    needs += [(given[name], place if separate else None) for name in ("key", "value")]
    if isinstance(given["attn_mask"], fx.Node):
        fits, at = _aligned(rows, given["attn_mask"], place)
        if not fits:
            return None
        needs.append((given["attn_mask"], at))
    alike = all(operand.meta["val"].ndim == rank for operand, _ in needs[:3])
    return needs if alike else None


def _normalises(rows: Rows) -> Needs | None:
    if rows.place.dim >= rows.result.ndim - len(rows.argument("normalized_shape")):
        return None
    return rows.of_first(rows.place.dim, *rows.node.all_input_nodes[1:])


def _looks_up(rows: Rows) -> Needs | None:
    table, indices = rows.node.all_input_nodes
    return None if rows.place.dim == rows.result.ndim - 1 else [(table, None), (indices, rows.place)]


def _before_last(rows: Rows) -> Needs | None:
    """The op joins or divides the last dim of its operand."""
    return rows.of_first(rows.place.dim) if rows.place.dim < min(rows.result.ndim, rows.first.ndim - 1) else None


_SIZED = {aten.view, aten._unsafe_view, aten.reshape, aten.expand}
_GROUPS: dict[Callable[[Rows], Needs | None], tuple[Any, ...]] = {
    _broadcast: (
        aten._to_copy, aten.clone, aten.copy, aten.alias, aten.detach, aten.where, aten.masked_fill, aten.complex,
        aten.polar, aten._prelu_kernel, aten.zeros_like, aten.ones_like, aten.full_like, aten.expand,
    ),
    _viewed: (aten.view, aten._unsafe_view, aten.reshape),
    _reduces: (
        aten.sum, aten.mean, aten.var, aten.var_mean, aten.std, aten.amax, aten.amin, aten.linalg_vector_norm,
    ),
    _beside: (
        aten.cat, aten.split, aten.split_with_sizes, aten.chunk, aten.softmax, aten._softmax, aten._log_softmax,
        aten.glu, aten.cumsum,
    ),
    _selects: (aten.select, aten.unbind),
    _inserts: (aten.unsqueeze, aten.stack),
    _squeezes: (aten.squeeze,),
    _transposes: (aten.transpose, aten.t),
    _permutes: (aten.permute,),
    _slices: (aten.slice,),
    _multiplies: (aten.mm, aten.addmm, *PRODUCTS),
    _multiplies_batch: (aten.bmm, aten.baddbmm),
    _attends: (opaque_attention.OP.overloadpacket,),
    _normalises: (aten.native_layer_norm, aten._fused_rms_norm),
    _looks_up: (aten.embedding,),
    _before_last: (aten.view_as_complex, aten.view_as_real),
}  # fmt: skip
_RULES = {op: rule for rule, ops in _GROUPS.items() for op in ops}
