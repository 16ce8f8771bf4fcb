"""The sections of an analysis in the HTML report: a table of numbers, lines by layer, and maps.

matplotlib draws the same plots as files (`plots`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from dit_rewrite.analysis import compare, plots
from dit_rewrite.analysis.places import Quantity
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.analysis.statistics import Row
from dit_rewrite.report.charts import Chart, line_chart, map_chart
from dit_rewrite.report.section import Cells, Section

PREDICTORS = 6  # rows of the table of measures that predict reuse errors


def sections(analyses: Mapping[str, Analysis]) -> Iterator[Section]:
    """Yield the sections of analyses of one model, by name. The first is drawn in full; the profiles of the others,
    with other schedulers or numbers of steps, are compared with it. Raises OtherAnalysis for another model's."""
    (name, first), *others = analyses.items()
    for other, analysis in others:
        analysis.check({**analysis.key, "model": first.model}, other)
    lines = compare.summary(first).splitlines()[:1]
    yield Section("redundancy", "Redundancy", lines, _numbers(first), charts=list(_charts(first)))
    if others:
        rows, charts = _compared(name, first, dict(others)), list(_stability(analyses))
        yield Section("stability", "Stability of the profiles", rows=rows, charts=charts)
    if first.errors is not None:
        errors = {site: _values(first.errors.of(site)) for site in first.errors.sites}
        chart = map_chart("Relative L2 error of the final image, by the site that is reused at one step", errors)
        yield Section("reuse-errors", "Reuse errors", rows=_predictors(first), charts=[chart])


def _measured(analysis: Analysis) -> Iterator[tuple[Quantity, list[Row]]]:
    for quantity in Quantity:
        rows = analysis.rows(quantity=str(quantity))
        if rows:
            yield quantity, sorted(rows, key=lambda row: (row.modality, row.stream, row.layer))


def _numbers(analysis: Analysis) -> list[Cells]:
    table: list[Cells] = [
        ("quantity", "relative L1 per step", "L1 over prompts: deviation / mean", "rank correlation between prompts")
    ]
    for quantity, _ in _measured(analysis):
        spread = compare.coefficient_of_variation(analysis, quantity)
        shown = spread if math.isfinite(spread.mean) else ""
        alike = _correlation(compare.prompt_stability(analysis, quantity))
        table.append((quantity, f"{analysis.overall(quantity, 'relative_l1'):.4f}", shown, alike))
    return table


def _correlation(found: compare.Correlation) -> str:
    return f"{found.mean:.2f} (lowest tenth {found.low:.2f}, {found.number} in all)" if found.number else ""


def _charts(analysis: Analysis) -> Iterator[Chart]:
    ends = "step 0", f"step {analysis.steps - 1}"
    for quantity, rows in _measured(analysis):
        lines = {plots.label(row): _values(analysis.mean(row)) for row in rows}
        yield line_chart(
            f"{quantity}: mean |x - y| of consecutive steps, by layer (first: violet, last: red)", lines, ends
        )
        if len(rows) > 1:
            yield map_chart(f"{quantity}: mean |x - y| of consecutive steps", lines)
    if len({row.distance for row in analysis.table.rows} - {0}) > 1:
        for row in analysis.rows(quantity=str(Quantity.OUTPUT))[:1]:
            alike = plots.step_similarity(analysis, row)
            steps = {f"step {step}": _values(alike[step]) for step in range(analysis.steps)}
            yield map_chart("output: cosine of each two steps", steps)


def _compared(name: str, first: Analysis, others: Mapping[str, Analysis]) -> list[Cells]:
    table: list[Cells] = [("quantity", *(f"rank correlation of {name} and {other}" for other in others))]
    for quantity, _ in _measured(first):
        found = [_correlation(compare.stability(first, other, quantity)) for other in others.values()]
        table.append((quantity, *found))
    return table


def _stability(analyses: Mapping[str, Analysis]) -> Iterator[Chart]:
    """Yield a chart for each quantity that all analyses have: the means over layers, each over its own mean."""
    for quantity in Quantity:
        rows = {name: analysis.rows(quantity=str(quantity)) for name, analysis in analyses.items()}
        if all(rows.values()):
            lines = {}
            for name, analysis in analyses.items():
                mean = torch.stack([analysis.mean(row) for row in rows[name]]).nanmean(0)[1:]
                lines[name] = _values(mean / mean.nanmean())
            names = ", ".join(analyses)
            yield line_chart(f"{quantity}: L1 over its mean, by progress ({names})", lines, ("start", "end"))


def _predictors(analysis: Analysis) -> list[Cells]:
    """Return the table of the measures that predict reuse errors best."""
    head = "measure", "quantity", "rank correlation with the error", "among the sites of a step", "pairs"
    table: list[Cells] = [head]
    for found in compare.predictions(analysis)[:PREDICTORS]:
        numbers = f"{found.overall:.2f}", f"{found.among_sites:.2f}", found.pairs
        table.append((found.measure, found.quantity, *numbers))
    return table


def _values(tensor: torch.Tensor) -> Sequence[float]:
    values: list[float] = tensor.tolist()
    return values
