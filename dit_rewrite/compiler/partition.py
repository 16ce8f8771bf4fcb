"""Partition a guarded graph for dispatch: one segment with a variant per row of decisions, or many segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.foresee import Foreseen
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import LoweringReason, NeedsSegments
from dit_rewrite.passes.analysis.site import Probe, Site
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.guards.measurements import measurement
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.segments import Segments, cut, relevant, whole
from dit_rewrite.policy.rules import Policy
from dit_rewrite.runtime.decide import SiteSpec
from dit_rewrite.runtime.measure import Measured
from dit_rewrite.runtime.segments import Segment, Wiring
from dit_rewrite.runtime.spectral import Grid


def run(gm: fx.GraphModule, ctx: Context) -> Partition:
    """The pass: choose between variants and segments, and cut the graph."""
    return Partition.of(ctx[Bound], ctx[GuardedGraph], ctx[Foreseen].rows, ctx[Lowering], ctx[Policy])


@dataclass(frozen=True)
class Partition:
    """The segments of a graph. ``why`` is the reason for their number. ``depends`` has, for each segment, the sites
    whose decisions its code depends on."""

    gm: fx.GraphModule
    sites: tuple[Site, ...]
    segments: Segments
    why: LoweringReason
    depends: tuple[tuple[int, ...], ...]
    max_variants: int

    @classmethod
    def of(
        cls, bound: Bound, guarded: GuardedGraph, rows: Sequence[DecisionRow], lowering: Lowering, policy: Policy
    ) -> Partition:
        """Partition as `lowering` requests. With "auto", cut into segments if there are too many distinct rows, or if a
        guard measures the call that it decides. Raises NeedsSegments in that case if `lowering` requests variants.
        """
        sites, gm = guarded.sites, guarded.source
        now = policy.lag == 0 and any(site.awaited for site in sites)
        if now and lowering.partition == "variants":
            raise NeedsSegments(policy)
        why = LoweringReason.MANY_ROWS if len(set(rows)) > lowering.max_variants else LoweringReason.FEW_ROWS
        why = LoweringReason.ASKED if lowering.partition != "auto" else LoweringReason.MEASURES_NOW if now else why
        if lowering.partition == "segments" or why in (LoweringReason.MANY_ROWS, LoweringReason.MEASURES_NOW):
            segments = cut(gm, bound.found, sites, now)
        else:
            segments = whole(gm, sites)
        depends = tuple(relevant(gm, segments, sites, now))
        return cls(gm, sites, segments, why, depends, lowering.max_variants)

    @cached_property
    def _nodes(self) -> list[fx.Node]:
        return list(self.gm.graph.nodes)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self._nodes)}

    @cached_property
    def _wires(self) -> dict[int, int]:
        """The wire of each node position that has one: first the inputs, then the values that segments export."""
        inputs = (i for i, node in enumerate(self._nodes) if node.op == "placeholder")
        exports = (p for exports in self.segments.exports for p in exports)
        return {position: wire for wire, position in enumerate((*inputs, *exports))}

    def wire(self, position: int) -> int:
        """Return the wire of the node at a position of the graph."""
        return self._wires[position]

    def wiring(self, captured: Captured, num_hoisted: int = 0) -> Wiring:
        """Return the wiring of the graph."""
        returned = self._nodes[-1].args[0]
        outputs = tuple(
            self._wires[self._position[out.name]] if isinstance(out, fx.Node) else (out,)
            for out in returned  # type: ignore[union-attr]
        )
        num_inputs = sum(node.op == "placeholder" for node in self._nodes)
        kinds = captured.static, captured.conditioning, captured.ambient, captured.unknown
        return Wiring(len(self._wires), num_inputs, outputs, *kinds, num_hoisted, captured.unread)

    def wired(self, specs: Sequence[SiteSpec]) -> list[SiteSpec]:
        """Return `specs` with the wires of the values that their guards measure."""
        return [
            replace(
                spec,
                conditioned=site.conditioned,
                measured=tuple(map(self._measured, site.probes)),
            )
            for spec, site in zip(specs, self.sites, strict=True)
        ]

    def _measured(self, probe: Probe) -> Measured:
        """Return the measurement that dispatch makes for a probe."""
        asked = measurement(probe.symbol)
        assert asked is not None, probe.symbol
        wire, output = (None if n is None else self._wires[self._position[n]] for n in (probe.node, probe.output))
        assert wire is not None
        grid = None if probe.latent is None else Grid(self._wires[self._position[probe.latent]], probe.patch)
        return Measured(probe.symbol, asked.statistic, wire, asked.rescale, output, grid)

    def runtime_segments(self) -> list[Segment]:
        """Return the segments for dispatch, without variants."""
        return [Segment(sites, self._spent(i)) for i, sites in enumerate(self.depends)]

    def _spent(self, segment: int) -> tuple[int, ...]:
        """Return the wires whose last reader is this segment."""
        return tuple(wire for wire, last in self._last_read.items() if last == segment)

    @cached_property
    def _last_read(self) -> dict[int, int]:
        """The last segment that reads each wire, except for wires that the call returns or measures."""
        of, kept = self.segments.of, {self._position[node] for site in self.sites for node in site.measured}
        kept |= {self._position[node.name] for node in self._nodes[-1].all_input_nodes}
        readers = {p: {of[self._position[user.name]] for user in self._nodes[p].users} for p in self._wires}
        for site in self.sites:
            for value, base in zip(site.values, site.bases, strict=False):
                if self._position[base] in readers:
                    readers[self._position[base]].add(of[self._position[value]])
        exported = {p for exports in self.segments.exports for p in exports}
        return {
            self._wires[p]: max(segment or 0 for segment in read)
            for p, read in readers.items()
            if p in exported - kept and read
        }

    def describe(self) -> Iterator[str]:
        """Yield the number of segments with its reason, and the sites that the code of each segment depends on."""
        yield f"{self.segments.count} segments: {self.why}"
        for number, depends in enumerate(self.depends):
            yield f"segment {number}: {', '.join(self.sites[i].name for i in depends) or 'no site'}"

    def foreseen(self, rows: Sequence[DecisionRow]) -> Iterator[tuple[int, DecisionRow]]:
        """Yield (segment, row) for the variants that the foreseen rows need: the computing one and the most frequent
        ones, at most `max_variants` per segment. The smallest come first: their kernels are built while others are
        lowered."""
        for number, depends in enumerate(self.depends):
            parts = [tuple(row[i] for i in depends) for row in rows]
            never = (False,) * len(depends)
            counted = sorted(set(parts) - {never}, key=lambda row: (any(row), -parts.count(row)))
            chosen = (never, *counted[: self.max_variants - 1])
            yield from ((number, row) for row in sorted(chosen, key=sum, reverse=True))

    def full_row(self, number: int, row: DecisionRow) -> DecisionRow:
        """Extend a segment's row to all sites. The other sites compute; they do not affect the segment's code."""
        reused = dict(zip(self.depends[number], row, strict=True))
        return tuple(reused.get(i, False) for i in range(len(self.sites)))
