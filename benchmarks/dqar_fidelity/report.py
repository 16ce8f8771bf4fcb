"""The table of the fidelity benchmark, its claims, and the picture of error over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.dqar_fidelity.rows import STEPS, Result
from benchmarks.record import Claim, print_claims
from dit_rewrite.errors import MissingExtra

MARKERS = {
    "FORA": ("o", "tab:blue"),
    "DQAR": ("s", "tab:green"),
    "DQAR, SNR gate": ("D", "tab:olive"),
    "DQAR, entropy gate": ("^", "tab:red"),
    "FirstBlockCache": ("P", "tab:purple"),
    "keys and values": ("x", "tab:brown"),
    "int8, fp8": ("*", "tab:pink"),
}
HEADINGS = ("ms/image", "time", "quartiles", "reuse", "rel. L2", "SSIM", "class", "FD real", "FD unc.", "KiB")
PANELS = {"relative_l2": "relative L2 to the uncached images", "frechet_data": "Fréchet distance to real images"}


def show(rows: Sequence[Result], claims: Sequence[Claim], frechet_floor: float) -> None:
    """Print every row, then every claim with the number of its comparisons."""
    console = Console(width=140)
    console.print(build_table(rows))
    console.print(f"Fréchet distance of as many other real images: {frechet_floor:.4g}", highlight=False)
    print_claims(claims)


def build_table(rows: Sequence[Result]) -> Table:
    table = Table(title="Time is relative to the uncached model's; images are compared with its images")
    table.add_column("policy", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Result) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.seconds_per_image.median * 1e3:.1f}",
        f"{row.ratio.median:.3f}",
        f"{row.ratio.low:.2f} … {row.ratio.high:.2f}",
        f"{row.reuse:.1%}" if row.family != STEPS else "",
        f"{row.relative_l2:.4f}",
        f"{row.ssim:.4f}",
        f"{row.accuracy:.1%}",
        f"{row.frechet_data:.4g}",
        f"{row.frechet_uncached:.4g}",
        f"{row.cache_bytes / 1024:.0f}" if row.cache_bytes else "",
    )


def group(row: Result) -> str:
    """Return the label of a row in the picture's legend."""
    if row.key["kv"]:
        return "keys and values"
    if row.key["store"] is not None:
        return "int8, fp8"
    gate = "" if row.setting("snr_threshold") is None else ", SNR gate"
    gate = gate if row.setting("entropy_threshold") is None else ", entropy gate"
    return row.family + gate


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def draw(rows: Sequence[Result], path: Path) -> None:
    """Plot error over time: points for policies, a curve for fewer steps. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "the picture", "benchmark") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        controls = sorted((r.ratio.median, getattr(r, name)) for r in rows if r.family == STEPS)
        axes.plot(*_columns([point for point in controls if point[1] > 0]), "k.-", label="fewer steps, uncached")
        for label, (marker, colour) in MARKERS.items():
            points = [(r.ratio.median, getattr(r, name)) for r in rows if r.family != STEPS and group(r) == label]
            if points:
                axes.plot(*_columns(points), marker, color=colour, label=label)
        axes.set(xlabel="time / uncached", title=title, yscale="log")
        axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
