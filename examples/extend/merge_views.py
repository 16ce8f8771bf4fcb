"""The pass `merge_views`: of two successive views only the last remains."""

from __future__ import annotations

from torch import fx

from dit_rewrite.passes.analysis.graph import aten
from dit_rewrite.passes.pipeline import Context, Pass

VIEW = aten.view.default


def run(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    """The pass: ``view(view(x, a), b)`` becomes ``view(x, b)``."""
    for node in gm.graph.find_nodes(op="call_function", target=VIEW):
        source = node.args[0]
        if source.target is VIEW:
            node.replace_input_with(source, source.args[0])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


MERGE_VIEWS = Pass("merge_views", run, optional=True)
