"""The amount of computation of a policy in the fidelity benchmark: calls that reuse nothing, and FLOPs.

FLOPs are those of the segments that run, of the values that are computed once per trajectory, and of the rows of step
tables: the rows of all steps are computed, also those of steps that compute everything and do not read them. The toys
have one graph and one stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.foresee import Foreseen
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.compiler.partition import Partition
from dit_rewrite.compiler.pipeline import PASSES
from dit_rewrite.compiler.request import Request, num_foreseen
from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.module import RewrittenModule, backend_of
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.pipeline import Context, run_passes
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.hoist import Hoisted
from dit_rewrite.passes.rewrite.specialise import Variant, specialise
from dit_rewrite.passes.rewrite.step_tables import StepTables
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.prediction import noise_of

COUNTED = 2  # how FLOPs are counted: 1 counted a call as one segment, nothing else, before there were step tables


def flops_of(model: RewrittenModule) -> tuple[int, float]:
    """Return the number of calls that reused nothing, and the FLOPs of all calls of a run over those without reuse."""
    (graph,), stats = backend_of(model).rewritten, model.stats()
    rows = Counter(record.row for record in stats.records)

    def variant(number: int, part: DecisionRow) -> Variant:
        return graph.variants[number, part]

    return _count(graph.context, rows, variant, stats.table_rows)


def foresee(graph: Rewritten, policy: Policy, scheduler: Any) -> tuple[int, float]:
    """Return the same for a policy whose decisions do not depend on measurements, without a run.

    `graph` was captured under another policy. The timesteps of `scheduler` are set.
    """
    steps, levels = noise_of(scheduler)
    padded = (*levels, *[(None, None)] * num_foreseen(steps))[: num_foreseen(steps)]
    request = replace(graph.context[Request], num_steps=steps, levels=padded)
    ctx = Context(graph.captured, policy, request, graph.context[Lowering])
    run_passes(PASSES, graph.captured.gm, ctx, [], ())
    tables, segments = ctx.get(StepTables), ctx[Partition].segments

    def variant(number: int, part: DecisionRow) -> Variant:
        row = ctx[Partition].full_row(number, part)
        return specialise(ctx[GuardedGraph], row, segments, number, tables=tables)

    return _count(ctx, Counter(ctx[Foreseen].rows[:steps]), variant, steps)


def _count(
    ctx: Context,
    rows: Mapping[DecisionRow, int],
    variant: Callable[[int, DecisionRow], Variant],
    table_rows: int,
) -> tuple[int, float]:
    """Count calls with these rows of decisions. The table has `table_rows` rows, if a call reads it."""
    spent, columns = 0, dict[str, None]()
    for row, count in rows.items():
        for number, sites in enumerate(ctx[Partition].depends):
            found = variant(number, tuple(row[site] for site in sites))
            spent += count * cost.total_flops(found.gm.graph)
            columns |= dict.fromkeys(found.columns)
    if columns:
        of_a_row, _ = ctx[StepTables].program(tuple(columns))
        spent += table_rows * cost.total_flops(of_a_row.graph)
    hoisted = ctx.get(Hoisted)
    spent += 0 if hoisted is None else cost.total_flops(hoisted.prologue.graph)
    whole = sum(rows.values()) * cost.total_flops(ctx[Bound].gm.graph)
    return sum(count for row, count in rows.items() if not any(row)), spent / whole
