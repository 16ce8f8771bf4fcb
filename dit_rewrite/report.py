"""What was found and rewritten, for people: the report of `explain()`, and the folder of `dump=`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from dit_rewrite.errors import Reason
from dit_rewrite.passes import cost, naming, printing
from dit_rewrite.passes.sites import Refusal, Site
from dit_rewrite.policy import Policy

if TYPE_CHECKING:
    from dit_rewrite.backend import Rewritten


@dataclass(frozen=True)
class Place:
    """A row of the report: a site in one occurrence of its graph, with what the policy leaves of its guard."""

    graph: int
    occurrence: int
    site: Site
    guard: str
    reachable: bool


@dataclass(frozen=True)
class Report:
    """Prints as a table. ``sites`` are rows for every site of every graph, ``refused`` the places that are none.

    ``occurrences`` says how often each graph ran in the last call: behind a graph break identical blocks share one.
    """

    policy: Policy
    rewritten: tuple[Rewritten, ...]
    occurrences: Mapping[int, int]

    @property
    def sites(self) -> tuple[Place, ...]:
        return tuple(
            Place(i, occurrence, site, rules.guard if rules.reachable else "", rules.reachable)
            for i, r in enumerate(self.rewritten)
            for occurrence in range(self.occurrences.get(i, 0) or 1)
            for site, rules in zip(r.found.sites, r.rules, strict=True)
        )

    @property
    def refused(self) -> tuple[Refusal, ...]:
        return tuple(refusal for r in self.rewritten for refusal in r.found.refused)

    def graph_diff(self, graph: int | None = None) -> str:
        """A unified diff of a captured graph and its variant that reuses most, op counts on top.

        `graph` defaults to the one with most sites.
        """
        chosen = max(self.rewritten, key=lambda r: len(r.reached)) if graph is None else self.rewritten[graph]
        row = max(chosen.variants, key=sum)
        return printing.diff(chosen.captured.gm, chosen.variants[row].gm, ("captured", f"variant {row_name(row)}"))

    def __str__(self) -> str:
        total = sum(cost.total_flops(r.captured.gm.graph) for r in self.rewritten)
        reached = [place.site for place in self.sites if place.reachable]
        held, saved = sum(site.bytes for site in reached), sum(site.flops for site in reached)
        lines = [
            f"policy    {self.policy}",
            f"graphs    {len(self.rewritten)}, {sum(len(r.variants) for r in self.rewritten)} variants compiled",
            f"FLOPs     {_quantity(total)} a call, of which {_quantity(saved)} ({saved / max(total, 1):.1%}) in sites",
            f"cached    {_quantity(held, 1024)}B a stream, where every reached site holds its values",
            *self._hoisted(),
            *_table(self._rows()),
        ]
        if self.refused:
            lines += ["", "refused places"]
            lines += [f"  {r.path or '(the model itself)'} ({r.node}): {r.reason}" for r in self.refused]
        return "\n".join(lines)

    def _hoisted(self) -> Iterator[str]:
        """What is computed once per trajectory, by the modules that it was traced in."""
        for rewritten in self.rewritten:
            site = rewritten.found.hoisted
            if site is None:
                continue
            nodes = {node.name: node for node in rewritten.captured.gm.graph.nodes}
            paths = dict.fromkeys(naming.module_path(nodes[name]) or name for name in site.values)
            yield f"hoisted   {_quantity(site.flops)} FLOPs, {_quantity(site.bytes, 1024)}B: {', '.join(paths)}"
        yield ""

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield "graph", "site", "kind", "layer", "guard of reuse", "values", "FLOPs", "bytes"
        for place in self.sites:
            site = place.site
            yield (
                f"{place.graph}.{place.occurrence}",
                site.name,
                str(site.kind),
                str(site.layer),
                place.guard if place.reachable else f"({Reason.UNREACHED})",
                str(len(site.values)),
                _quantity(site.flops),
                _quantity(site.bytes, 1024),
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


def row_name(row: Sequence[bool]) -> str:
    """A row of decisions in letters: C computes, R reuses. A row of one decision for all is named so."""
    if not row or len(set(row)) == 1:
        return "all_reuse" if row and row[0] else "all_compute"
    return "".join("R" if reused else "C" for reused in row)


@dataclass(frozen=True)
class Dump:
    """Writes each captured graph's passes into a folder of its own: ``graph0/00_captured.py`` and so on."""

    folder: Path

    def write(self, rewritten: Rewritten) -> None:
        """Write the numbered graphs of all passes and the diffs between them."""
        folder = self.folder / f"graph{rewritten.graph.index}"
        folder.mkdir(parents=True, exist_ok=True)
        captured, guarded = rewritten.captured.gm, rewritten.guarded.gm
        self._graph(folder / "00_captured.py", captured)
        if rewritten.prologue is not None:
            self._graph(folder / "01_hoisted.py", rewritten.prologue.gm)
        (folder / "02_sites.txt").write_text("\n".join(_describe(rewritten)) + "\n")
        self._graph(folder / "03_guarded.py", guarded)
        (folder / "03_guarded.diff").write_text(printing.diff(captured, guarded, ("captured", "guarded")))
        for number, (row, variant) in enumerate(rewritten.variants.items()):
            stem = f"04_variant{number}"
            self._graph(folder / f"{stem}.py", variant.gm, f"# row: {row_name(row)}\n")
            (folder / f"{stem}.diff").write_text(printing.diff(captured, variant.gm, ("captured", stem)))

    def _graph(self, path: Path, gm: fx.GraphModule, head: str = "") -> None:
        path.write_text(head + printing.readable(gm) + "\n")


def _describe(rewritten: Rewritten) -> Iterator[str]:
    for site, rules in zip(rewritten.found.sites, rewritten.rules, strict=True):
        guard = rules.guard if rules.reachable else Reason.UNREACHED
        yield f"{site.name}  {site.kind}  layer {site.layer}  values {', '.join(site.values)}  guard {guard}"
    for refusal in rewritten.found.refused:
        yield f"refused: {refusal.path} {refusal.node}: {refusal.reason}"
