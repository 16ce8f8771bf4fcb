"""One HTML page about a rewritten model, without scripts and without any request to the network.

Pictures are inlined as data URIs, and all texts, such as prompts and module names, are escaped by the template.
Importing the module needs jinja2, and raises MissingExtra without it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dit_rewrite.errors import MissingExtra
from dit_rewrite.policy.files import write_whole
from dit_rewrite.policy.plan import Plan
from dit_rewrite.report.charts import decision_charts, front_charts, graph_folds, time_charts
from dit_rewrite.report.comparison import comparison, side_by_side
from dit_rewrite.report.explain import Report
from dit_rewrite.report.section import Cells, Section
from dit_rewrite.runtime.stats import Decision

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ImportError as error:
    raise MissingExtra("jinja2", "the report", "report") from error

TEMPLATE = "page.html.jinja"
Picture = bytes | str  # a PNG, or the text of an SVG


@dataclass(frozen=True)
class Page:
    """The contents of a page. A section without contents is left out.

    ``analysis`` has the sections of a redundancy analysis (`analysis.charts.sections`). ``figures`` are other plots and
    ``images`` are samples, each by its caption; the page shows the samples side by side. ``front`` has the points that
    tuning found, as values by name; the first two numbers of the points are drawn. ``certificate`` has the texts of an
    autopolicy's certificate by name.
    """

    report: Report
    title: str = "dit_rewrite"
    model: Mapping[str, object] = field(default_factory=dict)
    decisions: Sequence[Decision] = ()
    analysis: Sequence[Section] = ()
    figures: Mapping[str, Picture] = field(default_factory=dict)
    plan: Plan | None = None
    front: Sequence[Mapping[str, object]] = ()
    images: Mapping[str, Picture] = field(default_factory=dict)
    certificate: Mapping[str, object] = field(default_factory=dict)

    def html(self) -> str:
        """Return the page."""
        loader = FileSystemLoader(Path(__file__).parent)
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        return environment.get_template(TEMPLATE).render(title=self.title, sections=self.sections)

    @cached_property
    def sections(self) -> list[Section]:
        """The sections that have contents."""
        return [section for section in self._sections() if not section.is_empty]

    def save(self, path: str | Path) -> None:
        """Write the page atomically."""
        write_whole(Path(path), self.html())

    def _sections(self) -> Iterator[Section]:
        report = self.report
        yield Section("model", "Model", (f"Policy: {report.policy}",), _pairs(self.model))
        yield Section("certificate", "Certificate", rows=_pairs(self.certificate))
        yield Section("sites", "Sites", _costs(report), _sites(report))
        yield from self.analysis
        yield Section("figures", "Figures", pictures=_inlined(self.figures))
        yield Section("plan", "Plan", pictures=_inlined(_plan_picture(self.plan)))
        yield Section("front", "Front", rows=_table(self.front), charts=list(front_charts(self.front)))
        yield Section("images", "Images", pictures=_inlined(self.images))
        yield Section("graph", "Graph", _diff_head(report), folds=list(graph_folds(report)))
        yield Section("decisions", "Decisions over time", charts=list(decision_charts(self.decisions)))
        yield Section(
            "prediction",
            "Predicted and measured",
            rows=side_by_side(report.prediction, report.measured, report.streams * report.stream_bytes),
            text="\n".join(comparison(report.prediction, report.measured)),
            charts=list(time_charts(report.prediction, report.measured)),
        )


def _pairs(values: Mapping[str, object]) -> list[Cells]:
    return [("", ""), *values.items()] if values else []


def _costs(report: Report) -> list[str]:
    return [f"FLOPs of a call of graph {i}: {each.total}" for i, each in enumerate(report.costs)]


def _sites(report: Report) -> list[Cells]:
    """Return the table of sites, with their costs as expressions, and of the refused places."""
    costs = [{site.name: site for site in each.sites} for each in report.costs]
    rows: list[Cells] = [("site", "kind", "layer", "guard of reuse", "FLOPs", "bytes")]
    for place in report.sites:
        known = costs[place.graph].get(place.site.name)
        flops = place.site.flops if known is None else known.flops
        guard = place.guard if place.reachable else "(computes)"
        rows.append((place.site.name, place.site.kind, place.site.layer, guard, flops, place.bytes))
    return rows + [(r.path or "(the model itself)", "refused", "", r.reason, "", "") for r in report.refused]


def _table(points: Sequence[Mapping[str, object]]) -> list[Cells]:
    names = list(dict.fromkeys(name for point in points for name in point))
    return [names, *([point.get(name, "") for name in names] for point in points)]


def _diff_head(report: Report) -> list[str]:
    head = [line for line in report.graph_diff().splitlines() if line.startswith("# ")]
    return [line.removeprefix("# ") for line in head[:1]]


def _inlined(pictures: Mapping[str, Picture]) -> list[tuple[str, str]]:
    """Return pictures as data URIs, by their captions. An SVG is an image there, and can run nothing."""
    return [(name, _uri(picture)) for name, picture in pictures.items()]


def _uri(picture: Picture) -> str:
    kind, content = ("svg+xml", picture.encode()) if isinstance(picture, str) else ("png", picture)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _plan_picture(plan: Plan | None) -> dict[str, Picture]:
    if plan is None:
        return {}
    from dit_rewrite.report.plan_picture import draw

    return {"The strategy of each layer at each step": _svg(draw(plan))}


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()
