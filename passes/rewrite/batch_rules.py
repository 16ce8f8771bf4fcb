"""Rules of batch.py: for each op, whether its result is LEADING if its operands are LEADING or SAME.

A rule must hold for every batch size including one, because the ops run on half of the batch.
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
    """A call and its LEADING operands. The other operands are SAME."""

    node: fx.Node
    leading: frozenset[fx.Node]
    batch: int

    def argument(self, name: str) -> Any:
        """Return the argument called `name` in the schema, or None."""
        return schema_arguments(self.node).get(name)

    @property
    def first(self) -> Tensor:
        """The first LEADING operand."""
        return next(tensor(n) for n in self.node.all_input_nodes if n in self.leading)  # type: ignore[return-value]


def _schema(node: fx.Node) -> list[Any]:
    return list(node.target._schema.arguments)  # type: ignore[union-attr]


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    bound = {a.name: a.default_value for a in _schema(node) if a.has_default_value()}
    return {**bound, **dict(zip((a.name for a in _schema(node)), node.args, strict=False)), **node.kwargs}


def tensor(node: fx.Node) -> Tensor | None:
    """Return the value of a node, or the first member if it is a tuple. None if that is not a tensor."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, Tensor) else None


def rows_of(node: fx.Node) -> int | None:
    """Return the size of dim 0, or None if there is none or it is symbolic (comparing it would add a Dynamo guard)."""
    value = tensor(node)
    return value.shape[0] if value is not None and value.ndim and isinstance(value.shape[0], int) else None


def _aligned(call: Call) -> bool:
    """Broadcasting keeps dim 0: LEADING operands have all dims of the result, SAME operands lack or broadcast dim 0."""
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
    """Attention treats each entry of dim 0 separately if there is a batch dim before tokens and width."""
    return _aligned(call) and call.first.ndim >= 3


def _in_order(call: Call) -> bool:
    """A view keeps the row-major order of elements, so the elements of a sample stay contiguous along dim 0."""
    rows = rows_of(call.node)
    return rows is not None and rows % call.batch == 0


def _behind(call: Call) -> bool:
    """The op acts along dims other than dim 0, and all operands have dim 0."""
    dims = call.argument("dims") if call.argument("dim") is None else call.argument("dim")
    dims = [dims] if isinstance(dims, int) else dims
    rows, rank = rows_of(call.node), call.first.ndim
    alike = all(n in call.leading and _fits(n, True, rank, rows or 0) for n in call.node.all_input_nodes)
    count = rank + (packet(call.node) is aten.stack)
    return alike and bool(dims) and all(dim % count for dim in dims)


def _slices(call: Call) -> bool:
    """A slice may also be along dim 0 if it selects all of it."""
    step, rows = call.argument("step"), rows_of(call.node)
    return _behind(call) or (step == 1 and rows is not None and rows == call.first.shape[0])


def _transposes(call: Call) -> bool:
    rank = call.first.ndim
    return call.argument("dim0") % rank != 0 and call.argument("dim1") % rank != 0


def _permutes(call: Call) -> bool:
    return call.argument("dims")[0] % call.first.ndim == 0


def _expands(call: Call) -> bool:
    """The op inserts no dim before dim 0."""
    return tensor(call.node).ndim == call.first.ndim  # type: ignore[union-attr]


def _multiplies(call: Call) -> bool:
    """The op multiplies LEADING rows by a SAME matrix, and adds a bias that broadcasts."""
    rows, matrix = operands(call.node)
    bias = set(call.node.all_input_nodes) - {rows, matrix}
    result, count = tensor(call.node), rows_of(rows)
    if result is None or count is None or result.ndim < 2 or rows not in call.leading or matrix in call.leading:
        return False
    return all(_fits(b, b in call.leading, result.ndim, count) for b in bias)


def _alone(name: str) -> Callable[[Call], bool]:
    """Return the rule that only the operand called `name` is LEADING. The op treats its rows separately."""
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
_WINDOWS = ("dit_rewrite::window_refresh", "dit_rewrite::window_reuse")  # by name, because passes do not import kernels
_FACTORIES = {aten.full, aten.zeros, aten.ones}


def rule_of(node: fx.Node) -> Callable[[Call], bool]:
    """Return the rule of a node's op. The rule of an unknown op is `_never`."""
    tags = getattr(node.target, "tags", ())
    if node.target is getitem:
        return _always
    if torch.Tag.nondeterministic_seeded in tags or not isinstance(node.target, OpOverload):
        return _never
    if node.target.name() in _WINDOWS:
        return _attends
    return _RULES.get(packet(node), _aligned if torch.Tag.pointwise in tags else _never)


def repeats(node: fx.Node, batch: int) -> bool:
    """Return whether a call with SAME operands gives equal values for each sample."""
    result, rows, op = tensor(node), rows_of(node), packet(node)
    if result is None or rows is None or rows % batch:
        return False
    if op is aten.expand:
        source = tensor(node.all_input_nodes[0])
        return source is not None and (source.ndim < result.ndim or rows_of(node.all_input_nodes[0]) == 1)
    if op is aten.repeat:
        times = schema_arguments(node)["repeats"][0]
        return isinstance(times, int) and times % batch == 0
    return op in _FACTORIES
