"""Pass 02: find the sites of a functional graph by its structure.

A chain of adds is one n-ary sum. Its oldest summand that others depend on is the residual stream; every other summand
that is computed from the stream through a contraction is a branch. The branch's value is what is left when casts,
constant scales and gates that do not depend on the stream are peeled off. Nothing here knows a model's class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import fx

from dit_rewrite.errors import Reason
from dit_rewrite.passes import attention_core, cost, naming
from dit_rewrite.passes.graph import (
    Dependence,
    aten,
    closures,
    is_constant_scale,
    is_copy,
    is_view,
    operands,
    packet,
)


class Kind(str, Enum):
    """What a branch is, by the attention core that lies in it."""

    SELF = "self"
    CROSS = "cross"
    JOINT = "joint"
    PARALLEL = "parallel"
    MLP = "mlp"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Site:
    """A place whose values may be reused together.

    ``values`` names the nodes that are cached: one, or several that share a contraction (joint attention).
    ``closure`` are the nodes that vanish with them, ``flops`` their cost, ``bytes`` what holding the values takes.
    ``parent`` is the index of the innermost site that contains this one; ``layer`` counts blocks in graph order.
    """

    name: str
    kind: Kind
    values: tuple[str, ...]
    streams: tuple[str, ...]
    closure: frozenset[str]
    block: str
    layer: int
    flops: int
    bytes: int
    parent: int | None


@dataclass(frozen=True)
class Refusal:
    """A summand of a residual sum that is no site, and why."""

    node: str
    path: str
    reason: Reason


@dataclass(frozen=True)
class Found:
    """What pass 02 returns: sites in the order of the graph, and refused places."""

    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]

    @property
    def num_layers(self) -> int:
        return 1 + max((site.layer for site in self.sites), default=-1)


@dataclass(frozen=True)
class _Branch:
    """One summand `value` (gate peeled) of a residual sum over `stream`; `region` holds the nodes in between."""

    stream: fx.Node
    value: fx.Node
    region: int
    cores: tuple[fx.Node, ...]


def find_sites(gm: fx.GraphModule, static: frozenset[int] = frozenset()) -> Found:
    """The sites of a functional graph whose placeholders at the positions `static` are parameters or buffers."""
    dependence = Dependence(gm.graph, static)
    branches: dict[fx.Node, _Branch] = {}
    refused: dict[fx.Node, Refusal] = {}
    for node in gm.graph.nodes:
        if packet(node) is aten.add and not _is_inner(node):
            _split(dependence, list(_summands(node)), branches, refused)
    groups, entangled = _group(dependence, list(branches.values()))
    for branch in entangled:
        refused[branch.value] = _refusal(branch.value, Reason.ENTANGLED)
    return Found(_describe(gm.graph, dependence, groups), tuple(refused.values()))


def _is_transparent(node: fx.Node) -> bool:
    return is_view(node) or is_copy(node) or is_constant_scale(node)


def _base(node: fx.Node) -> fx.Node:
    """What a node is a cast, view, copy or constant multiple of."""
    while _is_transparent(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_inner(node: fx.Node) -> bool:
    """Whether an add serves another add alone, and so is a part of that sum."""
    while len(node.users) == 1:
        (node,) = node.users
        if packet(node) is aten.add:
            return all(isinstance(argument, fx.Node) for argument in node.args[:2])
        if not _is_transparent(node):
            return False
    return False


def _summands(node: fx.Node) -> Iterator[fx.Node]:
    """The summands of the n-ary sum that ends in `node`, nested adds that serve it alone looked through."""
    for argument in node.args[:2]:
        if not isinstance(argument, fx.Node):
            continue
        base = argument
        while _is_transparent(base) and len(base.users) == 1:
            base = base.args[0]  # type: ignore[assignment]
        both = packet(base) is aten.add and all(isinstance(a, fx.Node) for a in base.args[:2])
        if both and len(base.users) == 1:
            yield from _summands(base)
        else:
            yield argument


def _split(
    dependence: Dependence,
    summands: list[fx.Node],
    branches: dict[fx.Node, _Branch],
    refused: dict[fx.Node, Refusal],
) -> None:
    """Sort the summands of one sum into stream, branches and refusals."""
    bases = sorted(((_base(s), s) for s in summands), key=lambda pair: dependence.position[pair[0]])
    stream = next((b for b, s in bases if any(dependence.depends(o, b) for _, o in bases if o is not s)), None)
    if stream is None:  # no summand is computed from another: not a residual sum
        return
    for base, summand in bases:
        if base is stream:
            continue
        if not dependence.depends(summand, stream):
            refused.setdefault(summand, _refusal(summand, Reason.NOT_FROM_STREAM))
            continue
        value = _peel(dependence, summand, stream)
        region = dependence.between(stream, value)
        contractions = dependence.contractions(region)
        if contractions:
            cores = tuple(node for node in contractions if _is_core(dependence, node))
            branches.setdefault(value, _Branch(stream, value, region, cores))
        else:
            refused.setdefault(summand, _refusal(summand, Reason.NO_CONTRACTION))


def _refusal(node: fx.Node, reason: Reason) -> Refusal:
    return Refusal(node.name, naming.module_path(node), reason)


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
    return node.target is attention_core.OP or all(dependence.is_data(operand) for operand in operands(node))


def _group(dependence: Dependence, branches: list[_Branch]) -> tuple[list[tuple[_Branch, ...]], list[_Branch]]:
    """Put branches that share a contraction, and do not contain one another, into one group.

    These are the modalities of joint attention, or two slices of one projection: reusing one of them alone would leave
    what they share to be computed. Also returns the branches of groups that had to be taken apart again, because one's
    value feeds another's input.
    """
    sharing: dict[fx.Node, list[_Branch]] = defaultdict(list)
    for branch in branches:
        for contraction in dependence.contractions(branch.region):
            sharing[contraction].append(branch)
    grouped: dict[fx.Node, tuple[_Branch, ...]] = {}
    entangled: list[_Branch] = []
    for branch in branches:
        if branch.value in grouped:
            continue
        together = (b for c in dependence.contractions(branch.region) for b in sharing[c])
        members = {b.value: b for b in together if not _nested(dependence, branch, b)}
        group = tuple(members.values())
        if len(group) > 1 and not _is_convex(dependence, group):
            entangled += group
            group = (branch,)
        for member in group:
            grouped[member.value] = group
    return list(dict.fromkeys(grouped.values())), entangled


def _nested(dependence: Dependence, a: _Branch, b: _Branch) -> bool:
    return a is not b and (dependence.depends(a.value, b.value) or dependence.depends(b.value, a.value))


def _is_convex(dependence: Dependence, group: tuple[_Branch, ...]) -> bool:
    """No member's region depends on another member's value, so that all can be computed at one place."""
    regions = [dependence.members(member.region) for member in group]
    return not any(
        dependence.depends(node, other.value)
        for member, region in zip(group, regions, strict=True)
        for other in group
        if other is not member
        for node in region
        if node is not other.value
    )


def _kind(dependence: Dependence, group: tuple[_Branch, ...]) -> Kind:
    cores = group[0].cores
    if not cores:
        return Kind.MLP
    if any(_joins_attention_with_mlp(dependence, branch) for branch in group):
        return Kind.PARALLEL
    if len({branch.stream for branch in group}) > 1:
        return Kind.JOINT
    kinds = {_core_kind(dependence, core, group[0]) for core in cores}
    return next(kind for kind in (Kind.JOINT, Kind.SELF, Kind.CROSS) if kind in kinds)


def _core_kind(dependence: Dependence, core: fx.Node, branch: _Branch) -> Kind:
    """Whose tokens are attended to: the stream's, a condition's, or both put together by a cat."""
    keys = operands(core)[1:] if core.target is attention_core.OP else operands(core)
    if not all(dependence.depends(key, branch.stream) for key in keys):
        return Kind.CROSS
    for key in keys:
        for cat in _cats(dependence, dependence.between(branch.stream, key)):
            others = [p for p in cat.all_input_nodes if not dependence.depends(p, branch.stream)]
            if any(dependence.is_data(part) for part in others):
                return Kind.JOINT
    return Kind.SELF


def _joins_attention_with_mlp(dependence: Dependence, branch: _Branch) -> bool:
    """A cat in the branch puts the attention's output beside a projection of the stream that passes no core."""

    def from_core(node: fx.Node) -> bool:
        return any(dependence.depends(node, core) for core in branch.cores)

    for cat in _cats(dependence, branch.region):
        parts = [p for p in cat.all_input_nodes if dependence.depends(p, branch.stream)]
        beside = [p for p in parts if not from_core(p)]
        projected = any(dependence.contractions(dependence.between(branch.stream, p)) for p in beside)
        if projected and len(beside) < len(parts):
            return True
    return False


def _cats(dependence: Dependence, region: int) -> list[fx.Node]:
    return [node for node in dependence.members(region) if packet(node) is aten.cat]


def _describe(graph: fx.Graph, dependence: Dependence, groups: list[tuple[_Branch, ...]]) -> tuple[Site, ...]:
    """Name, place and price the groups, in the order of their last values."""
    groups = sorted(groups, key=lambda g: max(dependence.position[b.value] for b in g))
    closed = closures(graph, [tuple(b.value for b in group) for group in groups])
    paths = [naming.common_path(_own_contractions(dependence, group)) for group in groups]
    blocks = [naming.block_of(path) for path in paths]
    layers = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    names = naming.unique([path or f"branch_{i}" for i, path in enumerate(paths)])
    return tuple(
        Site(
            name=names[i],
            kind=_kind(dependence, group),
            values=tuple(branch.value.name for branch in group),
            streams=tuple(branch.stream.name for branch in group),
            closure=frozenset(node.name for node in closed[i]),
            block=blocks[i],
            layer=layers[blocks[i]],
            flops=cost.flops(closed[i]),
            bytes=sum(cost.stored_bytes(branch.value) for branch in group),
            parent=_parent(i, groups, closed),
        )
        for i, group in enumerate(groups)
    )


def _own_contractions(dependence: Dependence, group: tuple[_Branch, ...]) -> list[fx.Node]:
    return [node for branch in group for node in dependence.contractions(branch.region)]


def _parent(i: int, groups: list[tuple[_Branch, ...]], closed: list[frozenset[fx.Node]]) -> int | None:
    """The innermost other group whose closure holds all of this one's values."""
    values = {branch.value for branch in groups[i]}
    around = [j for j in range(len(groups)) if j != i and values <= closed[j]]
    return min(around, key=lambda j: len(closed[j]), default=None)
