"""Residual sums and their branches, the first part of finding sites.

A chain of adds is one n-ary sum. Its earliest summand that other summands depend on is the residual stream. Each other
summand that is computed from the stream through a contraction is a branch. The value of the branch is the summand
without casts, constant scales and gates that do not depend on the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.graph import Dependence, aten, is_constant_scale, is_copy, is_view, operands, packet
from dit_rewrite.passes.capture import module_paths, opaque_attention


@dataclass(frozen=True)
class Refusal:
    """A place of the graph that is no site, with the reason."""

    node: str
    path: str
    reason: RefusalReason

    @classmethod
    def of(cls, node: fx.Node, reason: RefusalReason) -> Refusal:
        return cls(node.name, module_paths.module_path(node), reason)


@dataclass(frozen=True)
class Branch:
    """A branch of the residual sum `total`. `value` is the summand without its gate.

    `region` is a bit set (see Dependence) of the nodes between `stream` and `value`. `cores` are its attention cores.
    """

    stream: fx.Node
    value: fx.Node
    total: fx.Node
    region: int
    cores: tuple[fx.Node, ...]


def find_branches(graph: fx.Graph, dependence: Dependence) -> tuple[list[Branch], dict[fx.Node, Refusal]]:
    """Return the branches of all residual sums, and a refusal for each other summand."""
    branches: dict[fx.Node, Branch] = {}
    refused: dict[fx.Node, Refusal] = {}
    for node in graph.nodes:
        if packet(node) is aten.add and not _is_inner(node):
            _split(dependence, node, branches, refused)
    return list(branches.values()), refused


def _is_transparent(node: fx.Node) -> bool:
    return is_view(node) or is_copy(node) or is_constant_scale(node)


def _base(node: fx.Node) -> fx.Node:
    """Return the node of which `node` is a view, cast, copy or constant multiple."""
    while _is_transparent(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_sum(node: fx.Node) -> bool:
    return packet(node) is aten.add and all(isinstance(argument, fx.Node) for argument in node.args[:2])


def _is_inner(node: fx.Node) -> bool:
    """Return whether `node` is read only by another add, and is therefore a part of that sum."""
    while len(node.users) == 1:
        (node,) = node.users
        if packet(node) is aten.add:
            return _is_sum(node)
        if not _is_transparent(node):
            return False
    return False


def summands(node: fx.Node, whole: Callable[[fx.Node], bool] = lambda _: False) -> Iterator[fx.Node]:
    """Yield the summands of the n-ary sum that ends in `node`.

    An add that only this sum reads is replaced by its summands, unless `whole` returns True for it.
    """
    for argument in node.args[:2]:
        if isinstance(argument, fx.Node):
            base = _nested(argument)
            if base is None or whole(base):
                yield argument
            else:
                yield from summands(base, whole)


def stream_side(total: fx.Node, stream: fx.Node) -> fx.Node:
    """Return the summand of `total` that is `stream`, or a view or cast of it."""
    return next((summand for summand in summands(total) if _base(summand) is stream), stream)


def _nested(argument: fx.Node) -> fx.Node | None:
    """Return the sum of which `argument` is a view, cast or copy, if nothing else reads it."""
    base = argument
    while _is_transparent(base) and len(base.users) == 1:
        base = base.args[0]  # type: ignore[assignment]
    return base if _is_sum(base) and len(base.users) == 1 else None


def _meeting(total: fx.Node, stream: fx.Node, summand: fx.Node) -> fx.Node:
    """Return the innermost add of a nested sum that contains both the stream and `summand`."""
    for argument in total.args[:2]:
        inner = _nested(argument) if isinstance(argument, fx.Node) else None
        if inner is not None:
            inside = list(summands(inner))
            if summand in inside and stream in map(_base, inside):
                return _meeting(inner, stream, summand)
    return total


def _split(
    dependence: Dependence, node: fx.Node, branches: dict[fx.Node, Branch], refused: dict[fx.Node, Refusal]
) -> None:
    """Sort the summands of the sum that ends in `node` into stream, branches and refusals."""
    stream = _stream(dependence, [_base(summand) for summand in summands(node)])
    if stream is None:
        return
    for summand in summands(node, lambda inner: _is_one_branch(dependence, inner, stream)):
        if _base(summand) is stream:
            continue
        if not dependence.depends(summand, stream):
            refused.setdefault(summand, Refusal.of(summand, RefusalReason.NOT_FROM_STREAM))
            continue
        value = _peel(dependence, summand, stream)
        region = dependence.between(stream, value)
        contractions = dependence.contractions(region)
        if contractions:
            cores = tuple(c for c in contractions if _is_core(dependence, c))
            branches.setdefault(value, Branch(stream, value, _meeting(node, stream, summand), region, cores))
        else:
            refused.setdefault(summand, Refusal.of(summand, RefusalReason.NO_CONTRACTION))


def _stream(dependence: Dependence, bases: list[fx.Node]) -> fx.Node | None:
    """Return the earliest summand that another is computed from, or None if this is no residual sum.

    A tensor that was already added to another summand, for example some blocks earlier, is not the stream.
    """
    for base in sorted(bases, key=dependence.position.__getitem__):
        later = [other for other in bases if other is not base and dependence.depends(other, base)]
        if later and not any(_is_added(dependence, base, other) for other in later):
            return base
    return None


def _is_added(dependence: Dependence, term: fx.Node, total: fx.Node) -> bool:
    """Return whether `total` is a nested sum that contains `term`."""
    seen, pending = {total}, [total]
    while pending:
        node = pending.pop()
        sides = [_base(side) for side in node.args[:2]] if _is_sum(node) else []  # type: ignore[arg-type]
        if term in sides:
            return True
        pending += [side for side in sides if side not in seen and dependence.depends(side, term)]
        seen.update(sides)
    return False


def _is_one_branch(dependence: Dependence, add: fx.Node, stream: fx.Node) -> bool:
    """Return whether a nested add is one summand, instead of two.

    It is if one side is a bias, or if both sides are computed independently from one contraction after the stream.
    Otherwise a slot would store two values for a projection and its LoRA.
    """
    if stream in map(_base, summands(add)):
        return False
    left, right = map(_base, add.args[:2])  # type: ignore[arg-type]
    if not (dependence.is_data(left) and dependence.is_data(right)):
        return True
    if dependence.depends(left, right) or dependence.depends(right, left):
        return False
    return bool(dependence.contractions(dependence.between(stream, left) & dependence.between(stream, right)))


def _peel(dependence: Dependence, summand: fx.Node, stream: fx.Node) -> fx.Node:
    """Return `summand` without casts, constant scales and gates that do not depend on the stream."""
    value = node = summand
    while True:
        if _is_transparent(node):
            below = node.args[0]
        elif packet(node) is aten.mul:
            sides = [a for a in node.args[:2] if isinstance(a, fx.Node) and dependence.depends(a, stream)]
            below = sides[0] if len(sides) == 1 else None
        else:
            below = None
        if not isinstance(below, fx.Node) or below is stream:
            return value
        if not is_view(node):
            value = below
        node = below


def _is_core(dependence: Dependence, node: fx.Node) -> bool:
    """Return whether `node` is SDPA, or a product whose operands all depend on inputs that are not weights."""
    return node.target is opaque_attention.OP or all(dependence.is_data(operand) for operand in operands(node))
