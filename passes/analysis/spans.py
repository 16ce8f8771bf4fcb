"""Spans: sequences of blocks across which the change of the residual stream is reused.

The values of a span are the streams after it that its blocks compute; joint models have two, one per modality. The base
of a value is the same stream before the span, found by walking the residual sums back. If a value has no base of its
shape, there is no span.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

from torch import Tensor, fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.branches import Refusal, stream_side
from dit_rewrite.passes.analysis.crops import Crop, crop_of, is_all, part_of
from dit_rewrite.passes.analysis.graph import Dependence, aten, is_copy, is_view, packet
from dit_rewrite.passes.analysis.site import Found, Kind, Part, Site

_SELECTIONS = {aten.slice, aten.split, aten.split_with_sizes, aten.chunk}
_ELEMENTWISE = {aten.add: None, aten.where: 0, aten.masked_fill: 1}  # op -> index of its mask operand
Span = tuple[int, int]  # the first block, and the block after the last
Way = list[fx.Node]  # a path from a node back along the stream


def _is_selection(node: fx.Node) -> bool:
    return packet(node) in _SELECTIONS or node.target is getitem


def is_shape_only(node: fx.Node) -> bool:
    """Return whether `node` is a view, cast or selection."""
    return is_view(node) or is_copy(node) or _is_selection(node)


@dataclass(frozen=True)
class Boundary:
    """A boundary between two blocks: the position of the last node before it, and the moving nodes read after it."""

    position: int
    streams: tuple[fx.Node, ...]


class Stream:
    """The residual stream of a graph with the sites `found`, and its block boundaries.

    ``under`` maps each residual sum to the stream that it adds to, ``layer`` each residual sum to its block.
    """

    def __init__(self, graph: fx.Graph, found: Found) -> None:
        self.found = found
        branches = [site for site in found.sites if site.part is Part.BRANCH]
        self.nodes = {node.name: node for node in graph.nodes}
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._ends = [(site.layer, self.nodes[total]) for site in branches for total in site.sums]
        pairs = ((s, b) for site in branches for s, b in zip(site.sums, site.streams, strict=True))
        self.under = {self.nodes[s]: self.nodes[b] for s, b in pairs}
        self.layer = {total: layer for layer, total in self._ends}

    @cached_property
    def moving(self) -> dict[fx.Node, None]:
        """The moving nodes, in graph order: the roots of the stream and all nodes that are computed from them."""
        moving: dict[fx.Node, None] = dict.fromkeys(self.roots)
        for node in self.position:
            if any(argument in moving for argument in node.all_input_nodes):
                moving[node] = None
        return moving

    @cached_property
    def roots(self) -> list[fx.Node]:
        """The streams that are not computed from a residual sum."""
        made: set[fx.Node] = set()
        for node in self.position:
            if node in self.under or any(argument in made for argument in node.all_input_nodes):
                made.add(node)
        return sorted({b for b in self.under.values() if b not in made}, key=self.position.__getitem__)

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        """The boundaries before the first block and after each block; index i + 1 is after block i."""
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
        """Return the position of the last of the views, casts and selections that directly follow `end`."""
        order = list(self.position)
        while end + 1 < len(order) and order[end + 1] in self.moving and is_shape_only(order[end + 1]):
            end += 1
        return end

    def live(self, position: int) -> tuple[fx.Node, ...]:
        """Return the moving nodes up to `position` that are read after it."""
        return tuple(node for node, last in self._last_read.items() if self.position[node] <= position < last)

    @cached_property
    def _last_read(self) -> dict[fx.Node, int]:
        return {node: max((self.position[user] for user in node.users), default=-1) for node in self.moving}

    @cached_property
    def _sums(self) -> dict[int, list[fx.Node]]:
        """The residual sums of each block."""
        sums: dict[int, list[fx.Node]] = {}
        for layer, total in self._ends:
            sums.setdefault(layer, []).append(total)
        return sums

    @cached_property
    def _dependence(self) -> Dependence:
        return Dependence(next(iter(self.position)).graph)

    def _is_of(self, node: fx.Node, sums: Iterable[fx.Node]) -> bool:
        """Return whether `node` is computed from one of `sums`."""
        return any(self._dependence.depends(node, total) for total in sums)

    def _begin(self, layer: int) -> int:
        """Return the position at which all streams that a block adds to have been computed."""
        sums = self._sums[layer]
        return max(self.position[base] for base in map(self.under.__getitem__, sums) if not self._is_of(base, sums))

    def pairs(self, first: int, end: int, among: Iterable[int] | None = None) -> list[tuple[fx.Node, fx.Node]] | None:
        """Return (value, base) of each stream across the blocks `first` .. `end` - 1, or None if one has no base.

        If `among` is given, other blocks are ignored, because blocks of another stack may run in between.
        """
        meant = range(self.found.num_layers) if among is None else sorted(among)
        blocks = [block for block in meant if first <= block < end]
        sums = [total for block in blocks for total in self._sums[block]]
        begin = self._begin(blocks[0])
        pairs: dict[fx.Node, fx.Node] = {}
        for node in self.behind(blocks):
            if self.position[node] <= begin or not self._is_of(node, sums):  # not computed by these blocks
                continue
            pair = next((p for value in _forms(node) if (p := self._pair(value, begin)) is not None), None)
            if pair is None:
                return None
            pairs[pair[0]] = pair[1]
        return list(pairs.items()) or None

    def behind(self, blocks: Iterable[int]) -> tuple[fx.Node, ...]:
        """Return the moving nodes that are read after `blocks`."""
        return self.live(self._behind_views(max(self.position[total] for b in blocks for total in self._sums[b])))

    def _pair(self, value: fx.Node, begin: int) -> tuple[fx.Node, fx.Node] | None:
        way = self.walk(value, lambda node: self.position[node] <= begin)
        base = None  # the last view or cast of the stream before the first sum, because it has the layout of the sum
        for node in reversed(way or ()):
            if node is value or not (self.position[node] <= begin or is_shape_only(node)):
                break
            if _alike(node, value):
                base = node
        return None if base is None else (value, base)

    def walk(self, node: fx.Node, is_end: Callable[[fx.Node], bool]) -> Way | None:
        """Return the path back along the residual sums from `node` to a node for which `is_end` is true, or None."""
        return self._walk(node, (), is_end, {})

    def way(self, node: fx.Node) -> Way:
        """Return the longest path back along the residual sums from `node`."""
        return self._walk(node, (), None, {}) or []

    def _walk(
        self,
        node: fx.Node,
        crops: tuple[Crop, ...],
        is_end: Callable[[fx.Node], bool] | None,
        known: dict[Any, Way | None],
    ) -> Way | None:
        """Walk back from `node`. `crops` are the selections whose cat or pad has not been reached yet.

        If the stream of a sum is ambiguous, follows the summand whose path has most residual sums. `known` caches the
        paths from such summands.
        """
        way = [node]
        while crops or is_end is None or not is_end(node):
            if is_end is not None and is_end(node) and node in self.under:
                return None  # no node of the graph is this crop of the stream
            below, crops = self._below(node, crops)
            if len(below) > 1:
                rests = []
                for fork in below:
                    if (fork, crops) not in known:
                        known[fork, crops] = self._walk(fork, crops, is_end, known)
                    rests.append(known[fork, crops])
                rest = max(filter(None, rests), key=lambda w: sum(n in self.under for n in w), default=None)
                return None if rest is None else way + rest
            if not below:
                return way if is_end is None else None
            (node,) = below
            way.append(node)
        return way

    def _entered_by(self, total: fx.Node) -> fx.Node:
        """Return the summand of `total` that is the stream, or the node before it that is not a view or cast."""
        side = form = stream_side(total, self.under[total])
        while form is not self.under[total] and (is_view(form) or is_copy(form)):
            form = form.all_input_nodes[0]
        return side if form is self.under[total] else form

    def _below(self, node: fx.Node, crops: tuple[Crop, ...]) -> tuple[list[fx.Node], tuple[Crop, ...]]:
        """Return the candidates for the next node on the path, and the crops that are pending after this step."""
        if node in self.under:
            return [self._entered_by(node)], crops
        if is_copy(node) or (is_view(node) and not crops):
            return node.all_input_nodes[:1], crops
        if packet(node) in _ELEMENTWISE:
            return self._moving(node), crops
        if packet(node) in (aten.cat, aten.constant_pad_nd) and crops:
            part, crop = part_of(node, crops[-1])
            return ([] if part is None else [part]), (*crops[:-1], *([] if crop is None else [crop]))
        crop = crop_of(node)
        if crop is None:
            return [], crops
        source = node.all_input_nodes[0] if packet(node) is aten.slice else node.all_input_nodes[0].all_input_nodes[0]
        return [source], crops if is_all(source, crop) else (*crops, crop)

    def _moving(self, node: fx.Node) -> list[fx.Node]:
        """Return the moving operands of an elementwise op, or none if its mask is moving."""
        mask = _ELEMENTWISE[packet(node)]
        if mask is not None and node.args[mask] in self.moving:
            return []
        return [argument for argument in node.all_input_nodes if argument in self.moving]


def _forms(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the views, casts and selections that are the only users of `node`, last first, then `node`, then those
    that it is computed from."""
    yield from _later(node)
    while is_shape_only(node):
        node = node.all_input_nodes[0]
        yield node


def _later(node: fx.Node) -> Iterator[fx.Node]:
    if len(node.users) == 1:
        (user,) = node.users
        if is_shape_only(user):
            yield from _later(user)
    yield node


def _alike(a: fx.Node, b: fx.Node) -> bool:
    first, second = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.dtype == second.dtype and cost.shape(first) == cost.shape(second)


def find_spans(stream: Stream, wanted: Mapping[Span, Collection[int]]) -> tuple[list[Site], list[Refusal]]:
    """Return a site for each wanted span, shorter spans first, and the refusals.

    `wanted` maps a span to the blocks that belong to it, because blocks of another stack may run in between.
    """
    sites, refused = [], []
    for (first, end), among in sorted(wanted.items(), key=lambda item: item[0][1] - item[0][0]):
        pairs = stream.pairs(first, end, among)
        name = block_range(stream.found, first, end - 1)
        if pairs is None:
            refused.append(Refusal("", name, RefusalReason.NO_COUNTERPART))
            continue
        values, bases = (tuple(node.name for node in side) for side in zip(*pairs, strict=True))
        block = _block(stream.found, first)
        sites.append(Site(name, Kind.SPAN, values, bases, block, first, part=Part.SPAN, span=(first, end), bases=bases))
    return sites, refused


def _block(found: Found, layer: int) -> str:
    return next((site.block for site in found.sites if site.layer == layer), "") or f"block {layer}"


def block_range(found: Found, first: int, last: int) -> str:
    """Return the name of the blocks `first` .. `last`."""
    return _block(found, first) if first == last else f"{_block(found, first)}..{_block(found, last)}"
