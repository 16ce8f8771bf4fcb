"""The speed of this machine: seconds of matrix products and of copies at a few sizes, measured once and kept in a file.

A kernel takes as long as its floating-point operations or its bytes, whichever takes longer (the roofline). Speeds
depend on the size, so both are interpolated between the measured ones. How fast a product reads its weights is measured
where nothing else counts: with two rows, as in the modulation layers of a batch with guidance, and with weights that
are no longer in a cache, because a step of the model was between two reads. The file is in the user's cache folder,
named by the device, the threads, the version of torch and the dtype.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dit_rewrite.passes.analysis.work import Work
from dit_rewrite.policy.files import write_whole
from dit_rewrite.policy.plan import is_real

VERSION = 2
SIDES = {"cpu": (16, 64, 192, 512, 1024), "cuda": (64, 512, 1024, 2048, 4096)}  # of the square matrices
BYTES = (1 << 12, 1 << 17, 1 << 20, 1 << 23, 1 << 26)  # read and written by a copy
WIDTHS = {"cpu": (16, 64, 192, 384, 1152), "cuda": (64, 384, 1152, 3072)}  # of modulation layers
ROWS, PARTS = 2, 6  # a modulation layer maps a vector of each sample to six of its width
MOST_WEIGHTS = 128
OUT_OF_CACHE = 3 << 25  # bytes of weights that are read between two reads of one
ROUNDS = 5  # the fastest counts, since other load can only slow a run down

Points = tuple[tuple[float, float], ...]  # size and seconds, both ascending


@dataclass(frozen=True)
class Machine:
    """The device and the software that a measurement is valid for."""

    device: str
    threads: int
    torch_version: str
    dtype: str

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Return this machine, with the current number of threads."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        threads = 0 if device.type == "cuda" else torch.get_num_threads()
        return cls(name, threads, torch.__version__, str(dtype).removeprefix("torch."))

    @property
    def file(self) -> Path:
        """The file with the measurement."""
        key = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return cache_folder() / f"roofline-{key}.json"


@dataclass(frozen=True)
class Roofline:
    """Seconds of a matrix product by its FLOPs, of one with two rows by its bytes, and of a copy by its bytes."""

    products: Points
    thin: Points
    copies: Points

    def seconds(self, work: Work) -> float:
        """Return the seconds of one kernel."""
        if work.flops == 0:
            return _interpolated(self.copies, work.bytes)
        return max(_interpolated(self.products, work.flops), _interpolated(self.thin, work.bytes))

    def total(self, works: Iterable[Work]) -> float:
        """Return the seconds of kernels that run one after the other."""
        return sum(map(self.seconds, works))

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Roofline:
        """Return the roofline of this machine: from its file, or measured if there is no file, or a damaged one."""
        machine = Machine.of(device, dtype)
        found = _read(machine)
        if found is None:
            found = measure(device, dtype)
            _write(machine, found)
        return found


def cache_folder() -> Path:
    """Return the folder of the user for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_rewrite"


def _interpolated(points: Points, size: float) -> float:
    """Return the seconds of a size, on a logarithmic scale. Beyond the last point the speed stays; before the first
    one, the time does."""
    if size <= points[0][0]:
        return points[0][1] if size > 0 else 0.0
    if size >= points[-1][0]:
        return points[-1][1] * size / points[-1][0]
    right = bisect_left([each for each, _ in points], size)
    (a, begin), (b, end) = points[right - 1], points[right]
    share = math.log(size / a) / math.log(b / a)
    return float(begin ** (1 - share) * end**share)


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure this machine, in a few seconds."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    products, copies = [], []
    for side in SIDES[kind]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        products.append((2.0 * side**3, _fastest(partial(torch.mm, a, b, out=out), device)))
    for size in BYTES:
        source = torch.empty(size // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copies.append((float(size), _fastest(partial(target.copy_, source), device)))
    thin = [_thin(width, device, dtype) for width in WIDTHS[kind]]
    return Roofline(_ascending(products), _ascending(thin), _ascending(copies))


def _thin(width: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the bytes and the seconds of a modulation layer, whose weights are read from memory if they are large."""
    rows, bias = (
        torch.ones(ROWS, width, device=device, dtype=dtype),
        torch.ones(PARTS * width, device=device, dtype=dtype),
    )
    first = torch.ones(PARTS * width, width, device=device, dtype=dtype)
    size = first.numel() * first.element_size()
    weights = [first, *(torch.ones_like(first) for _ in range(min(OUT_OF_CACHE // size, MOST_WEIGHTS) - 1))]

    def run() -> None:
        for weight in weights:
            torch.addmm(bias, rows, weight.t())

    traffic = size + (rows.numel() + (ROWS + 1) * PARTS * width) * first.element_size()
    return float(traffic), _fastest(run, device) / len(weights)


def _ascending(points: Sequence[tuple[float, float]]) -> Points:
    """Return points whose seconds do not fall: a smaller size takes no longer than a larger one."""
    least, found = math.inf, []
    for size, seconds in reversed(points):
        least = min(least, seconds)
        found.append((size, least))
    return tuple(reversed(found))


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run: the fastest of some rounds, each of enough runs for the clock."""
    run()
    runs = max(1, min(100, int(1e-3 / max(_seconds(run, 1, device), 1e-7))))
    return min(_seconds(run, runs, device) for _ in range(ROUNDS))


def _seconds(run: Callable[[], object], runs: int, device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(runs):
        run()
    _synchronise(device)
    return (time.perf_counter() - began) / runs


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write(machine: Machine, found: Roofline) -> None:
    """Write the file, unless the folder cannot be written to: then the next process measures again."""
    with contextlib.suppress(OSError):
        write_whole(machine.file, json.dumps({"version": VERSION, "machine": asdict(machine), **asdict(found)}) + "\n")


def _read(machine: Machine) -> Roofline | None:
    try:
        content = json.loads(machine.file.read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["machine"] != asdict(machine):
            return None
        return Roofline(*(_points(content[field.name]) for field in fields(Roofline)))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _points(given: Any) -> Points:
    """Return measured points. Raises ValueError if they cannot be measurements."""
    points = tuple((size, seconds) for size, seconds in given)
    if not points or not all(is_real(value) and value > 0 for point in points for value in point):
        raise ValueError("a size or a time is no positive number")
    if any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(points)):
        raise ValueError("sizes and times do not ascend")
    return points


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
