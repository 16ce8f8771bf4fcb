"""A captured graph with the results of all passes over it, and with its compiled variants."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.partition import Partition
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import TableReason
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.site import Found
from dit_rewrite.passes.analysis.step_tables import StepTable, step_table
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.pipeline import Context, PassRun
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.hoist import Hoisted
from dit_rewrite.passes.rewrite.segments import whole
from dit_rewrite.passes.rewrite.specialise import Variant, specialise
from dit_rewrite.passes.rewrite.step_tables import StepTables
from dit_rewrite.policy.site_rules import SiteRules
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.torch_compat.kernel_builds import KernelBuilds


@dataclass
class Rewritten:
    """A captured graph with the results of all passes. The keys of ``variants`` are (segment, row).

    ``gm`` is the graph from which the guarded graph was built: without hoisted values, with the probes of guards.
    """

    captured: Captured
    context: Context
    runs: list[PassRun]
    graph: CompiledGraph
    variants: dict[tuple[int, DecisionRow], Variant] = field(default_factory=dict)
    compiled: dict[Any, tuple[Variant, Callable[..., Any]]] = field(default_factory=dict)  # by structure
    builds: KernelBuilds | None = None  # of the variants that are compiled ahead, while they are

    @property
    def bound(self) -> Bound:
        return self.context[Bound]

    @property
    def guarded(self) -> GuardedGraph:
        return self.context[GuardedGraph]

    @property
    def partition(self) -> Partition:
        return self.context[Partition]

    @property
    def hoisted(self) -> Hoisted | None:
        return self.context.get(Hoisted)

    @property
    def tables(self) -> StepTables | None:
        return self.context.get(StepTables)

    @property
    def has_table(self) -> bool:
        """Whether some steps read values from a step table."""
        return self.tables is not None and bool(self.tables.columns)

    @property
    def table_bytes(self) -> int:
        """The most bytes that a step reads from the step table, 0 if no step reads it.

        If no variant that reuses something is compiled yet, they are those that a step reads which reuses all sites.
        """
        table, tables = self.step_table, self.tables
        if table is None or tables is None:
            return 0
        read: dict[int, int] = {}  # by segment
        for (number, _), variant in self.variants.items():
            if tables.everywhere or any(variant.row):
                read[number] = max(read.get(number, 0), tables.bytes_of(variant.columns))
        return sum(read.values()) if read else table.reuse_bytes

    @property
    def why_unread(self) -> TableReason | None:
        """The reason why no step reads the step table, or None.

        A guard that measures its own call is decided after the first segment, which computes the values that it needs,
        because the step may turn out to be a computing one.
        """
        if self.step_table is None or self.table_bytes:
            return None
        return TableReason.NOT_READ if self.step_table.reuse_bytes else TableReason.NOT_NEEDED

    @cached_property
    def step_table(self) -> StepTable | None:
        """The analysis of the step table, or None if there is none."""
        if self.tables is None or not self.has_table:
            return None
        reused = [value for i in self.reached for value in self.found.sites[i].values]
        captured = self.captured
        return step_table(self.tables.source.graph, captured.static, captured.conditioning, captured.step, reused)

    @property
    def weights_read(self) -> frozenset[str]:
        """The names of the weights that something else reads than the rows of a step table that all steps read."""
        read = {node.name for i, node in enumerate(self._inputs()) if i in self.captured.static and node.users}
        table = self.step_table if self.tables is not None and self.tables.everywhere else None
        return frozenset(read - set(() if table is None else table.released) | self._compiled_reads())

    def positions(self, names: Collection[str]) -> tuple[int, ...]:
        """Return the positions of those weights that the step table is computed from, less the ones in `names`."""
        weights = () if self.tables is None else self.tables.weights
        return tuple(i for i, node in enumerate(self._inputs()) if i in weights and node.name not in names)

    def _inputs(self) -> Sequence[fx.Node]:
        return self.captured.gm.graph.find_nodes(op="placeholder")

    def _compiled_reads(self) -> set[str]:
        """The names of the inputs that compiled variants and the prologue take."""
        variants = [variant for segment in self.graph.segments for variant in segment.variants.values()]
        taken = {wire for variant in variants if variant is not None for wire in variant.inputs}
        taken |= set(() if self.hoisted is None else self.hoisted.inputs)
        return {node.name for i, node in enumerate(self._inputs()) if i in taken}

    @property
    def gm(self) -> fx.GraphModule:
        return self.guarded.source

    @property
    def found(self) -> Found:
        return self.bound.found

    @property
    def rules(self) -> tuple[SiteRules, ...]:
        return self.bound.rules

    @property
    def reached(self) -> tuple[int, ...]:
        """The indices of the guarded sites."""
        return self.bound.reached

    @property
    def slot_bytes(self) -> dict[int, int]:
        """The bytes per stream in the slot of each guarded site, by the index of the site among all sites."""
        slots = zip(self.reached, self.guarded.slot_tensors, strict=True)
        return {i: sum(map(cost.stored_bytes, slot)) for i, slot in slots}

    @property
    def stored_bytes(self) -> int:
        """The bytes stored for one stream: slots, hoisted values, and probes. Storage that values share counts once."""
        nodes = {node.name: node for node in self.gm.graph.nodes}
        hoisted = [] if self.hoisted is None else [nodes[name] for name in self.hoisted.values]
        stored = (*hoisted, *(node for slot in self.guarded.slot_tensors for node in slot))
        storages = {torch_compat.storage_id(node.meta["val"]): cost.stored_bytes(node) for node in stored}
        compared = sum(cost.stored_bytes(nodes[name]) for name in self.probes)
        return sum(storages.values()) + 2 * compared  # the probe of the last computed step, and of the last call

    @property
    def probes(self) -> set[str]:
        """The nodes that guards measure."""
        return {node for site in self.partition.sites for node in site.measured}

    def straight(self, row: DecisionRow, with_table: bool = True) -> Variant:
        """Return the whole graph specialised for a row of decisions, as one segment, to print it or to count its FLOPs.

        Without the step table, it computes the values that a step would read from there.
        """
        tables = self.tables if with_table else None
        return specialise(self.guarded, row, whole(self.gm, self.partition.sites), tables=tables)

    @property
    def most_reused(self) -> DecisionRow:
        """The row that reuses each site that some compiled variant reuses."""
        row = [False] * len(self.partition.sites)
        for number, part in self.variants:
            for site, reused in zip(self.partition.depends[number], part, strict=True):
                row[site] |= reused
        return tuple(row)


def row_name(row: Sequence[bool]) -> str:
    """Return a row of decisions as letters, C for compute and R for reuse, or "all_compute" or "all_reuse"."""
    if not row or len(set(row)) == 1:
        return "all_reuse" if row and row[0] else "all_compute"
    return "".join("R" if reused else "C" for reused in row)
