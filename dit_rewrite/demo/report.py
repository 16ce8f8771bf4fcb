"""The output of the demo: progress bars, the table, verdicts, images, graphs and results."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.demo.shapes.picture import save_rows
from dit_rewrite.errors import MissingExtra

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise MissingExtra("rich", "the demo", "demo") from error

console = Console()
FORECAST = "forecast"  # prefix of the names of methods that forecast


def print_table(table: Table) -> None:
    """Print a table. Without a terminal, the width is as large as the table needs, so that nothing is cut."""
    if console.is_terminal:
        console.print(table)
    else:
        needed = console.measure(table, options=console.options.update(width=sys.maxsize)).maximum
        Console(width=max(console.width, needed)).print(table)


@dataclass(frozen=True)
class Result:
    """A row of the table; distances are to the uncached images."""

    name: str
    control_of: str | None
    steps: int
    seconds: float
    all_seconds: list[float]
    speed_up: float
    recomputed: float
    relative_l2: float
    psnr: float
    accuracy: float
    compile_seconds: float | None
    stats: dict[str, object] | None

    @property
    def label(self) -> str:
        """The label of a row of images."""
        return self.name if self.control_of is None else f"{self.name}, uncached"


def announce(arguments: argparse.Namespace, guidance: float) -> None:
    console.print(
        f"{arguments.images} images, {arguments.steps} DDIM steps, guidance {guidance}, on {arguments.device} "
        f"(threads: {torch.get_num_threads()}). Compiling comes first and takes the longest."
    )


@contextmanager
def open_progress() -> Iterator[Callable[..., Any]]:
    """Yield ``bar(title, total)``, a context manager that yields ``tick()``. Without a terminal, finished bars print a
    line each."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn())
    drawn = console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=4, disable=not drawn) as progress:

        @contextmanager
        def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
            row, began = progress.add_task(title, total=total), time.perf_counter()
            yield lambda: progress.advance(row)
            if not drawn:
                console.print(f"{title}: {time.perf_counter() - began:.0f} s")

        yield bar


def pairs(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Return each cached method with its control."""
    by_name = {result.name: result for result in results if result.control_of is None}
    return [(by_name[result.control_of], result) for result in results if result.control_of is not None]


def winner(cached: float, control: float, names: tuple[str, str], *, low_wins: bool) -> str:
    """Return the name of the better method, or "neither"."""
    if cached == control:
        return "neither"
    return names[0] if (cached < control) == low_wins else names[1]


def verdict(cached: Result, control: Result) -> str:
    """Compare a cached method with fewer steps at the same time, by each metric."""
    names = (cached.name, control.name)
    winners = {
        "relative L2": winner(cached.relative_l2, control.relative_l2, names, low_wins=True),
        "PSNR": winner(cached.psnr, control.psnr, names, low_wins=False),
        "class accuracy": winner(cached.accuracy, control.accuracy, names, low_wins=False),
    }
    found = [f"{name} by {' and '.join(metrics_won(winners, name))}" for name in sorted({*winners.values()})]
    times = f"{cached.name} ({cached.seconds:.2f} s) and {control.name} ({control.seconds:.2f} s)"
    return f"Better of {times}: {', '.join(found)}."


def summary(results: Sequence[Result]) -> str:
    """Report which forecasts are closer to the uncached images than fewer steps at the same time."""
    tried = [(cached, control) for cached, control in pairs(results) if cached.name.startswith(FORECAST)]
    wins = [cached for cached, control in tried if cached.relative_l2 < control.relative_l2]
    losses = [cached for cached, control in tried if cached.relative_l2 >= control.relative_l2]
    found = [f"closer than fewer steps: {_named(wins)}"] if wins else []
    found += [f"fewer steps are as close or closer: {_named(losses)}"] if losses else []
    return f"By relative L2, {'; '.join(found)}."


def _named(results: Sequence[Result]) -> str:
    return ", ".join(f"{r.name} at {r.speed_up:.2f}x" for r in results)


def metrics_won(winners: dict[str, str], name: str) -> list[str]:
    return [metric for metric, best in winners.items() if best == name]


def figures(result: Result) -> tuple[str, ...]:
    """Return the cells of a row."""
    distance = "-" if result.relative_l2 == 0 else f"{result.relative_l2:.4f}"
    peak = "-" if math.isinf(result.psnr) else f"{result.psnr:.1f}"
    return (
        result.name,
        str(result.steps),
        f"{result.seconds:.2f}",
        f"{result.speed_up:.2f}x",
        f"{result.recomputed:.0%}",
        distance,
        peak,
        f"{result.accuracy:.0%}",
    )


def build_table(results: Sequence[Result]) -> Table:
    table = Table(
        title="Distances are to the uncached images",
        caption="Below each policy: uncached DPM-Solver++ 2M with as many steps as fit into the policy's time",
    )
    table.add_column("method", no_wrap=True)
    for heading in ("steps", "seconds", "speed-up", "Recomp%", "rel. L2", "PSNR dB", "class"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        closes = result.control_of is not None or result.name == "uncached"
        table.add_row(*figures(result), end_section=closes)
    return table


def compile_line(results: Sequence[Result]) -> str:
    """Report the compile times in order. Inductor's cache speeds up the later ones."""
    spent = [f"{r.name} {r.compile_seconds:.0f} s" for r in results if r.compile_seconds is not None]
    return f"Compile times, not in the table: {', '.join(spent)} (later ones use Inductor's cache)."


def processor() -> str:
    """Return the name of the CPU, as far as the system provides it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, object]:
    facts: dict[str, object] = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if hasattr(os, "getloadavg"):
        facts["load_average"] = os.getloadavg()
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    packages = ("dit_rewrite", "torch", "diffusers", "triton", "sympy", "networkx")
    found = {dist.name: dist.version for dist in metadata.distributions() if dist.name in packages}
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", **found}


def results_of(arguments: argparse.Namespace, results: Sequence[Result], verdicts: list[str]) -> dict[str, Any]:
    """Return the table's values, the settings and the environment. An infinite PSNR is None."""
    rows = [asdict(r) | {"psnr": None if math.isinf(r.psnr) else r.psnr} for r in results]
    own = ("command", "out", "json", "debug")
    settings = {name: value for name, value in vars(arguments).items() if name not in own}
    return {
        "settings": settings,
        "hardware": hardware(arguments.device),
        "versions": versions(),
        "methods": rows,
        "verdicts": verdicts,
    }


def write_all(
    arguments: argparse.Namespace,
    images: Sequence[tuple[Result, Tensor | None]],
    names: Sequence[str],
    report: Any,
    reported: str,
    seconds: float,
) -> dict[str, Any]:
    """Print the table and write the output folder. `report` is the report of the method called `reported`.

    Returns the content of ``results.json``.
    """
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results = [result for result, _ in images]
    verdicts = [verdict(*pair) for pair in pairs(results)]
    save_rows(out / "images.png", [(r.label, picture) for r, picture in images if picture is not None], names)
    (out / "graph.diff").write_text(report.graph_diff())
    (out / "explain.txt").write_text(f"{report}\n")
    content = results_of(arguments, results, verdicts)
    (out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    print_table(build_table(results))
    for line in (compile_line(results), *verdicts, summary(results)):
        console.print(line, highlight=False)
    console.print(
        f"Wrote {out}/images.png (the images side by side), {out}/graph.diff and {out}/explain.txt (how {reported} "
        f"rewrote the model) and {out}/results.json. {seconds:.0f} s in total.",
        highlight=False,
    )
    return content
