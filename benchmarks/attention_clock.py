"""Timing kernels in turn: CUDA events around the replay of a graph, with a cold cache; on a CPU, the host's clock.

A graph's replay leaves out the host's time for launches, which runs ahead of the device in a model. Before each
sample more memory than the L2 cache holds is written, so that inputs come from memory; that also keeps the device
busy until the host has handed over the events and the graph.
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

FLUSH = 1 << 29  # bytes; several times any L2, and a good 100 µs of writing
WARM_UP = 3
TOLERANCE = 2e-2  # |found - expected| / |expected|: operands of 16 bits land between 1e-3 and 1e-2


@dataclass(frozen=True)
class Run:
    """What is timed, the FLOPs and the bytes of device memory that the task asks for at least, and its results."""

    call: Callable[[], object]
    flops: int = 0
    bytes: int = 0
    expected: tuple[Tensor, ...] = ()  # the first results must be these, or nothing is timed
    before: Callable[[], object] = field(default=lambda: None)  # before each call, outside of its time

    def checked(self) -> None:
        """Run once; ValueError if the results are not those expected. NaN never passes."""
        self.before()
        found = self.call()
        results = found if isinstance(found, tuple) else (found,)
        for i, (result, expected) in enumerate(zip(results, self.expected, strict=False)):
            assert isinstance(result, Tensor)
            error = distance(result, expected)
            if not error <= TOLERANCE:
                raise ValueError(f"result {i} is wrong: |found - expected| / |expected| = {error:.3g}")


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float32 at least."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = torch.linalg.vector_norm(found.to(wide) - expected.to(wide))
    return (difference / torch.linalg.vector_norm(expected.to(wide))).item()


class HostClock:
    """For a CPU: shows that every path runs. Its figures say nothing of a GPU."""

    def prepare(self, run: Run) -> Callable[[], object]:
        """Run once, checked."""
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
    """For an NVIDIA GPU."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def prepare(self, run: Run) -> Callable[[], object]:
        """Run a few times, checked, which compiles and tunes; then capture one run in a graph."""
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
    """What the device was measured to reach: FLOP/s of a large matrix product, bytes/s (read and written) of a copy."""

    flops: float
    bytes: float

    def floor(self, run: Run) -> float:
        """Seconds that no version of the run beats."""
        return max(run.flops / self.flops, run.bytes / self.bytes)


class Bench:
    """Measures groups of runs, and collects rows, every run's seconds and rates, and what failed."""

    def __init__(self, clock: HostClock | DeviceClock, rounds: int) -> None:
        self.clock, self.rounds = clock, rounds
        self.rows: list[Row] = []
        self.runs: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.ceilings: Ceilings | None = None

    def measure(self, title: str, runs: Mapping[str, Run]) -> Samples:
        """Time the runs in turn. One that fails is left out, and noted: it must not hide the others."""
        calls = {}
        for name, run in runs.items():
            try:
                calls[name] = self.clock.prepare(run)
            except Exception as error:  # whatever a compiler or a kernel does
                self.fail(f"{title}: {name}", error)
        samples = self.clock.sample(runs, calls, self.rounds)
        self.runs += [self._rates(title, name, runs[name], taken) for name, taken in samples.items()]
        return samples

    def fail(self, title: str, error: Exception) -> None:
        """Note what failed, and say at once where."""
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
        """A row: the ratio of two runs of one group, against its goal; none where a run failed."""
        if above not in samples or below not in samples:
            return
        found = ratio(samples, above, below)
        held = (most is None or found.median <= most) and (least is None or found.median >= least)
        bound = f"<= {most}" if most is not None else f">= {least}" if least is not None else ""
        self.rows.append(Row(what, found, "", bound, held))


def fastest(samples: Samples) -> str:
    """The run with the least median."""
    return min(samples, key=lambda name: statistics.median(samples[name]))
