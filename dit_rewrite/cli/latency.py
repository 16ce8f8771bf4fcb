"""``python -m dit_rewrite latency``: measure the parts of a text-conditional block, by the length of the condition.

This reproduces CachedAttention's figure 2: the times of self-attention, cross-attention, MLP and the rest, for a PixArt
transformer with random weights. The model runs eagerly, and forward hooks take the time before and after its modules.
If the model was compiled as a whole, parts would share kernels; if its modules were compiled one by one, they would
have other kernels than the model. The norms, modulations, gates and residual sums between the modules count as "other",
and so does the overhead of the hooks. On a CPU, the clock is the host's. On a GPU, events are recorded in the stream;
for small sizes they measure the launch rate of the host and not the speed of the kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dit_rewrite.cli.generate import choose_device
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.cli.progress import progress
from dit_rewrite.errors import BadOption, MissingExtra

HEAD_SIZE = 72  # of PixArt
BATCH = 2  # both halves of the guidance
PARTS = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "MLP"}  # names of submodules of a block
OTHER = "other"
BLOCK = "block"
WARM_UP = 2  # rounds
HOW = "run eagerly; parts are modules, timed by forward hooks"

Call = Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Sizes of the model: channels, image tokens and blocks.

    Raises BadOption if the width is not a multiple of 72 (the size of a head) or the number of tokens is not a square.
    """

    width: int
    tokens: int
    layers: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.width % HEAD_SIZE:
            raise BadOption("latency", "width", self.width, f"a multiple of {HEAD_SIZE}, the size of a head")
        if self.tokens < 1 or self.side**2 != self.tokens:
            raise BadOption("latency", "tokens", self.tokens, "a square number, such as 256 or 4096")
        if self.layers < 1:
            raise BadOption("latency", "layers", self.layers, "a whole number >= 1")

    @property
    def side(self) -> int:
        """The number of tokens along each side of the image."""
        return math.isqrt(self.tokens)


def build(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a PixArt transformer with random weights, in eval mode."""
    from diffusers import PixArtTransformer2DModel

    model: nn.Module = PixArtTransformer2DModel(
        num_attention_heads=geometry.width // HEAD_SIZE, attention_head_dim=HEAD_SIZE, in_channels=4, out_channels=8,
        num_layers=geometry.layers, cross_attention_dim=geometry.width, sample_size=2 * geometry.side, patch_size=2,
        use_additional_conditions=False,
    )  # fmt: skip
    # diffusers' own `to` would warn about modules to keep in fp32, of which this model has none
    return nn.Module.to(model, device, dtype).eval().requires_grad_(False)


def make_call(geometry: Geometry, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a call with `length` text tokens without padding.

    The tokens have the model's width, as after the caption projection, which is not part of a block. Each block
    computes keys and values of the text at each call, as without hoisting.
    """
    size = 2 * geometry.side
    return {
        "hidden_states": torch.randn(BATCH, 4, size, size, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(BATCH, length, geometry.width, device=device, dtype=dtype),
        "encoder_attention_mask": torch.ones(BATCH, length, device=device, dtype=dtype),
        "timestep": torch.full((BATCH,), 500, device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


class Clock(Protocol):
    """A clock for intervals."""

    def now(self) -> Any: ...

    def milliseconds(self, begin: Any, end: Any) -> float: ...


class HostClock:
    """The clock of the host, for modules that run synchronously."""

    def now(self) -> float:
        return time.perf_counter()

    def milliseconds(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3


class DeviceClock:
    """Events in the current CUDA stream; `milliseconds` waits for the end of the interval."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))


Intervals = dict[str, list[tuple[Any, Any]]]


@contextmanager
def watch(blocks: Sequence[nn.Module], clock: Clock) -> Iterator[Intervals]:
    """Record the intervals in which the blocks and their parts run, by name, while the context is open."""
    intervals: Intervals = {name: [] for name in (*PARTS.values(), BLOCK)}
    handles = []
    for block in blocks:
        for module, name in ((block, BLOCK), *((getattr(block, part), name) for part, name in PARTS.items())):
            before, after = _hooks(clock, intervals[name])
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield intervals
    finally:
        for handle in handles:
            handle.remove()


def _hooks(clock: Clock, intervals: list[tuple[Any, Any]]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks for before and after a module's forward, which record an interval."""
    began: list[Any] = []

    def before(*_: object) -> None:
        began.append(clock.now())

    def after(*_: object) -> None:
        intervals.append((began.pop(), clock.now()))

    return before, after


def split(intervals: Intervals, clock: Clock) -> dict[str, float]:
    """Return the milliseconds of each part of a block, averaged over the blocks; "other" is the rest of the block."""
    totals = {name: sum(clock.milliseconds(*pair) for pair in pairs) for name, pairs in intervals.items()}
    blocks = len(intervals[BLOCK])
    parts = {name: totals[name] / blocks for name in PARTS.values()}
    return {**parts, OTHER: totals[BLOCK] / blocks - sum(parts.values())}


@dataclass(frozen=True)
class Breakdown:
    """The milliseconds of a block's parts with a condition of `length` tokens: the medians, and the times per round."""

    length: int
    median: dict[str, float]
    rounds: list[dict[str, float]]

    @classmethod
    def of(cls, length: int, rounds: list[dict[str, float]]) -> Breakdown:
        return cls(length, {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}, rounds)

    @property
    def total(self) -> float:
        """The sum of the parts' medians, so that shares sum to 1."""
        return sum(self.median.values())

    def share(self, part: str) -> float:
        """Return the fraction of `total` that a part takes."""
        return self.median[part] / self.total


def measure(model: nn.Module, calls: Mapping[int, Call], rounds: int, clock: Clock) -> list[Breakdown]:
    """Measure one call of each length in every round, so that a slow phase of the machine affects all lengths."""
    total = (WARM_UP + rounds) * len(calls)
    samples: dict[int, list[dict[str, float]]] = {length: [] for length in calls}
    with torch.inference_mode(), progress("timing", total) as tick:
        for index in range(-WARM_UP, rounds):
            for length, call in calls.items():
                with watch(list(model.transformer_blocks), clock) as intervals:  # type: ignore[arg-type]
                    model(**call)
                if index >= 0:
                    samples[length].append(split(intervals, clock))
                tick()
    return [Breakdown.of(length, found) for length, found in samples.items()]


def draw(found: Sequence[Breakdown], title: str, path: Path) -> None:
    """Draw a stacked bar for each length: milliseconds on the left, percentages on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [f"{b.length:,}" for b in found]
    below, below_share = [0.0] * len(found), [0.0] * len(found)
    for part in found[0].median:
        times, shares = [b.median[part] for b in found], [100 * b.share(part) for b in found]
        left.bar(labels, times, bottom=below, label=part)
        right.bar(labels, shares, bottom=below_share)
        below = [a + b for a, b in zip(below, times, strict=True)]
        below_share = [a + b for a, b in zip(below_share, shares, strict=True)]
    left.set(xlabel="condition tokens", ylabel="ms per block")
    right.set(xlabel="condition tokens", ylabel="% of the block")
    figure.suptitle(title, fontsize="medium")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


def as_json(found: Sequence[Breakdown], settings: Mapping[str, object]) -> dict[str, Any]:
    """Return the content of ``latency.json``: milliseconds per block, and fractions of the total."""
    rows = [asdict(b) | {"total": b.total, "share": {part: b.share(part) for part in b.median}} for b in found]
    return {**settings, "unit": "ms per block", "how": HOW, "lengths": rows}


def cells(breakdown: Breakdown) -> list[str]:
    """Return a row of the table."""
    parts = (f"{ms:#.4g} {breakdown.share(part):>4.0%}" for part, ms in breakdown.median.items())
    return [f"{breakdown.length:,}", *parts, f"{breakdown.total:#.4g}"]


def write(found: Sequence[Breakdown], title: str, settings: Mapping[str, object], out: Path) -> None:
    """Print the table, and write ``latency.json`` and ``latency.png`` into the folder."""
    from rich.table import Table

    from dit_rewrite.demo.report import console, print_table

    table = Table(title=f"{title}: ms per block", caption=HOW)
    for column in ("length", *found[0].median, BLOCK):
        table.add_column(column, justify="right", no_wrap=True)
    for breakdown in found:
        table.add_row(*cells(breakdown))
    out.mkdir(parents=True, exist_ok=True)
    (out / "latency.json").write_text(json.dumps(as_json(found, settings), indent=2) + "\n")
    draw(found, title, out / "latency.png")
    print_table(table)
    console.print(f"Wrote {out}/latency.png, and {out}/latency.json with every round.", highlight=False)


def require_extras() -> None:
    """Raise MissingExtra if a package is missing."""
    for package in ("diffusers", "matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "latency", "benchmark")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``python -m dit_rewrite latency``. Raises BadOption for invalid sizes or devices."""
    require_extras()
    from dit_rewrite.demo.report import hardware, versions

    geometry = Geometry(arguments.width, arguments.tokens, arguments.layers)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BadOption("latency", "device", "cuda", "cpu: PyTorch finds no CUDA device")
    device, dtype = choose_device(arguments.device, arguments.dtype)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = build(geometry, device, dtype)
    calls = {length: make_call(geometry, length, device, dtype) for length in arguments.conditions}
    found = measure(model, calls, arguments.rounds, DeviceClock() if device.type == "cuda" else HostClock())
    kind = str(dtype).removeprefix("torch.")
    settings = {
        "geometry": asdict(geometry), "batch": BATCH, "dtype": kind, "warm_up": WARM_UP, "rounds": arguments.rounds,
        "hardware": hardware(device.type), "versions": versions(),
    }  # fmt: skip
    title = f"PixArt, width {geometry.width}, {BATCH} x {geometry.tokens:,} tokens, {kind}, {device.type}"
    write(found, title, settings, arguments.out)
    return Outcome("", {"folder": arguments.out, **as_json(found, settings)})
