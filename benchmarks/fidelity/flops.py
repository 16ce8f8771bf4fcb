"""The amount of computation of a policy in the fidelity benchmark: calls that reuse nothing, and FLOPs."""

from __future__ import annotations

from collections import Counter

from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.module import RewrittenModule, backend_of
from dit_rewrite.passes.analysis import cost

COUNTED = 2  # how FLOPs are counted: 1 counted a call as one segment, and no rows of step tables


def flops_of(model: RewrittenModule) -> tuple[int, float]:
    """Return the number of calls that reused nothing, and the FLOPs of all calls over those without reuse.

    The FLOPs are those of the compiled segments that ran, and of the rows of step tables: the rows of all steps are
    computed, also those of steps that compute everything and do not read them. The toys have one graph.
    """
    (graph,), stats = backend_of(model).rewritten, model.stats()
    ran = Counter(record.row for record in stats.records)
    spent = sum(count * _flops_of_call(graph, row) for row, count in ran.items())
    if graph.tables is not None and graph.graph.program is not None:
        row_of_table, _ = graph.tables.program(graph.graph.program.columns)
        spent += stats.table_rows * cost.total_flops(row_of_table.graph)
    share = spent / (ran.total() * cost.total_flops(graph.bound.gm.graph))
    return sum(count for row, count in ran.items() if not any(row)), share


def _flops_of_call(graph: Rewritten, row: DecisionRow) -> int:
    """Return the FLOPs of the segments that a call with these decisions runs."""
    parts = (tuple(row[site] for site in sites) for sites in graph.partition.depends)
    return sum(cost.total_flops(graph.variants[number, part].gm.graph) for number, part in enumerate(parts))
