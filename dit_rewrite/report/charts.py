"""The charts of the HTML report as rectangles and lines, and the graph diff in parts that can be folded."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dit_rewrite.compiler.rewritten import row_name
from dit_rewrite.errors import PredictionReason
from dit_rewrite.passes.rewrite import printing
from dit_rewrite.report.explain import Report
from dit_rewrite.report.prediction import Prediction
from dit_rewrite.runtime.stats import Decision, Stats

LABELS, WIDTH, ROW = 190, 600, 14  # in units of the view box
HEIGHT, DOT = 150, 7  # of a chart of lines or points, and of a point
SHADES = 24  # of a map
OUTSIDE = "outside of blocks"


@dataclass(frozen=True)
class Bar:
    """A rectangle with a tooltip; `kind` is its class in the style sheet, and `shade` its opacity."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    title: str
    shade: float = 1.0


@dataclass(frozen=True)
class Line:
    """A polyline with a tooltip; `points` is the text of the SVG attribute, and `hue` the angle of its colour."""

    points: str
    hue: int
    title: str


@dataclass(frozen=True)
class Label:
    text: str
    y: float
    x: float = 0


@dataclass(frozen=True)
class Chart:
    """Rectangles and lines, with text to the left of each row."""

    name: str
    kinds: Sequence[str]
    labels: Sequence[Label]
    bars: Sequence[Bar]
    height: float
    width: int = LABELS + WIDTH
    polylines: Sequence[Line] = ()


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
    """Yield a chart of the predicted and the measured seconds of each call, as far as they are known, on one scale."""
    known: dict[str, Sequence[float]] = {}
    if isinstance(predicted, Prediction) and predicted.roofline is not None:
        known["predicted"] = [each for step in zip(*predicted.step_seconds, strict=True) for each in step]
    if measured is not None and (calls := [c for c in measured.timed if not c.compiles]):
        known["measured"] = [call.seconds for call in calls if call.trajectory == calls[-1].trajectory]
    if known:
        yield _time_chart(known)


def _time_chart(known: Mapping[str, Sequence[float]]) -> Chart:
    most, height = max(map(max, known.values())), 60
    bars = []
    for number, (kind, seconds) in enumerate(known.items()):
        step = WIDTH / len(seconds)
        width = 0.9 * step / len(known)
        for i, each in enumerate(seconds):
            tall = round(height * each / most, 2)
            x = round(LABELS + i * step + number * width, 2)
            bars.append(Bar(kind, x, round(height - tall, 2), round(width, 2), tall, f"{i}: {1000 * each:,.2f} ms"))
    return Chart("Time of each call", tuple(known), [Label(f"{1000 * most:,.2f} ms", 10)], bars, height)


def map_chart(name: str, rows: Mapping[str, Sequence[float]]) -> Chart:
    """Return a map with a row for each sequence of values, darker for larger ones; NaN is left out.

    Neighbours of equal shade are one rectangle.
    """
    values = [value for row in rows.values() for value in row if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    step = WIDTH / max(map(len, rows.values()), default=1)

    def shade(value: float) -> int:
        return 1 + round((SHADES - 1) * (value - low) / (high - low or 1)) if math.isfinite(value) else 0

    bars, labels = [], []
    for number, (label, row) in enumerate(rows.items()):
        labels.append(Label(label[-36:], number * ROW + 10))
        for dark, run in itertools.groupby(enumerate(row), key=lambda cell: shade(cell[1])):
            cells = list(run)
            if dark:
                (first, value), (last, _) = cells[0], cells[-1]
                title = f"{label}, {f'{first} to {last}' if last > first else first}: {value:.4g}"
                x, width = round(LABELS + first * step, 2), round((last - first + 1) * step, 2)
                bars.append(Bar("heat", x, number * ROW, width, ROW - 1, title, round(dark / SHADES, 3)))
    return Chart(f"{name}, from {low:.4g} (light) to {high:.4g} (dark)", (), labels, bars, len(rows) * ROW)


def line_chart(name: str, lines: Mapping[str, Sequence[float]], ends: tuple[str, str]) -> Chart:
    """Return a chart with a line for each sequence of values, from the first (violet) to the last (red).

    All lines have the same width; NaN is left out. `ends` are the labels of the ends of the horizontal axis.
    """
    values = [value for line in lines.values() for value in line if math.isfinite(value)]
    low, high = min([0.0, *values]), max(values, default=1.0)
    drawn = []
    for number, (label, line) in enumerate(lines.items()):
        step = WIDTH / max(len(line) - 1, 1)
        known = [(i, value) for i, value in enumerate(line) if math.isfinite(value)]
        places = [(LABELS + i * step, HEIGHT * (high - value) / (high - low or 1)) for i, value in known]
        hue = round(275 * (1 - number / max(len(lines) - 1, 1)))
        drawn.append(Line(" ".join(f"{x:.1f},{y:.1f}" for x, y in places), hue, label))
    axis = [Label(f"{high:.4g}", 10), Label(f"{low:.4g}", HEIGHT - 2)]
    axis += _ends(*ends)
    return Chart(name, (), axis, (), HEIGHT + 16, polylines=drawn)


def _ends(first: str, last: str) -> list[Label]:
    """Return the labels of the ends of a horizontal axis."""
    return [Label(first, HEIGHT + 12, LABELS), Label(last, HEIGHT + 12, LABELS + WIDTH - 45)]


def front_charts(points: Sequence[Mapping[str, object]]) -> Iterator[Chart]:
    """Yield a chart of points over their first two numbers, if they all have the same two.

    A point whose "front" is false is drawn as another one, and one that is not finite is not drawn. The tooltip has all
    values of the point.
    """
    names = [[n for n, v in p.items() if isinstance(v, int | float) and not isinstance(v, bool)][:2] for p in points]
    if not names or len(names[0]) < 2 or any(each != names[0] for each in names):
        return
    across, up = names[0]
    at = [(_number(point[across]), _number(point[up])) for point in points]
    points = [point for point, place in zip(points, at, strict=True) if all(map(math.isfinite, place))]
    at = [place for place in at if all(map(math.isfinite, place))]
    if not at:
        return
    (left, right), (low, high) = ((min(column), max(column)) for column in zip(*at, strict=True))
    bars = [
        Bar(
            "front" if point.get("front", True) else "other",
            round(LABELS + (WIDTH - DOT) * (x - left) / (right - left or 1), 2),
            round((HEIGHT - DOT) * (high - y) / (high - low or 1), 2),
            DOT,
            DOT,
            ", ".join(f"{name}={value}" for name, value in point.items()),
        )
        for point, (x, y) in zip(points, at, strict=True)
    ]
    axis = [Label(f"{up}: {high:.4g}", 10), Label(f"{low:.4g}", HEIGHT - 2)]
    axis += _ends(f"{across}: {left:.4g}", f"{right:.4g}")
    yield Chart(f"{up} over {across}", tuple(dict.fromkeys(bar.kind for bar in bars)), axis, bars, HEIGHT + 16)


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


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
