"""Cut a graph into segments at the residual stream, so that the host can decide between two segments.

After each block, the stream is the only moving value that is still read. A segment therefore takes the stream,
conditioning and weights as inputs, and identical blocks become identical segments. A node that does not depend on the
stream belongs to the segment that reads it if there is only one, otherwise to the first segment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import getitem

from torch import Tensor, fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.site import Found, Part, Site
from dit_rewrite.passes.analysis.spans import Stream


@dataclass(frozen=True)
class Segments:
    """A partition of the nodes of a captured graph into segments.

    ``of`` maps the position of a node to its segment, or to None if each segment that reads the node computes it.
    ``exports``: for each segment, the positions of its nodes that other segments read or that the call returns or
    measures.
    """

    of: tuple[int | None, ...]
    exports: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return len(self.exports)

    def holding(self, positions: Iterable[int]) -> frozenset[int]:
        """Return the segments that contain the nodes at `positions`."""
        return frozenset(s for p in positions if (s := self.of[p]) is not None)


def whole(gm: fx.GraphModule, sites: Sequence[Site]) -> Segments:
    """Return the graph as one segment."""
    return _segments(gm, sites, [0] * len(gm.graph.nodes))


def cut(gm: fx.GraphModule, found: Found, sites: Sequence[Site], measured: bool) -> Segments:
    """Cut the graph at each block boundary and, if guards read probes `measured` in the same call, after each probe."""
    stream = Stream(gm.graph, found)
    cuts = {boundary.position for boundary in stream.boundaries[1:]}  # block 0 stays with the embedding of the latent
    for site in sites if measured else ():
        for name in site.awaited:
            probe = stream.position[stream.nodes[name]]
            cuts -= {probe - 1}  # avoid a segment that contains only the probe
            cuts.add(probe)
    of = _assign(gm.graph, stream, sorted(cuts))
    for site in sites:
        if site.part is Part.TILES:  # its tokens are gathered once, in the segment of its value
            home = of[stream.position[stream.nodes[site.values[0]]]]
            of = [home if node.name in site.closure else of[i] for node, i in stream.position.items()]
    return _segments(gm, sites, of)


def _assign(graph: fx.Graph, stream: Stream, cuts: list[int]) -> list[int | None]:
    """Return the segment of each node."""
    of: dict[fx.Node, int | None] = {}
    for node in reversed(list(stream.position)):
        if _is_free(node):
            of[node] = None
        elif node in stream.moving or node.op == "output" or node.is_impure():
            of[node] = bisect_left(cuts, stream.position[node])
        else:
            read = {of[user] for user in node.users}
            only = read.pop() if len(read) == 1 else 0
            of[node] = 0 if only is None else only
    for node in stream.position:
        if node.target is getitem:  # only tensors, not tuples, may cross a cut
            of[node] = of[node.all_input_nodes[0]]
    return [of[node] for node in stream.position]


def _is_free(node: fx.Node) -> bool:
    """Return whether a node is an attribute or follows from input sizes, so that any segment can compute it."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return False
    return all(_is_free(a) or (a.op == "placeholder" and not _is_tensor(a)) for a in node.all_input_nodes)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _segments(gm: fx.GraphModule, sites: Sequence[Site], of: Sequence[int | None]) -> Segments:
    nodes = list(gm.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    named = {node.name: i for i, node in enumerate(nodes)}
    last = max((s for s in of if s is not None), default=0)
    exports: list[dict[int, None]] = [{} for _ in range(last + 1)]

    def export(read: int, reader: int | None) -> None:
        source = of[read]
        if nodes[read].op not in ("placeholder", "get_attr") and source != reader:
            exports[last if source is None else source][read] = None

    for node in gm.graph.output_node().all_input_nodes:
        export(position[node], -1)
    for node in nodes[:-1]:
        for argument in node.all_input_nodes if of[position[node]] is not None else ():
            if of[position[argument]] is not None:
                export(position[argument], of[position[node]])
    for site in sites:
        for value, base in zip(site.values, site.bases, strict=False):
            export(named[base], of[named[value]])
        for probe in site.probes:
            export(named[probe.node], -1)
    return Segments(tuple(of), tuple(map(tuple, exports)))


def relevant(gm: fx.GraphModule, segments: Segments, sites: Sequence[Site], measured: bool) -> list[tuple[int, ...]]:
    """Return for each segment the sites whose decisions its code depends on.

    These are the sites that have nodes in the segment and are already decided. A site is decided before the first
    segment that has nodes of it and, if its probes are `measured` in the same call, after the segments of its probes.
    The sites inside it are decided then too, because they must know whether it is reused.
    """
    named = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    measuring = [segments.holding(named[node] for node in site.awaited) if measured else () for site in sites]
    decided = [
        max((s + 1 for j, probes in enumerate(measuring) if _is_within(site, sites[j]) for s in probes), default=0)
        for site in sites
    ]
    depends: list[list[int]] = [[] for _ in range(segments.count)]
    for i, site in enumerate(sites):
        for segment in segments.holding(named[name] for name in site.closure | frozenset(site.values)):
            if segment >= decided[i]:
                depends[segment].append(i)
    return [tuple(sites_) for sites_ in depends]


def _is_within(site: Site, other: Site) -> bool:
    return site is other or other.closure.issuperset(site.values)


def crossing_bytes(gm: fx.GraphModule, segments: Segments) -> int:
    """Return the bytes that cross the cuts: the values that segments write for other segments."""
    nodes = list(gm.graph.nodes)
    outputs = set(gm.graph.output_node().all_input_nodes)
    handed = (nodes[p] for exports in segments.exports for p in exports if nodes[p] not in outputs)
    return sum(cost.stored_bytes(node) for node in handed if _is_tensor(node))
