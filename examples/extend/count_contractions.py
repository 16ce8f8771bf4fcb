"""The analysis `count_contractions`: how many contractions each guarded site saves when it is reused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from dit_rewrite.compiler.bind import Bound
from dit_rewrite.passes.analysis.graph import is_contraction
from dit_rewrite.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class Contractions:
    """The result: the number of contractions (matrix products, convolutions, attentions) by site."""

    by_site: Mapping[str, int]

    def describe(self) -> Iterator[str]:
        """The lines of this analysis in a dump."""
        for name, count in self.by_site.items():
            yield f"{name}: {count}"


def run(gm: fx.GraphModule, ctx: Context) -> Contractions:
    """Count the contractions in the closure of each site that some rule can reach."""
    bound = ctx[Bound]
    nodes = {node.name: node for node in gm.graph.nodes}
    reached = (bound.found.sites[i] for i in bound.reached)
    return Contractions({s.name: sum(is_contraction(nodes[name]) for name in s.closure) for s in reached})


COUNT_CONTRACTIONS = Pass("count_contractions", run)
