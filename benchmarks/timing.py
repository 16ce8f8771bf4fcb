"""Timing by ratios of alternating runs in one process, and the output of a benchmark."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of several runs, in seconds, or without a unit for ratios."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
        return cls(statistics.median(samples), low, high, len(samples))


def synchronise() -> None:
    """Synchronise with the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of one run, including the work of the device."""
    synchronise()
    began = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - began


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every run once per round, so that a slow phase of the machine affects all of them."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(seconds(run))
    return samples


def ratio(samples: Mapping[str, list[float]], above: str, below: str) -> Spread:
    """Return the ratio of two runs, computed within each round."""
    return Spread.of([a / b for a, b in zip(samples[above], samples[below], strict=True)])


def machine() -> dict[str, Any]:
    """Return the hardware and the versions, which are recorded with every figure."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@dataclass(frozen=True)
class Row:
    """A line of a benchmark's table: the measurement, its bound, and whether that is met."""

    what: str
    value: Spread
    unit: str
    bound: str
    held: bool


def report(name: str, rows: list[Row], details: Mapping[str, Any]) -> None:
    """Print the table and write ``results/<name>.json``."""
    show(name, rows)
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "rows": [asdict(row) for row in rows], **details}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def show(title: str, rows: list[Row]) -> None:
    """Print the table, with rich if it is installed."""
    header = ("measured", "median", "quartiles", "bound", "held")
    lines = [_cells(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(_columns([header, *lines], title)))
        return
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=120).print(table)


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"{row.value.low:.4g} … {row.value.high:.4g}"
    return row.what, f"{row.value.median:.4g} {row.unit}", spread, row.bound, "yes" if row.held else "NO"


def _columns(lines: list[tuple[str, ...]], title: str) -> list[str]:
    """Format the cells in columns without rich."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [title] + ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
