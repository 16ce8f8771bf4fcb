"""Plots of an analysis by matplotlib: lines by layer, a map of layers and steps, similarity of steps, stability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.analysis.places import Quantity
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.analysis.statistics import Row
from dit_rewrite.errors import BadArgument, MissingExtra


def lines(analysis: Analysis, quantity: str, path: str | Path, measure: str = "l1", **conditions: Any) -> Path:
    """Draw a measure over the steps, one line per site; the band is one standard deviation over the prompts.

    `conditions` select rows, as in `Analysis.rows`.
    """
    rows = _rows(analysis, quantity, conditions)
    figure, axes = _figure()
    colors = _pyplot().cm.viridis
    depth = max(row.layer for row in rows) or 1
    for row in rows:
        mean, spread = analysis.mean(row, measure), analysis.deviation(row, measure)
        color = colors(row.layer / depth)
        axes.plot(range(len(mean)), mean.numpy(), color=color, label=label(row), linewidth=1)
        band = (mean - spread).numpy(), (mean + spread).numpy()
        axes.fill_between(range(len(mean)), *band, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="step", ylabel=f"{measure} of {quantity}", title=f"{analysis.name}: {quantity} by layer")
    if len(rows) <= 12:
        axes.legend(fontsize=6)
    return _saved(figure, path)


def heat_map(analysis: Analysis, quantity: str, path: str | Path, measure: str = "l1", **conditions: Any) -> Path:
    """Draw a measure of each layer (down) at each step (across)."""
    rows = _rows(analysis, quantity, conditions)
    figure, axes = _figure()
    values = torch.stack([analysis.mean(row, measure) for row in rows])
    picture = axes.imshow(values.numpy(), aspect="auto", origin="lower", interpolation="nearest")
    figure.colorbar(picture, label=measure)
    if len(rows) <= 40:
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=5)
    axes.set(xlabel="step", ylabel="layer", title=f"{analysis.name}: {quantity}")
    return _saved(figure, path)


def step_similarity(analysis: Analysis, row: Row, measure: str = "cosine") -> Tensor:
    """Return the measure between each two steps (steps, steps), NaN where their distance was not measured.

    `row` is of any distance; the rows that differ from it in the distance alone are read.
    """
    found = torch.full((analysis.steps, analysis.steps), math.nan, dtype=torch.float64)
    for other in (other for other in analysis.table.rows if other.distance and other._replace(distance=1) == row):
        values = analysis.mean(other, measure)
        for step in range(other.distance, len(values)):
            found[step, step - other.distance] = found[step - other.distance, step] = values[step]
    return found


def similarity_map(analysis: Analysis, row: Row, path: str | Path, measure: str = "cosine") -> Path:
    """Draw `step_similarity` as a map. Analyze with many `distances`, such as range(1, steps)."""
    figure, axes = _figure(square=True)
    picture = axes.imshow(step_similarity(analysis, row._replace(distance=1), measure).numpy(), origin="lower")
    figure.colorbar(picture, label=measure)
    axes.set(xlabel="step", ylabel="step", title=f"{label(row)}: {row.quantity}")
    return _saved(figure, path)


def stability(
    analyses: Mapping[str, Analysis], quantity: str, path: str | Path, measure: str = "l1", **conditions: Any
) -> Path:
    """Draw the mean over layers against progress for several schedulers, numbers of steps or sets of prompts.

    Each profile is divided by its own mean, as steps of another size change tensors by other amounts.
    """
    figure, axes = _figure()
    for name, analysis in analyses.items():
        rows = _rows(analysis, quantity, conditions)
        mean = torch.stack([analysis.mean(row, measure) for row in rows]).nanmean(0)[1:]
        axes.plot(torch.linspace(0, 1, len(mean)).numpy(), (mean / mean.nanmean()).numpy(), label=name)
    axes.set(xlabel="progress", ylabel=f"{measure} / its mean", title=quantity)
    axes.legend()
    return _saved(figure, path)


def draw(analysis: Analysis, folder: str | Path, measure: str = "l1") -> list[Path]:
    """Draw all plots of an analysis into a folder, and return their paths."""
    folder = Path(folder)
    found = []
    for quantity in Quantity:
        rows = analysis.rows(quantity=str(quantity))
        if rows:
            name = str(quantity).replace(" ", "_")
            found.append(lines(analysis, str(quantity), folder / f"{name}_lines.png", measure))
            if len(rows) > 1:
                found.append(heat_map(analysis, str(quantity), folder / f"{name}_map.png", measure))
    outputs = analysis.rows(quantity=str(Quantity.OUTPUT))
    if outputs and len({row.distance for row in analysis.table.rows} - {0}) > 1:
        found.append(similarity_map(analysis, outputs[0], folder / "output_similarity.png"))
    return found


def _rows(analysis: Analysis, quantity: str, conditions: Mapping[str, Any]) -> list[Row]:
    rows = analysis.rows(quantity=str(quantity), **conditions)
    if not rows:
        known = dict.fromkeys(row.quantity for row in analysis.table.rows)
        raise BadArgument("plot", "quantity", quantity, f"a quantity that was measured: {', '.join(known)}")
    return sorted(rows, key=lambda row: (row.modality, row.stream, row.layer))


def label(row: Row) -> str:
    return " ".join([row.site, *(text for text in (row.modality, row.stream) if text not in ("all", "0", "None"))])


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "drawing an analysis", "analysis") from error
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _figure(square: bool = False) -> tuple[Any, Any]:
    return _pyplot().subplots(figsize=(5, 4.2) if square else (7, 4.2), layout="constrained")  # type: ignore[no-any-return]


def _saved(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    _pyplot().close(figure)
    return path
