"""Partition a guarded graph for the run time: one segment with a variant for each row, or many segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.foresee import Foreseen
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.errors import LoweringReason, NeedsSegments
from dit_rewrite.passes.analysis.site import Probe, Site
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.guards.measurements import measurement
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.segments import Segments, cut, relevant, whole
from dit_rewrite.passes.rewrite.specialise import Row
from dit_rewrite.policy.rules import Policy
from dit_rewrite.runtime.decide import SiteSpec
from dit_rewrite.runtime.measure import Measured
from dit_rewrite.runtime.segments import Segment, Wiring
from dit_rewrite.runtime.spectral import Grid


def run(gm: fx.GraphModule, ctx: Context) -> Partition:
    """The pass: choose between variants and segments, and cut."""
    return Partition.of(ctx[Bound], ctx[GuardedGraph], ctx[Foreseen].rows, ctx[Lowering], ctx[Policy])


@dataclass(frozen=True)
class Partition:
    """The segments of a graph, and ``why`` there are so many; ``depends`` are, for each, the sites whose decisions its
    code depends on."""

    gm: fx.GraphModule
    sites: tuple[Site, ...]
    segments: Segments
    why: LoweringReason
    depends: tuple[tuple[int, ...], ...]
    max_variants: int

    @classmethod
    def of(
        cls, bound: Bound, guarded: GuardedGraph, rows: Sequence[Row], lowering: Lowering, policy: Policy
    ) -> Partition:
        """Partition as `lowering` asks. With "auto", cut into segments if there are too many distinct rows, or if a
        guard measures the call that it decides. Raises NeedsSegments if it does, and variants were asked for."""
        sites, gm = guarded.sites, guarded.source
        now = policy.lag == 0 and any(site.awaited for site in sites)
        if now and lowering.form == "variants":
            raise NeedsSegments(policy)
        why = LoweringReason.MANY_ROWS if len(set(rows)) > lowering.max_variants else LoweringReason.FEW_ROWS
        why = LoweringReason.ASKED if lowering.form != "auto" else LoweringReason.MEASURES_NOW if now else why
        if lowering.form == "segments" or why in (LoweringReason.MANY_ROWS, LoweringReason.MEASURES_NOW):
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
        """The number of the wire of each position that has one: the inputs, then what segments export."""
        inputs = (i for i, node in enumerate(self._nodes) if node.op == "placeholder")
        exports = (p for exports in self.segments.exports for p in exports)
        return {position: wire for wire, position in enumerate((*inputs, *exports))}

    def wire(self, position: int) -> int:
        """The wire that carries the node at a position of the captured graph."""
        return self._wires[position]

    def wiring(self, captured: Captured, num_hoisted: int = 0) -> Wiring:
        """How the wires of the captured graph run."""
        returned = self._nodes[-1].args[0]
        outputs = tuple(
            self._wires[self._position[out.name]] if isinstance(out, fx.Node) else (out,)
            for out in returned  # type: ignore[union-attr]
        )
        num_inputs = sum(node.op == "placeholder" for node in self._nodes)
        held = captured.static, captured.conditioning, captured.ambient
        return Wiring(len(self._wires), num_inputs, outputs, *held, num_hoisted)

    def wired(self, specs: Sequence[SiteSpec]) -> list[SiteSpec]:
        """The sites as dispatch knows them, with the wires that carry what they measure, and what they depend on."""
        return [
            replace(
                spec,
                conditioned=site.conditioned,
                measured=tuple(map(self._measured, site.probes)),
            )
            for spec, site in zip(specs, self.sites, strict=True)
        ]

    def _measured(self, probe: Probe) -> Measured:
        """What dispatch measures for a guard."""
        asked = measurement(probe.symbol)
        assert asked is not None, probe.symbol
        wire, output = (None if n is None else self._wires[self._position[n]] for n in (probe.node, probe.output))
        assert wire is not None
        grid = None if probe.latent is None else Grid(self._wires[self._position[probe.latent]], probe.patch)
        return Measured(probe.symbol, asked.statistic, wire, asked.rescale, output, grid)

    def runtime_segments(self) -> list[Segment]:
        """The pieces that dispatch runs, without their code."""
        return [Segment(sites, self._spent(i)) for i, sites in enumerate(self.depends)]

    def _spent(self, segment: int) -> tuple[int, ...]:
        """The wires that nothing behind a segment reads."""
        return tuple(wire for wire, last in self._last_read.items() if last == segment)

    @cached_property
    def _last_read(self) -> dict[int, int]:
        """The last segment that reads each wire which the call neither returns nor measures."""
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
        """The number of segments, the reason for it, and the sites that the code of each depends on."""
        yield f"{self.segments.count} segments: {self.why}"
        for number, depends in enumerate(self.depends):
            yield f"segment {number}: {', '.join(self.sites[i].name for i in depends) or 'no site'}"

    def foreseen(self, rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
        """The code that the plan is known to need: each piece and row, computing first, and of too many the most
        frequent."""
        for number, depends in enumerate(self.depends):
            parts = [tuple(row[i] for i in depends) for row in rows]
            never = (False,) * len(depends)
            counted = sorted(set(parts) - {never}, key=lambda row: (any(row), -parts.count(row)))
            yield from ((number, row) for row in (never, *counted[: self.max_variants - 1]))

    def full_row(self, number: int, row: Row) -> Row:
        """A piece's row with the other sites, which do not change its code, as computing."""
        reused = dict(zip(self.depends[number], row, strict=True))
        return tuple(reused.get(i, False) for i in range(len(self.sites)))
