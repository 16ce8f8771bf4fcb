"""Pass 02, first half: residual sums and their branches.

A chain of adds is one n-ary sum. Its oldest summand that others depend on is the residual stream; every other summand
that is computed from the stream through a contraction is a branch. The branch's value is what is left when casts,
constant scales and gates that do not depend on the stream are peeled off.
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
    """A summand of a residual sum that is no site, and why."""

    node: str
    path: str
    reason: RefusalReason

    @classmethod
    def of(cls, node: fx.Node, reason: RefusalReason) -> Refusal:
        return cls(node.name, module_paths.module_path(node), reason)


@dataclass(frozen=True)
class Branch:
    """One summand `value` (gate peeled) of the residual sum `total` over `stream`; `region` holds the nodes between."""

    stream: fx.Node
    value: fx.Node
    total: fx.Node
    region: int
    cores: tuple[fx.Node, ...]


def find_branches(graph: fx.Graph, dependence: Dependence) -> tuple[list[Branch], dict[fx.Node, Refusal]]:
    """The branches of all residual sums, and the summands that are none."""
    branches: dict[fx.Node, Branch] = {}
    refused: dict[fx.Node, Refusal] = {}
    for node in graph.nodes:
        if packet(node) is aten.add and not _is_inner(node):
            _split(dependence, node, branches, refused)
    return list(branches.values()), refused


def _is_transparent(node: fx.Node) -> bool:
    return is_view(node) or is_copy(node) or is_constant_scale(node)


def _base(node: fx.Node) -> fx.Node:
    """What a node is a cast, view, copy or constant multiple of."""
    while _is_transparent(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_sum(node: fx.Node) -> bool:
    return packet(node) is aten.add and all(isinstance(argument, fx.Node) for argument in node.args[:2])


def _is_inner(node: fx.Node) -> bool:
    """Whether an add serves another add alone, and so is a part of that sum."""
    while len(node.users) == 1:
        (node,) = node.users
        if packet(node) is aten.add:
            return _is_sum(node)
        if not _is_transparent(node):
            return False
    return False


def summands(node: fx.Node, whole: Callable[[fx.Node], bool] = lambda _: False) -> Iterator[fx.Node]:
    """The summands of the n-ary sum that ends in `node`.

    Nested adds that serve it alone are looked through, but for those that are to stay `whole`.
    """
    for argument in node.args[:2]:
        if isinstance(argument, fx.Node):
            base = _nested(argument)
            if base is None or whole(base):
                yield argument
            else:
                yield from summands(base, whole)


def stream_side(total: fx.Node, stream: fx.Node) -> fx.Node:
    """The summand of a residual sum that is the stream: it, or the view or cast of it that is added to."""
    return next((summand for summand in summands(total) if _base(summand) is stream), stream)


def _nested(argument: fx.Node) -> fx.Node | None:
    """The sum below an argument that serves it alone."""
    base = argument
    while _is_transparent(base) and len(base.users) == 1:
        base = base.args[0]  # type: ignore[assignment]
    return base if _is_sum(base) and len(base.users) == 1 else None


def _meeting(total: fx.Node, stream: fx.Node, summand: fx.Node) -> fx.Node:
    """The innermost add of a nested sum that holds both the stream and a summand."""
    for argument in total.args[:2]:
        inner = _nested(argument) if isinstance(argument, fx.Node) else None
        if inner is not None:
            held = list(summands(inner))
            if summand in held and stream in map(_base, held):
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
    """The oldest summand that another is computed from; None where there is none, and so no residual sum.

    A tensor that is in another summand already, as it was added to the stream some blocks earlier, is not the stream.
    """
    for base in sorted(bases, key=dependence.position.__getitem__):
        later = [other for other in bases if other is not base and dependence.depends(other, base)]
        if later and not any(_is_added(dependence, base, other) for other in later):
            return base
    return None


def _is_added(dependence: Dependence, term: fx.Node, total: fx.Node) -> bool:
    """Whether `total` is a sum, of sums again, that `term` was added to."""
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
    """Whether the sum of two sides of a nested add is one summand, rather than each of them.

    It is where one side is a bias, or where both come side by side from one contraction behind the stream: of a
    projection and its LoRA two values would be held otherwise.
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
    """The value of a branch: below the last cast, constant scale or gate that does not depend on the stream."""
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
    """An attention core multiplies data by data: SDPA, or a product no operand of which is made of weights alone."""
    return node.target is opaque_attention.OP or all(dependence.is_data(operand) for operand in operands(node))
