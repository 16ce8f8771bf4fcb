"""The report of `explain()`: the sites that were found, and how they were rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from dit_rewrite.compiler.rewritten import Rewritten, row_name
from dit_rewrite.errors import PredictionReason, Reason, RefusalReason, UnreachedReason
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.cost_model import CostModel, model_costs
from dit_rewrite.passes.analysis.site import Found, Site
from dit_rewrite.passes.guards.notation import show
from dit_rewrite.passes.guards.satisfiability import verdict
from dit_rewrite.passes.rewrite import printing
from dit_rewrite.passes.rewrite.segments import crossing_bytes
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.comparison import comparison
from dit_rewrite.report.prediction import Prediction
from dit_rewrite.runtime.stats import Stats


@dataclass(frozen=True)
class Place:
    """A row of the report: a site in one occurrence of its graph, with its partially evaluated guard.

    ``bytes`` is the size of its slot. ``inner``: an enclosing site is reached too, so its FLOPs are counted there.
    """

    graph: int
    occurrence: int
    site: Site
    guard: str
    reachable: bool
    bytes: int
    inner: bool


@dataclass(frozen=True)
class Report:
    """Prints as a table. ``sites`` has a row per site of each graph, ``refused`` the candidates that are not sites.

    ``occurrences`` is how often each graph ran in the last call; after a graph break, identical blocks share a graph.
    ``streams`` is the number of streams seen so far, each of which has slots of its own. ``predict`` predicts the costs
    of a trajectory, or returns why it cannot. ``measured`` has the counts, and perhaps times, of the calls so far.
    ``released`` are the bytes of weights that are released now, None if the caller did not ask for that.
    """

    policy: Policy
    rewritten: tuple[Rewritten, ...]
    occurrences: Mapping[int, int]
    streams: int = 1
    predict: Callable[[], Prediction | PredictionReason] = lambda: PredictionReason.TOTAL_UNKNOWN
    measured: Stats | None = None
    released: int | None = None

    @cached_property
    def prediction(self) -> Prediction | PredictionReason:
        """The predicted costs of a trajectory, or the reason why they cannot be foreseen."""
        return self.predict()

    @cached_property
    def costs(self) -> tuple[CostModel, ...]:
        """The FLOPs and bytes of each graph and its branches, as expressions of batch, tokens, text tokens, frames."""
        return tuple(
            model_costs(r.captured.gm, r.captured.static | r.captured.ambient, r.context[Found].sites)
            for r in self.rewritten
        )

    @property
    def sites(self) -> tuple[Place, ...]:
        return tuple(
            place
            for i, rewritten in enumerate(self.rewritten)
            for occurrence in range(self.occurrences.get(i, 0) or 1)
            for place in _places(i, occurrence, rewritten)
        )

    @property
    def refused(self) -> tuple[Refusal, ...]:
        return tuple(refusal for r in self.rewritten for refusal in r.found.refused)

    @property
    def peak_bytes(self) -> int:
        """The predicted maximum number of bytes that caching adds: the slots of all ``streams``, and the tensors that a
        call keeps alive until it has measured and stored them."""
        working = [_working_bytes(rewritten) for rewritten in self.rewritten]
        return self.streams * self.stream_bytes + max(working, default=0)

    @property
    def stream_bytes(self) -> int:
        """The bytes stored for one stream: the slots of all reached sites, the hoisted values, and the earlier values
        of probes that guards compare with."""
        return sum((self.occurrences.get(i, 0) or 1) * r.stored_bytes for i, r in enumerate(self.rewritten))

    def graph_diff(self, graph: int | None = None) -> str:
        """Return a unified diff of a captured graph and its variant that reuses most, with op counts on top.

        `graph` is an index; the default is the graph with most sites.
        """
        chosen = max(self.rewritten, key=lambda r: len(r.reached)) if graph is None else self.rewritten[graph]
        row = chosen.most_reused
        return printing.diff(chosen.captured.gm, chosen.straight(row).gm, ("captured", f"variant {row_name(row)}"))

    def __str__(self) -> str:
        total = sum(cost.total_flops(r.captured.gm.graph) for r in self.rewritten)
        reached = [place for place in self.sites if place.reachable]
        saved = sum(place.site.flops for place in reached if not place.inner)
        lines = [
            f"policy    {self.policy}",
            *self._verdicts(),
            *(f"graph {i}   {_partition(r)}" for i, r in enumerate(self.rewritten)),
            f"FLOPs     {_quantity(total)} per call, {_quantity(saved)} of them ({saved / max(total, 1):.1%}) in sites",
            f"cached    {_quantity(self.stream_bytes, 1024)}B per stream at most, {_quantity(self.peak_bytes, 1024)}B "
            f"in the {self.streams} known so far",
            *(f"scaling   graph {i}: {each.total} FLOPs" for i, each in enumerate(self.costs)),
            *comparison(self.prediction, self.measured),
            *self._hoisted(),
            *self._tables(),
            *(() if self.released is None else (f"released  {_quantity(self.released, 1024)}B of weights",)),
            *self._graphs(),
            "",
            *_table(self._rows()),
        ]
        if self.refused:
            lines += ["", "refused places"]
            lines += [f"  {r.path or '(the model itself)'} ({r.node}): {r.reason}" for r in self.refused]
        lines += ["", *_table(self._passes())]
        return "\n".join(lines)

    def _passes(self) -> Iterator[tuple[str, ...]]:
        """Yield a row for each pass over each graph, in order. Repeated runs of a pass are summed."""
        yield "graph", "pass", "runs", "ms", "nodes before", "nodes after", "refused"
        for i, rewritten in enumerate(self.rewritten):
            for name in dict.fromkeys(run.name for run in rewritten.runs):
                runs = [run for run in rewritten.runs if run.name == name]
                before, after = sum(run.nodes_before for run in runs), sum(run.nodes_after for run in runs)
                milliseconds, refused = 1000 * sum(run.seconds for run in runs), sum(run.refused for run in runs)
                yield str(i), name, str(len(runs)), f"{milliseconds:.1f}", str(before), str(after), str(refused)

    def _verdicts(self) -> Iterator[str]:
        """Yield a line for each rule whose guard is always or never true."""
        for number, rule in enumerate(self.policy.rules, 1):
            found = verdict(rule.when & rule.where.guard)
            if found is not None:
                yield f"rule {number}    {found}: {show(rule.when)}"

    def _hoisted(self) -> Iterator[str]:
        """Yield a line with the modules whose values are computed once per trajectory."""
        for rewritten in self.rewritten:
            found = rewritten.hoisted
            if found is not None:
                size = f"{_quantity(found.flops)} FLOPs, {_quantity(found.bytes, 1024)}B"
                yield f"hoisted   {size}: {', '.join(found.paths)}"

    def _tables(self) -> Iterator[str]:
        """Yield a line for the step table of each graph, or for the reason why it has none or is not read."""
        for i, rewritten in enumerate(self.rewritten):
            table, tables = rewritten.step_table, rewritten.tables
            if table is not None and tables is not None:
                if rewritten.why_unread is not None:
                    yield f"table {i}   no step reads the {len(table.values)} values: {rewritten.why_unread}"
                    continue
                who = "all steps read" if tables.everywhere else "reusing steps read"
                size = f"{_quantity(table.flops)} FLOPs, {_quantity(rewritten.table_bytes, 1024)}B per step"
                weights = f"{_quantity(table.released_bytes, 1024)}B of weights ({table.released_share:.1%})"
                yield f"table {i}   {who} {len(table.values)} values: {size}; {weights} serve them alone"
            elif tables is not None and rewritten.reached:
                yield f"table {i}   none: {tables.why}"

    def _graphs(self) -> Iterator[str]:
        """Yield a line for the CUDA graphs, and for each reason why a segment ran without one."""
        if self.measured is not None and self.measured.captures:
            size = _quantity(self.measured.graph_bytes, 1024)
            yield f"captured  {self.measured.captures} CUDA graphs, {size}B with buffers"
        if self.measured is not None:
            yield from (f"no graph  {n} times: {why}" for why, n in self.measured.uncaptured.most_common())

    def _unreached(self, place: Place) -> Reason:
        refused = self.rewritten[place.graph].found.refused
        over = Refusal(place.site.values[0], place.site.name, RefusalReason.OVER_BUDGET)
        return RefusalReason.OVER_BUDGET if over in refused else UnreachedReason.NO_RULE

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield "graph", "site", "kind", "layer", "guard of reuse", "values", "FLOPs", "bytes"
        for place in self.sites:
            site = place.site
            yield (
                f"{place.graph}.{place.occurrence}",
                site.name,
                str(site.kind),
                str(site.layer),
                place.guard if place.reachable else f"({self._unreached(place)})",
                str(len(site.values)),
                _quantity(site.flops),
                _quantity(place.bytes, 1024),
            )


def _working_bytes(rewritten: Rewritten) -> int:
    """Return the bytes that a computing call keeps alive only for the slots.

    These are the probes, and the stream before each span, which is needed until the span's change is computed. The old
    value of the span is released before, so only the excess over its size counts.
    """
    nodes = {node.name: node for node in rewritten.gm.graph.nodes}
    spans = [site for site in rewritten.partition.sites if site.bases]
    bases, values = ({n for site in spans for n in getattr(site, side)} for side in ("bases", "values"))
    kept, replaced = (sum(cost.stored_bytes(nodes[name]) for name in names) for names in (bases, values))
    return sum(cost.stored_bytes(nodes[name]) for name in rewritten.probes) + max(kept - replaced, 0)


def _places(graph: int, occurrence: int, rewritten: Rewritten) -> Iterator[Place]:
    sites, stored, reached = rewritten.found.sites, rewritten.slot_bytes, set(rewritten.reached)
    for i, (site, rules) in enumerate(zip(sites, rewritten.rules, strict=True)):
        guard = rules.guard if rules.reachable else ""
        around = site.parent
        while around is not None and around not in reached:
            around = sites[around].parent
        yield Place(graph, occurrence, site, guard, rules.reachable, stored.get(i, site.bytes), around is not None)


def _partition(rewritten: Rewritten) -> str:
    """Return how a graph was lowered, and the reason."""
    partition, compiled = rewritten.partition, len(rewritten.compiled)
    if partition.segments.count == 1:
        return f"lowered as variants ({partition.why}): {compiled} compiled"
    crossing = _quantity(crossing_bytes(rewritten.gm, partition.segments), 1024)
    return (
        f"lowered as segments ({partition.why}): {partition.segments.count} segments, {compiled} distinct ones "
        f"compiled; the cuts write {crossing}B per call"
    )


def _table(rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    lines = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _quantity(number: float, base: int = 1000) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < base:
            return f"{number:.0f}{unit}" if not unit else f"{number:.1f}{unit}"
        number /= base
    return f"{number:.1f}P"
