"""Spans: pieces of the residual stream from one block boundary to another, and what the stream changes across them.

At a boundary lives nothing that moves but the stream: of joint models two, one for each modality. A span's values are
the streams behind it that it computes; each has a base, the same stream before it, found by walking the residual sums
back. What has no base of its shape is no span.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

from torch import Tensor, fx

from dit_rewrite.errors import Reason
from dit_rewrite.passes import cost
from dit_rewrite.passes.branches import Refusal, stream_side
from dit_rewrite.passes.graph import aten, is_copy, is_view, packet
from dit_rewrite.passes.site import Found, Kind, Part, Site

_SELECTIONS = {aten.slice, aten.split, aten.split_with_sizes, aten.chunk}
_SLICE = (0, None, None, 1)  # what aten.slice takes for what is not given
Crop = tuple[int, Any, Any]  # a dimension, and where along it a part begins and ends


def _is_selection(node: fx.Node) -> bool:
    return packet(node) in _SELECTIONS or node.target is getitem


def _is_shape_only(node: fx.Node) -> bool:
    return is_view(node) or is_copy(node) or _is_selection(node)


@dataclass(frozen=True)
class Boundary:
    """A place between two blocks: the position of its last node, and the moving nodes that are read behind it."""

    position: int
    streams: tuple[fx.Node, ...]


class Stream:
    """The residual stream of a graph whose sites are `found`, and its boundaries."""

    def __init__(self, graph: fx.Graph, found: Found) -> None:
        self.found = found
        branches = [site for site in found.sites if site.part is Part.BRANCH]
        self.nodes = {node.name: node for node in graph.nodes}
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._ends = [(site.layer, self.nodes[total]) for site in branches for total in site.sums]
        pairs = ((s, b) for site in branches for s, b in zip(site.sums, site.streams, strict=True))
        self.under = {self.nodes[s]: self.nodes[b] for s, b in pairs}  # the stream under each residual sum

    @cached_property
    def moving(self) -> dict[fx.Node, None]:
        """The nodes that are computed from the stream, in order; its beginnings too."""
        moving: dict[fx.Node, None] = dict.fromkeys(self.roots)
        for node in self.position:
            if any(argument in moving for argument in node.all_input_nodes):
                moving[node] = None
        return moving

    @cached_property
    def roots(self) -> list[fx.Node]:
        """The streams that no residual sum made."""
        made: set[fx.Node] = set()
        for node in self.position:
            if node in self.under or any(argument in made for argument in node.all_input_nodes):
                made.add(node)
        return sorted({b for b in self.under.values() if b not in made}, key=self.position.__getitem__)

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Before the first block, and behind each: the one behind block i has the index i + 1."""
        if not self.under:
            return ()
        ends = [-1] * self.found.num_layers
        for layer, total in self._ends:
            ends[layer] = max(ends[layer], self.position[total])
        first = min(self.position[total] for total in self.under)
        positions = [max((p for root in self.roots if (p := self.position[root]) < first), default=0)]
        for end in ends:
            positions.append(max(positions[-1], self._behind_views(end)))
        return tuple(Boundary(p, self.live(p)) for p in positions)

    def _behind_views(self, end: int) -> int:
        """The position behind `end` up to which nothing happens but views, casts and selections of what lives there."""
        order = list(self.position)
        while end + 1 < len(order) and order[end + 1] in self.moving and _is_shape_only(order[end + 1]):
            end += 1
        return end

    def live(self, position: int) -> tuple[fx.Node, ...]:
        """The moving nodes up to a position that are read behind it."""
        return tuple(
            node
            for node in self.moving
            if self.position[node] <= position and any(self.position[user] > position for user in node.users)
        )

    def pairs(self, first: int, end: int) -> list[tuple[fx.Node, fx.Node]] | None:
        """Value and base of each stream across the blocks from `first` up to `end`; None where one has no base."""
        before, behind = self.boundaries[first], self.boundaries[end]
        entered = entrances(before.streams)
        pairs: dict[fx.Node, fx.Node] = {}
        for node in behind.streams:
            if node in entered:  # passed by, not computed here
                continue
            pair = next((p for value in _forms(node) if (p := self._pair(value, entered)) is not None), None)
            if pair is None:
                return None
            pairs[pair[0]] = pair[1]
        return list(pairs.items()) or None

    def _pair(self, value: fx.Node, entered: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node] | None:
        way = self.walk(value, entered)
        if way is None:
            return None
        base = None  # the last form of the stream before anything is added: in the layout in which that is done
        for node in reversed(way):
            if node is value or not (node in entered or _is_shape_only(node)):
                break
            if _alike(node, value):
                base = node
        return None if base is None else (value, base)

    def walk(self, node: fx.Node, entered: Mapping[fx.Node, fx.Node]) -> list[fx.Node] | None:
        """The way back along the residual sums from a node to one of those `entered`; both are in it. None if it ends
        elsewhere."""
        way, crops = [node], list[Crop]()
        while node not in entered or crops:
            below = self._below(node, crops)
            if below is None:
                return None
            node = below
            way.append(node)
        return way if entered[node] is node else [*way, entered[node]]

    def _entered_by(self, total: fx.Node) -> fx.Node:
        """What stands in a sum for the stream under it, as far as it is but a view or cast of that."""
        side = form = stream_side(total, self.under[total])
        while form is not self.under[total] and (is_view(form) or is_copy(form)):
            form = form.all_input_nodes[0]
        return side if form is self.under[total] else form

    def _below(self, node: fx.Node, crops: list[Crop]) -> fx.Node | None:
        """One step back; `crops` are the selections that wait for the cat which they undo."""
        if node in self.under:
            return self._entered_by(node)
        if is_copy(node) or (is_view(node) and not crops):
            return node.all_input_nodes[0]
        if packet(node) is aten.add:
            moving = [argument for argument in node.all_input_nodes if argument in self.moving]
            return moving[0] if len(moving) == 1 else None
        if packet(node) is aten.cat and crops:
            return _part(node, crops.pop())
        crop = _crop(node)
        if crop is None:
            return None
        source = node.all_input_nodes[0] if packet(node) is aten.slice else node.all_input_nodes[0].all_input_nodes[0]
        if not _is_all(source, crop):
            crops.append(crop)
        return source


def entrances(streams: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The streams at a boundary, each by itself and by what it is a view or cast of."""
    found: dict[fx.Node, fx.Node] = {}
    for stream in streams:
        node = stream
        found[node] = stream
        while is_view(node) or is_copy(node):
            node = node.all_input_nodes[0]
            found.setdefault(node, stream)
    return found


def _forms(node: fx.Node) -> Iterator[fx.Node]:
    """The views, casts and selections of a node that alone are read, the last first; it; what it is a view of."""
    yield from _later(node)
    while is_view(node) or is_copy(node):
        node = node.all_input_nodes[0]
        yield node


def _later(node: fx.Node) -> Iterator[fx.Node]:
    if len(node.users) == 1:
        (user,) = node.users
        if _is_shape_only(user):
            yield from _later(user)
    yield node


def _alike(a: fx.Node, b: fx.Node) -> bool:
    mine, other = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(mine, Tensor) and isinstance(other, Tensor)):
        return False
    return mine.dtype == other.dtype and cost.shape(mine) == cost.shape(other)


def _crop(node: fx.Node) -> Crop | None:
    """Which part of its operand a slice, or an item of a split, is."""
    if packet(node) is aten.slice:
        given: list[Any] = [*node.args[1:], *_SLICE[len(node.args) - 1 :]]
        return (given[0], given[1] or 0, given[2]) if given[3] == 1 else None
    split = node.args[0] if node.target is getitem else None
    if isinstance(split, fx.Node) and packet(split) is aten.split_with_sizes:
        sizes: Any = split.args[1]
        item: Any = node.args[1]
        start = sum(sizes[:item])
        return (split.args[2] if len(split.args) > 2 else 0, start, start + sizes[item])  # type: ignore[return-value]
    return None


def _is_all(node: fx.Node, crop: Crop) -> bool:
    """A selection that leaves nothing out: under dynamic shapes ``x[:, n:]`` has one along its first dimension."""
    dim, start, end = crop
    size = cost.shape(node.meta["val"])[dim]
    return cost.position(start, size) == 0 and cost.position(end, size) == size


def _part(cat: fx.Node, crop: Crop) -> fx.Node | None:
    """The operand of a cat that a selection picks."""
    dim, start, end = crop
    parts: Any = cat.args[0]
    along = cat.args[1] if len(cat.args) > 1 else 0
    rank = cat.meta["val"].ndim
    if not isinstance(along, int) or along % rank != dim % rank:
        return None
    at = 0
    total = cost.shape(cat.meta["val"])[dim]
    for part in parts:
        length = cost.shape(part.meta["val"])[dim]
        if cost.position(start, total) == at and cost.position(end, total) == at + length:
            return part  # type: ignore[no-any-return]
        at += length
    return None


def find_spans(stream: Stream, wanted: Iterable[tuple[int, int]]) -> tuple[list[Site], list[Refusal]]:
    """A site for each wanted span of blocks (the first, and the one behind the last), smaller ones first, and those
    that are none."""
    sites, refused = [], []
    for first, end in sorted(wanted, key=lambda blocks: blocks[1] - blocks[0]):
        pairs = stream.pairs(first, end)
        name = _name(stream.found, first, end - 1)
        if pairs is None:
            refused.append(Refusal("", name, Reason.NO_COUNTERPART))
            continue
        values, bases = (tuple(node.name for node in side) for side in zip(*pairs, strict=True))
        block = _block(stream.found, first)
        sites.append(Site(name, Kind.SPAN, values, bases, block, first, part=Part.SPAN, span=(first, end), bases=bases))
    return sites, refused


def _block(found: Found, layer: int) -> str:
    return next((site.block for site in found.sites if site.layer == layer), "") or f"block {layer}"


def _name(found: Found, first: int, last: int) -> str:
    return _block(found, first) if first == last else f"{_block(found, first)}..{_block(found, last)}"
