"""Timing of alternating kernels: CUDA events around the replay of a graph with a cold cache; on a CPU, the host clock.

Replaying a graph excludes the host time of launches, which overlaps with the device in a model. Before each sample
more memory than the L2 cache holds is written, so that inputs come from memory. This also keeps the device busy until
the host has submitted the events and the graph.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Row, Spread, ratio

FLUSH = 1 << 29  # bytes; several times any L2 cache, and more than 100 µs of writing
WARM_UP = 3
TOLERANCE = 2e-2  # |found - expected| / |expected|: 16-bit operands give 1e-3 to 1e-2


@dataclass(frozen=True)
class Run:
    """A timed call, the minimum FLOPs and bytes of device memory that its task needs, and its expected results."""

    call: Callable[[], object]
    flops: int = 0
    bytes: int = 0
    expected: tuple[Tensor, ...] = ()  # if the first results differ, nothing is timed
    before: Callable[[], object] = field(default=lambda: None)  # called before each run, outside the timed region

    def checked(self) -> None:
        """Run once. Raises ValueError if the results are not the expected ones, or NaN."""
        self.before()
        found = self.call()
        results = found if isinstance(found, tuple) else (found,)
        for i, (result, expected) in enumerate(zip(results, self.expected, strict=False)):
            assert isinstance(result, Tensor)
            error = distance(result, expected)
            if not error <= TOLERANCE:
                raise ValueError(f"result {i} is wrong: |found - expected| / |expected| = {error:.3g}")


def distance(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| (L2 norms), computed in at least float32."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = torch.linalg.vector_norm(found.to(wide) - expected.to(wide))
    return (difference / torch.linalg.vector_norm(expected.to(wide))).item()


class HostClock:
    """Times on a CPU, to check that every path runs. Its figures say nothing about a GPU."""

    def prepare(self, run: Run) -> Callable[[], object]:
        """Run once, and check the results."""
        run.checked()
        return run.call

    def sample(self, runs: Mapping[str, Run], calls: Mapping[str, Callable[[], object]], rounds: int) -> Samples:
        """Seconds of each run, a sample a round."""
        samples: Samples = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                runs[name].before()
                began = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - began)
        return samples


class DeviceClock:
    """Times on an NVIDIA GPU."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def prepare(self, run: Run) -> Callable[[], object]:
        """Run a few times to compile and autotune, check the results, and capture one run in a graph."""
        for _ in range(WARM_UP):
            run.checked()
        run.before()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run.call()
        return graph.replay

    def sample(self, runs: Mapping[str, Run], calls: Mapping[str, Callable[[], object]], rounds: int) -> Samples:
        """Seconds of each run, a sample a round."""
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                runs[name].before()
                self.flush.zero_()
                start.record()
                call()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) / 1000 for a, b in pairs] for name, pairs in events.items()}


Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of the device: FLOP/s of a large matrix product, bytes/s (read and written) of a copy."""

    flops: float
    bytes: float

    def floor(self, run: Run) -> float:
        """Return the lower bound of the run's time in seconds."""
        return max(run.flops / self.flops, run.bytes / self.bytes)


class Bench:
    """Measures groups of runs, and collects rows, the seconds and rates of every run, and failures."""

    def __init__(self, clock: HostClock | DeviceClock, rounds: int) -> None:
        self.clock, self.rounds = clock, rounds
        self.rows: list[Row] = []
        self.runs: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.ceilings: Ceilings | None = None

    def measure(self, title: str, runs: Mapping[str, Run]) -> Samples:
        """Time the runs alternately. A run that fails is recorded and left out."""
        calls = {}
        for name, run in runs.items():
            try:
                calls[name] = self.clock.prepare(run)
            except Exception as error:  # compilers and kernels raise any exception
                self.fail(f"{title}: {name}", error)
        samples = self.clock.sample(runs, calls, self.rounds)
        self.runs += [self._rates(title, name, runs[name], taken) for name, taken in samples.items()]
        return samples

    def fail(self, title: str, error: Exception) -> None:
        """Record a failure, and print it at once."""
        self.failures[title] = f"{type(error).__name__}: {error}"[:2000]
        traceback.print_exception(error)

    def _rates(self, title: str, name: str, run: Run, samples: list[float]) -> dict[str, Any]:
        seconds = Spread.of(samples)
        found: dict[str, Any] = {"group": title, "run": name, "seconds": asdict(seconds)}
        for unit, amount in (("FLOP", run.flops), ("bytes", run.bytes)):
            if amount:
                found |= {unit: amount, f"{unit}/s": amount / seconds.median}
        if self.ceilings is not None and (floor := self.ceilings.floor(run)):
            found |= {
                "share of matrix product": run.flops / seconds.median / self.ceilings.flops,
                "share of copy": run.bytes / seconds.median / self.ceilings.bytes,
                "time / floor": seconds.median / floor,
            }
        return found

    def compare(
        self, what: str, samples: Samples, above: str, below: str, *, most: float | None = None,
        least: float | None = None,
    ) -> None:  # fmt: skip
        """Add a row with the ratio of two runs of one group and its goal, unless a run failed."""
        if above not in samples or below not in samples:
            return
        found = ratio(samples, above, below)
        held = (most is None or found.median <= most) and (least is None or found.median >= least)
        bound = f"<= {most}" if most is not None else f">= {least}" if least is not None else ""
        self.rows.append(Row(what, found, "", bound, held))


def fastest(samples: Samples) -> str:
    """Return the run with the smallest median."""
    return min(samples, key=lambda name: statistics.median(samples[name]))
