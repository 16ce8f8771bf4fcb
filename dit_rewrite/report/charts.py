"""The charts of the HTML report as rectangles, and the graph diff in parts that can be folded."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from dit_rewrite.compiler.rewritten import row_name
from dit_rewrite.errors import PredictionReason
from dit_rewrite.passes.rewrite import printing
from dit_rewrite.report.explain import Report
from dit_rewrite.report.prediction import Prediction
from dit_rewrite.runtime.stats import Decision, Stats

LABELS, WIDTH, ROW = 190, 600, 14  # in units of the view box
OUTSIDE = "outside of blocks"


@dataclass(frozen=True)
class Bar:
    """A rectangle with a tooltip; `kind` is its class in the style sheet."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Label:
    text: str
    y: float


@dataclass(frozen=True)
class Chart:
    """Rectangles with a line of text to the left of each row."""

    name: str
    kinds: Sequence[str]
    labels: Sequence[Label]
    bars: Sequence[Bar]
    height: float
    width: int = LABELS + WIDTH


@dataclass(frozen=True)
class Fold:
    """The diff of the part of a graph that belongs to one block."""

    name: str
    lines: Sequence[str]

    @property
    def added(self) -> int:
        return sum(line.startswith("+") for line in self.lines)

    @property
    def cut(self) -> int:
        return sum(line.startswith("-") for line in self.lines)


def decision_charts(decisions: Sequence[Decision]) -> Iterator[Chart]:
    """Yield a chart for each stream of the last trajectory: a row per site, a column per step."""
    last = [d for d in decisions if d.trajectory == decisions[-1].trajectory]
    streams: dict[Hashable, list[Decision]] = {}
    for decision in last:
        streams.setdefault(decision.stream, []).append(decision)
    for stream, rows in streams.items():
        yield _decision_chart(f"Stream {stream}" if len(streams) > 1 else "Decisions", rows)


def _decision_chart(name: str, decisions: Sequence[Decision]) -> Chart:
    sites: dict[tuple[str, int], list[tuple[int, str, str]]] = {}
    for d in decisions:
        for site, what in d.strategies.items():
            sites.setdefault((site, d.occurrence), []).append((d.step, what, str(d.reasons[site])))
    first, last = min(d.step for d in decisions), max(d.step for d in decisions)
    step = WIDTH / (last - first + 1)
    labels, bars = [], []
    for number, ((site, _), cells) in enumerate(sites.items()):
        labels.append(Label(site[-36:], number * ROW + 10))
        for (what, why), run in itertools.groupby(cells, key=lambda cell: cell[1:]):
            steps = [cell[0] for cell in run]
            x, width = LABELS + (steps[0] - first) * step, (steps[-1] - steps[0] + 1) * step
            title = f"{site}, step {steps[0]} to {steps[-1]}: {what}, {why}"
            bars.append(Bar(what, round(x, 2), number * ROW, round(width - 0.5, 2), ROW - 1, title))
    return Chart(name, tuple(dict.fromkeys(bar.kind for bar in bars)), labels, bars, len(sites) * ROW)


def time_charts(predicted: Prediction | PredictionReason, measured: Stats | None) -> Iterator[Chart]:
    """Yield a chart of the predicted and one of the measured seconds of each call, if they are known."""
    if isinstance(predicted, Prediction) and predicted.roofline is not None:
        yield _time_chart("Predicted time of each step", predicted.step_seconds[0])
    if measured is not None and (calls := [c for c in measured.timed if not c.compiles]):
        last = [call.seconds for call in calls if call.trajectory == calls[-1].trajectory]
        yield _time_chart("Measured time of each call of the last trajectory", last)


def _time_chart(name: str, seconds: Sequence[float]) -> Chart:
    step, most, height = WIDTH / len(seconds), max(seconds), 60
    bars = [
        Bar(
            "compute",
            round(LABELS + i * step, 2),
            round(height * (1 - each / most), 2),
            round(step * 0.9, 2),
            round(height * each / most, 2),
            f"{i}: {1000 * each:.3g} ms",
        )
        for i, each in enumerate(seconds)
    ]
    return Chart(name, (), [Label(f"{1000 * most:.3g} ms", 10)], bars, height)


def graph_folds(report: Report) -> Iterator[Fold]:
    """Yield the diff of the graph with most sites and its variant that reuses most, block by block."""
    graph = max(report.rewritten, key=lambda r: len(r.reached))
    row = graph.most_reused
    blocks = {site.block for site in graph.found.sites if site.block}
    before = _by_block(printing.readable(graph.captured.gm), blocks)
    after = _by_block(printing.readable(graph.straight(row).gm), blocks)
    names = "captured", f"variant {row_name(row)}"
    for block in dict.fromkeys((*before, *after)):
        old, new = before.get(block, []), after.get(block, [])
        lines = list(difflib.unified_diff(old, new, *names, lineterm="", n=2))[2:]
        if lines:
            yield Fold(block, lines)


def _by_block(text: str, blocks: set[str]) -> dict[str, list[str]]:
    """Return the lines of a printed graph by block. A comment names the module of the lines after it."""
    found: dict[str, list[str]] = {}
    block = OUTSIDE
    for line in text.splitlines():
        if line.lstrip().startswith("# "):
            path = line.lstrip().removeprefix("# ")
            around = [b for b in blocks if path == b or path.startswith(f"{b}.")]
            block = max(around, key=len, default=OUTSIDE)
        found.setdefault(block, []).append(line)
    return found
