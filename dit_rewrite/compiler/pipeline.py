"""The passes in order. To add a pass, write a file with a function ``(gm, ctx) -> result`` and add a line here."""

from __future__ import annotations

from torch import fx

from dit_rewrite.compiler import bind, budget, foresee, fuse_window_refresh, partition, step_tables
from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.request import Request
from dit_rewrite.passes.analysis.site import Found
from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.pipeline import Context, Pass
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.hoist import hoist
from dit_rewrite.passes.rewrite.insert_guards import insert_guards


def _find_sites(gm: fx.GraphModule, ctx: Context) -> Found:
    captured = ctx[Captured]
    return find_sites(gm, captured.static, captured.conditioning if ctx[Request].hoist else frozenset())


def _hoist(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    split = hoist(gm, ctx[Captured].static | ctx[Captured].conditioning)
    if split is None:
        return gm
    rest, hoisted = split
    ctx.put(hoisted)
    ctx.put(ctx[Bound].after(rest))
    return rest


def _insert_guards(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    guarded: GuardedGraph = insert_guards(gm, ctx[Bound].found.sites, ctx[Bound].labels)
    ctx.put(guarded)
    return guarded.gm


def _unmark_attention(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    opaque_attention.unmark(gm)
    return gm


# passes over each captured graph
PASSES = (
    Pass("find_sites", _find_sites),
    Pass("bind", bind.run),
    Pass("step_tables", step_tables.run, optional=True),
    Pass("hoist", _hoist, optional=True),
    Pass("insert_guards", _insert_guards),
    Pass("foresee", foresee.run),
    Pass("fit_budget", budget.run),
    Pass("partition", partition.run),
)

# passes over each straight-line graph (specialised from a guarded graph), before it is lowered
STRAIGHT_LINE_PASSES = (
    Pass("fuse_window_refresh", fuse_window_refresh.run, optional=True),
    Pass("unmark_attention", _unmark_attention),
)
