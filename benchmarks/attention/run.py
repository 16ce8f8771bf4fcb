"""Benchmark of the kernels on an NVIDIA GPU: python -m benchmarks.attention [--part window] [--dtype bfloat16]

Attention has 2 x 16 heads of size 72 (DiT-XL, PixArt) and 128. The benchmark compares window attention with a residual
and the attention entropy with the fastest backend of PyTorch's scaled dot product attention, and with FlexAttention on
the same mask; blockwise attention to conditions of 16 to 4096 keys at several kept fractions; and relative_l1 with a
copy. Rows are ratios of alternating runs. The result of every kernel is compared with that of its naive reference
before it is timed. The results file also has the seconds of each run, its FLOP/s and bytes/s as shares of those of a
large matrix product and a large copy, and its time over the lower bound that these two imply. If diffusers is
installed, whole steps of DiT-XL/2-512 and PixArt-Σ at 1024 and 2K pixels follow (models.py), and whole
trajectories with and without CUDA graphs (graphs.py); the rest needs only torch and triton. `--part` measures
one of these groups, in less than nine minutes with compilation, and writes results/attention_<part>.json. `--device cpu
--tiny` runs every path with the naive references and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import graphs as trajectories
from benchmarks.attention import models as denoisers
from benchmarks.attention.cases import blockwise, ceilings, change, window_attention
from benchmarks.attention.clock import Bench, DeviceClock, HostClock
from benchmarks.attention.graphs import Flux
from benchmarks.attention.models import Geometry
from benchmarks.timing import report, show
from dit_rewrite.kernels.window_attention import paper_window

REUSE_GOAL, REUSE_TOKENS = 0.35, (4096, 16384)  # largest share of full attention's time, and sequence lengths


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measured cases."""

    batch: int
    heads: int
    head_sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    grid: tuple[int, int]
    grid_window: tuple[int, int]
    queries: int  # of blockwise attention
    conditions: tuple[tuple[int, int], ...]  # keys, and keys of a block
    tile: int
    changes: tuple[tuple[int, ...], ...]
    product: int
    bytes_copied: int
    models: tuple[Geometry, ...]
    graphs: tuple[Geometry | Flux, ...]


FULL = Sizes(
    batch=2, heads=16, head_sizes=(72, 128), tokens=(1024, 4096, 16384), grid=(64, 64), grid_window=(8, 8),
    queries=4096, conditions=((16, 16), (120, 120), (300, 300), (1024, 256), (4096, 512)), tile=128,
    changes=((2, 4096, 1152), (2, 16384, 1152), (1 << 29,)), product=8192, bytes_copied=1 << 31,
    models=denoisers.FULL, graphs=trajectories.FULL,
)  # fmt: skip
TINY = Sizes(
    batch=1, heads=2, head_sizes=(24, 32), tokens=(16, 48), grid=(6, 6), grid_window=(1, 1), queries=64,
    conditions=((16, 16), (40, 16)), tile=16, changes=((2, 8, 24),), product=32, bytes_copied=1 << 12,
    models=denoisers.TINY, graphs=trajectories.TINY,
)  # fmt: skip


Cases = Iterator[tuple[str, Callable[[], None]]]


def windows(bench: Bench, sizes: Sizes, like: Tensor) -> Cases:
    """Window attention and the entropy; cases with a goal come first."""
    for d in sizes.head_sizes:
        for n in sizes.tokens:
            title, shape = f"d={d}, {n} tokens", (sizes.batch, sizes.heads, n, d)
            where: dict[str, Any] = {"window": paper_window(n)}
            goal = REUSE_GOAL if n in REUSE_TOKENS else None
            yield title, partial(window_attention, bench, title, shape, where, like, goal=goal)
    for d in sizes.head_sizes:
        height, width = sizes.grid
        title, shape = f"d={d}, 2-D, {height} x {width} tokens", (sizes.batch, sizes.heads, height * width, d)
        where = {"window": sizes.grid_window, "grid": sizes.grid}
        yield title, partial(window_attention, bench, title, shape, where, like)


def changes(bench: Bench, sizes: Sizes, like: Tensor) -> Cases:
    """The relative change of a tensor."""
    for sides in sizes.changes:
        yield f"relative_l1 {sides}", partial(change, bench, sides, like)


def models(bench: Bench, sizes: Sizes, like: Tensor) -> Cases:
    """Steps of whole models, if diffusers is installed."""
    backend = "inductor" if like.is_cuda else "aot_eager"
    for geometry in sizes.models if has_diffusers() else ():
        yield geometry.title, partial(denoisers.end_to_end, bench, geometry, like, backend)


def graphs(bench: Bench, sizes: Sizes, like: Tensor) -> Cases:
    """FORA(3) over whole trajectories with and without CUDA graphs, if diffusers is installed."""
    backend = "inductor" if like.is_cuda else "aot_eager"
    for each in sizes.graphs if has_diffusers() else ():
        yield f"{each.title}: FORA(3)", partial(trajectories.fora, bench, each, like, backend)


def conditions(bench: Bench, sizes: Sizes, like: Tensor) -> Cases:
    """Blockwise attention, by the length of the condition."""
    for d in sizes.head_sizes:
        for keys, block in sizes.conditions:
            title, shape = f"blockwise, d={d}, {keys} keys by {block}", (sizes.batch, sizes.heads, sizes.queries, d)
            yield title, partial(blockwise, bench, title, shape, keys, block, sizes.tile, like)


PARTS = {"window": windows, "change": changes, "models": models, "graphs": graphs, "blockwise": conditions}


def has_diffusers() -> bool:
    """Return whether diffusers is installed, so that models can be measured."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def measure(bench: Bench, parts: Iterable[str], sizes: Sizes, like: Tensor, minutes: float) -> None:
    """Measure the ceilings, then each case until the time limit. A case that fails is recorded and skipped."""
    end = time.monotonic() + 60 * minutes
    bench.ceilings = ceilings(bench, sizes.product, sizes.bytes_copied, like)
    for title, case in chain.from_iterable(PARTS[part](bench, sizes, like) for part in parts):
        if time.monotonic() > end:
            bench.failures[title] = f"not measured: the {minutes:g} minutes were over"
            continue
        began = time.monotonic()
        try:
            case()
        except Exception as error:  # the reference, or every backend of PyTorch's attention, failed
            bench.fail(title, error)
        print(f"{title}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def details(bench: Bench, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Return the contents of the results file apart from the rows."""
    import triton

    assert bench.ceilings is not None
    return {
        "versions": {
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": torch.cuda.get_device_capability(),
        },
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": asdict(sizes),
        "ceilings": {"FLOP/s": bench.ceilings.flops, "bytes/s": bench.ceilings.bytes},
        "end to end": "measured" if has_diffusers() else "left out: diffusers is not installed",
        "runs": bench.runs,
        "failures": bench.failures,
    }


def summary(bench: Bench) -> None:
    """Print the rows with a goal, the ceilings and the failures at the end of the log."""
    assert bench.ceilings is not None
    show("goals", [row for row in bench.rows if row.bound])
    print(f"matrix product {bench.ceilings.flops / 1e12:.4g} TFLOP/s, copy {bench.ceilings.bytes / 1e12:.4g} TB/s")
    if not has_diffusers():
        print("left out, as diffusers is not installed: whole models")
    for title, error in bench.failures.items():
        print(f"FAILED {title}: {error.splitlines()[0]}")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="the group of cases to measure")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each run")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case begins later")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; writes no results")
    found = parser.parse_args(given)
    if found.device == "cpu" and not found.tiny:
        parser.error("the full sizes need a GPU: add --tiny")
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --tiny runs the naive references")
    return found


def main(given: list[str] | None = None) -> int:
    """Return the exit code: 1 if something could not be measured, otherwise 0, even if a goal is missed."""
    options = arguments(given)
    dtype, sizes = getattr(torch, options.dtype), TINY if options.tiny else FULL
    like = torch.empty(0, dtype=dtype, device=options.device)
    torch.manual_seed(0)
    # without a GPU FlexAttention runs uncompiled
    stance = "default" if options.device == "cuda" else "force_eager"
    with torch.no_grad(), torch.compiler.set_stance(stance):
        bench = Bench(DeviceClock() if options.device == "cuda" else HostClock(), options.rounds)
        parts = list(PARTS) if options.part == "all" else [options.part]
        measure(bench, parts, sizes, like, options.minutes)
    if options.tiny:
        show("attention, toy sizes", bench.rows)
    else:
        names = ["attention", options.part * (options.part != "all"), options.dtype * (dtype != torch.bfloat16)]
        report("_".join(filter(None, names)), bench.rows, details(bench, sizes, dtype))
    summary(bench)
    return 1 if bench.failures else 0
