"""Rules of batch.py: for each op, when its result is LEADING, its operands being LEADING or SAME each.

A rule holds for a batch of any size, one included: the ops are run on half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.passes.analysis.graph import aten, operands, packet
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.torch_compat import OpOverload


@dataclass(frozen=True)
class Call:
    """A call, and which of its operands are LEADING; the others are SAME."""

    node: fx.Node
    leading: frozenset[fx.Node]
    batch: int

    def argument(self, name: str) -> Any:
        """An argument by its name in the schema."""
        return _arguments(self.node).get(name)

    @property
    def first(self) -> Tensor:
        """The first LEADING operand."""
        return next(tensor(n) for n in self.node.all_input_nodes if n in self.leading)  # type: ignore[return-value]


def _schema(node: fx.Node) -> list[Any]:
    return list(node.target._schema.arguments)  # type: ignore[union-attr]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, those left out by their defaults."""
    bound = {a.name: a.default_value for a in _schema(node) if a.has_default_value()}
    return {**bound, **dict(zip((a.name for a in _schema(node)), node.args, strict=False)), **node.kwargs}


def tensor(node: fx.Node) -> Tensor | None:
    """The value of a node, of a tuple its first member; None where that is no tensor."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, Tensor) else None


def rows_of(node: fx.Node) -> int | None:
    """The size of dim 0; None where there is none, or where it is symbolic: asking would add a guard."""
    value = tensor(node)
    return value.shape[0] if value is not None and value.ndim and isinstance(value.shape[0], int) else None


def _aligned(call: Call) -> bool:
    """Broadcasting leaves dim 0 in place: LEADING operands have all dims of the result, SAME ones do without dim 0."""
    result, rows = tensor(call.node), rows_of(call.node)
    if result is None or rows is None:
        return False
    return all(_fits(node, node in call.leading, result.ndim, rows) for node in call.node.all_input_nodes)


def _fits(node: fx.Node, leading: bool, rank: int, rows: int) -> bool:
    value = tensor(node)
    if value is None or value.ndim < rank:
        return not leading
    return value.ndim == rank and rows_of(node) == (rows if leading else 1)


def _attends(call: Call) -> bool:
    """Attention of each entry of dim 0 by itself: there is a batch dim before tokens and width."""
    return _aligned(call) and call.first.ndim >= 3


def _in_order(call: Call) -> bool:
    """A view holds all elements in row-major order, so that a sample's part stays together; it is not to be split."""
    rows = rows_of(call.node)
    return rows is not None and rows % call.batch == 0


def _behind(call: Call) -> bool:
    """What is done along dims other than dim 0, to operands that all have it."""
    dims = call.argument("dims") if call.argument("dim") is None else call.argument("dim")
    dims = [dims] if isinstance(dims, int) else dims
    rows, rank = rows_of(call.node), call.first.ndim
    alike = all(n in call.leading and _fits(n, True, rank, rows or 0) for n in call.node.all_input_nodes)
    count = rank + (packet(call.node) is aten.stack)
    return alike and bool(dims) and all(dim % count for dim in dims)


def _slices(call: Call) -> bool:
    """All of dim 0 may be sliced out, too."""
    step, rows = call.argument("step"), rows_of(call.node)
    return _behind(call) or (step == 1 and rows is not None and rows == call.first.shape[0])


def _transposes(call: Call) -> bool:
    rank = call.first.ndim
    return call.argument("dim0") % rank != 0 and call.argument("dim1") % rank != 0


def _permutes(call: Call) -> bool:
    return call.argument("dims")[0] % call.first.ndim == 0


def _expands(call: Call) -> bool:
    """No dim is put before dim 0."""
    return tensor(call.node).ndim == call.first.ndim  # type: ignore[union-attr]


def _multiplies(call: Call) -> bool:
    """Rows times a matrix that is SAME, plus a bias that broadcasts."""
    rows, matrix = operands(call.node)
    bias = set(call.node.all_input_nodes) - {rows, matrix}
    result, count = tensor(call.node), rows_of(rows)
    if result is None or count is None or result.ndim < 2 or rows not in call.leading or matrix in call.leading:
        return False
    return all(_fits(b, b in call.leading, result.ndim, count) for b in bias)


def _alone(name: str) -> Callable[[Call], bool]:
    """Only the operand of that name is LEADING: rows of tokens or images that do not see each other."""
    return lambda call: call.leading == {call.argument(name)}


def _normalises(call: Call) -> bool:
    return _alone("input")(call) and len(call.argument("normalized_shape")) < call.first.ndim


def _normalises_groups(call: Call) -> bool:
    return _alone("input")(call) and call.argument("N") == rows_of(call.node)


def _pads(call: Call) -> bool:
    return len(call.argument("pad")) // 2 < call.first.ndim


def _looks_up(call: Call) -> bool:
    return _alone("self")(call) and call.argument("dim") % call.first.ndim != 0


def _always(call: Call) -> bool:
    return True


def _never(call: Call) -> bool:
    return False


_GROUPS: dict[Callable[[Call], bool], tuple[Any, ...]] = {
    _aligned: (
        aten._to_copy, aten.copy, aten.complex, aten.polar, aten.masked_fill, aten._prelu_kernel, aten.empty_like,
        aten.zeros_like, aten.ones_like, aten.full_like, aten.bmm, aten.baddbmm,
    ),
    _attends: (opaque_attention.OP.overloadpacket,),
    _in_order: (
        aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.alias, aten.detach,
        aten.view_as_complex, aten.view_as_real,
    ),
    _behind: (
        aten.squeeze, aten.cat, aten.stack, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.select,
        aten.narrow, aten.slice_scatter, aten.gather, aten.flip, aten.roll, aten.cumsum, aten.sort, aten.topk, aten.glu,
        aten._softmax, aten._log_softmax, aten.softmax, aten.logsumexp, aten.linalg_vector_norm, aten.sum, aten.mean,
        aten.var, aten.var_mean, aten.std, aten.prod, aten.amax, aten.amin, aten.argmax, aten.argmin, aten.any,
        aten.all,
    ),
    _slices: (aten.slice,),
    _transposes: (aten.transpose,),
    _permutes: (aten.permute,),
    _expands: (aten.expand,),
    _multiplies: (aten.mm, aten.addmm, aten.linear),
    _normalises: (aten.native_layer_norm, aten._fused_rms_norm),
    _normalises_groups: (aten.native_group_norm,),
    _alone("input"): (aten.convolution,),
    _alone("indices"): (aten.embedding,),
    _pads: (aten.constant_pad_nd,),
    _looks_up: (aten.index_select,),
}  # fmt: skip
_RULES = {op: rule for rule, ops in _GROUPS.items() for op in ops}
_WINDOWS = ("dit_rewrite::window_refresh", "dit_rewrite::window_reuse")  # by name: kernels/ is another layer
_FACTORIES = {aten.full, aten.zeros, aten.ones}


def rule_of(node: fx.Node) -> Callable[[Call], bool]:
    """The rule of a node's op; one without a rule proves nothing."""
    tags = getattr(node.target, "tags", ())
    if node.target is getitem:
        return _always
    if torch.Tag.nondeterministic_seeded in tags or not isinstance(node.target, OpOverload):
        return _never
    if node.target.name() in _WINDOWS:
        return _attends
    return _RULES.get(packet(node), _aligned if torch.Tag.pointwise in tags else _never)


def repeats(node: fx.Node, batch: int) -> bool:
    """Whether a call makes the same for each sample, of operands that are SAME."""
    result, rows, op = tensor(node), rows_of(node), packet(node)
    if result is None or rows is None or rows % batch:
        return False
    if op is aten.expand:
        source = tensor(node.all_input_nodes[0])
        return source is not None and (source.ndim < result.ndim or rows_of(node.all_input_nodes[0]) == 1)
    if op is aten.repeat:
        times = _arguments(node)["repeats"][0]
        return isinstance(times, int) and times % batch == 0
    return op in _FACTORIES
