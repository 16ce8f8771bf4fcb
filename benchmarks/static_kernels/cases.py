"""The launches that benchmarks.static_kernels compiles: every Triton kernel, by head size, dtype, shape and tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.static_kernels.compile import Launch, recorded
from dit_rewrite.kernels.attention_entropy import triton_kernel as entropy
from dit_rewrite.kernels.blockwise_attention import triton_estimate, triton_kernel
from dit_rewrite.kernels.blockwise_attention.bounds import Decision
from dit_rewrite.kernels.blockwise_attention.state import State, layout
from dit_rewrite.kernels.common import reduction
from dit_rewrite.kernels.relative_l1 import triton_kernel as change
from dit_rewrite.kernels.window_attention import launch as window
from dit_rewrite.kernels.window_attention import paper_window
from dit_rewrite.kernels.window_attention import triton_kernel as window_kernel
from dit_rewrite.kernels.window_attention.geometry import make_window

BATCH, HEADS, BLOCK = 2, 16, 512
BF16 = torch.bfloat16
LIMITS = ("spills", "tensor cores", "copies", "issue")  # of 16-bit kernels for attention with up to 128 channels


@dataclass(frozen=True)
class Case:
    """A launch to compile.

    scores: scores of a tile, or elements that a turn of the loop reads. kind: the key of the figures that it is
    compared with. limits: those that it must keep on sm_90.
    """

    name: str
    launch: Callable[[], Launch]
    scores: int
    kind: str
    limits: tuple[str, ...]


def heads_first(tokens: int, size: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return (B, H, N, d) without memory, laid out as a model's projection: (B, N, H, d)."""
    return torch.empty(BATCH, tokens, HEADS, size, dtype=dtype, device="meta").transpose(1, 2)


def window_launch(
    size: int, dtype: torch.dtype, tokens: int, where: dict[str, Any], tile: window.Tile, refresh: bool,
    mask: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Record a launch of window attention with one of its tiles."""
    q = heads_first(tokens, size, dtype)
    shape = make_window("static_kernels", tokens, **where)
    with recorded((window_kernel, "window_kernel")) as (kernel,):
        if refresh:
            window.launch_refresh(q, q, q, shape, mask, None, tile=tile)
        else:
            window.launch_reuse(q, q, q, q, shape, mask, None, tile=tile)
    return kernel.launches[0]


def windows(size: int, tokens: int, dtype: torch.dtype = BF16, **options: Any) -> Iterator[Case]:
    """Refresh and reuse of a window, with every tile that is tuned over, or the first `tiles` of them."""
    count = options.pop("tiles", None)
    where = options.pop("where", None) or {"window": paper_window(tokens), "grid": None, "prefix": 0}
    label = options.pop("label", f"{tokens} tokens")
    wide = dtype == torch.float32 or size > 128
    for name, refresh in (("reuse", False), ("refresh", True)):
        for tile in (window.WIDE_TILES if wide else window.TILES)[:count]:
            kind = f"window {name}, d={size}"
            title = f"{kind}, {label}, {str(dtype).removeprefix('torch.')}, {tile.queries}x{tile.keys}"
            launch = partial(window_launch, size, dtype, tokens, where, tile, refresh, **options)
            yield Case(title, launch, tile.queries * tile.keys, kind, () if wide else LIMITS)


def entropy_case(size: int, tokens: int) -> Case:
    """The attention entropy, whose one tile follows from the head size."""
    q = heads_first(tokens, size)

    def launch() -> Launch:
        with recorded((entropy, "entropy_kernel"), (reduction, "ratio_kernel")) as (kernel, _):
            entropy.launch(q, q, None, None, False, False)
        return kernel.launches[0]

    rows, cols = entropy.block_of(q)
    return Case(f"entropy, d={size}, {tokens} tokens", launch, rows * cols, f"entropy, d={size}", LIMITS)


def blockwise_cases(
    size: int, keys: int, block: int, mask: Tensor | None = None, own_queries: bool = False
) -> Iterator[Case]:
    """The two kernels of blockwise attention."""
    q, k = heads_first(4096, size), heads_first(keys, size)
    shapes = layout(q.shape, k.shape, q.dtype, block, 128, True, own_queries=own_queries)
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
    state = State._make((*tensors, block, 4096, keys))
    recompute = torch.empty(state.computed.shape, dtype=torch.int32, device="meta")
    decision = Decision(recompute, recompute.float(), torch.empty_like(state.q_moved))

    def attend() -> Launch:
        with recorded((triton_kernel, "attention_kernel")) as (kernel,):
            triton_kernel.attend(q, k, k, mask, state, decision, 0.125)
        return kernel.launches[0]

    def estimate() -> Launch:
        with recorded((triton_estimate, "estimate_kernel")) as (kernel,):
            triton_estimate.estimate(q, k, state, None, 0.1, 0.125, False)
        return kernel.launches[0]

    rows, steps = triton_kernel.sizes(size, BF16, 128)
    title = f"d={size}, {keys} keys by {block}{'' if mask is None else ', masked'}"
    title += ", own queries" if own_queries else ""
    yield Case(f"blockwise attend, {title}", attend, rows * steps, f"blockwise attend, d={size}", LIMITS)
    yield Case(f"blockwise estimate, {title}", estimate, 128 * 64, f"blockwise estimate, d={size}", ("spills",))


def change_case(count: int) -> Case:
    """The relative change of a tensor."""
    current = torch.empty(count, dtype=BF16, device="meta")

    def launch() -> Launch:
        with recorded((change, "partial_sums_kernel"), (reduction, "ratio_kernel")) as (kernel, _):
            change.launch(current, current)
        return kernel.launches[0]

    return Case(f"relative_l1, {count} elements", launch, 4096, "relative_l1", ("spills",))


def quick() -> Iterator[Case]:
    """One shape for each kernel and head size of the papers' models."""
    for size in (64, 72, 128):
        yield from windows(size, 4096, tiles=1)
        yield entropy_case(size, 4096)
        yield from blockwise_cases(size, 4096, BLOCK)
    yield change_case(2 * 4096 * 1152)


def every() -> Iterator[Case]:
    """Every kernel and tile: by sequence length, window, mask, head size and dtype."""
    for size in (64, 72, 128):
        for tokens in (1024, 4096, 16384):
            yield from windows(size, tokens)
        yield entropy_case(size, 4096)
        yield from blockwise_cases(size, 4096, BLOCK)
        yield from blockwise_cases(size, 4096, BLOCK, own_queries=True)
    square = {"window": (8, 8), "grid": (64, 64), "prefix": 0}
    yield from windows(72, 4096, where=square, label="64 x 64 tokens", tiles=1)
    video = {"window": (2, 8, 8), "grid": (8, 32, 32), "prefix": 333}
    yield from windows(72, 8192 + 333, where=video, label="8 x 32 x 32 tokens and text", tiles=1)
    padding = torch.empty(BATCH, 1, 1, 4096, dtype=torch.bool, device="meta")
    yield from windows(72, 4096, mask=padding, label="4096 tokens, masked", tiles=1)
    text = torch.empty(BATCH, 1, 1, 300, dtype=torch.bool, device="meta")
    yield from blockwise_cases(72, 300, 300, text)
    ones = {"window": (0, 1, 0), "grid": (1, 64, 1), "prefix": 1, "suffix": 1}  # the JIT makes constants of these
    yield from windows(72, 66, where=ones, label="sizes of 1", tiles=1)
    yield from windows(256, 4096, tiles=1)
    yield from windows(72, 4096, torch.float32, tiles=1)
    yield change_case(2 * 4096 * 1152)
    yield change_case(2 * 4095 * 1151)
