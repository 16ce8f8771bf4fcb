"""The cases of benchmarks/attention/run.py: each custom op beside the ops that a model would run without it."""

from __future__ import annotations

import functools
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.clock import Bench, Ceilings, Run, Samples, fastest
from dit_rewrite.kernels.attention_entropy import attention_entropy
from dit_rewrite.kernels.attention_entropy import naive as entropy_naive
from dit_rewrite.kernels.blockwise_attention import State, blockwise_attention, flops, new_state, speedup
from dit_rewrite.kernels.blockwise_attention.arithmetic import BLOCK_WORDS
from dit_rewrite.kernels.relative_l1 import relative_l1
from dit_rewrite.kernels.window_attention import naive, window_flops, window_refresh, window_reuse
from dit_rewrite.kernels.window_attention.flex import flex_window
from dit_rewrite.kernels.window_attention.geometry import make_window

# MATH is left out because it allocates all scores: 17 GB for 16,384 tokens in 16 bits.
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
REFRESH_GOAL = 1.15  # largest share of full attention's time
CHANGE_GOAL = 0.8  # smallest share of a copy's bytes/s


def random(*shape: int, like: Tensor) -> Tensor:
    """Return normal random numbers with the dtype and device of `like`."""
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def ceilings(bench: Bench, size: int, bytes_copied: int, like: Tensor) -> Ceilings:
    """Measure the rates of a square matrix product of `size`, and of a copy of `bytes_copied` bytes."""
    a, b = random(size, size, like=like), random(size, size, like=like)
    source = random(bytes_copied // like.element_size(), like=like)
    target = torch.empty_like(source)
    runs = {
        "matrix product": Run(lambda: a @ b, flops=2 * size**3),
        "copy": Run(lambda: target.copy_(source), bytes=2 * source.nbytes, expected=(source,)),
        "a kernel of one element": Run(lambda: target[0].zero_()),  # the overhead of a launch and of the events
    }
    samples = bench.measure("ceilings", runs)
    product, copy = (statistics.median(samples[name]) for name in ("matrix product", "copy"))
    return Ceilings(runs["matrix product"].flops / product, runs["copy"].bytes / copy)


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """Run scaled dot product attention by one of PyTorch's backends."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def attention_flops(q: Tensor, k: Tensor, kept: float = 0.0) -> int:
    """Return the FLOPs of attention without a fraction `kept` of its scores."""
    batch, heads, queries, size = q.shape
    return flops(batch, heads, queries, k.shape[2], size, kept)


def best_sdpa(bench: Bench, title: str, q: Tensor, k: Tensor, v: Tensor, expected: Tensor) -> Run:
    """Time each of PyTorch's backends on these inputs, and return the fastest."""
    work, moved = attention_flops(q, k), 2 * q.nbytes + k.nbytes + v.nbytes
    able = [backend for backend in BACKENDS if runs_here(q, k, backend)]
    runs = {backend.name: Run(functools.partial(sdpa, q, k, v, backend), work, moved, (expected,)) for backend in able}
    return runs[fastest(bench.measure(f"{title}: backends of SDPA", runs))]


def runs_here(q: Tensor, k: Tensor, backend: SDPBackend) -> bool:
    """Return whether the backend supports these inputs. Backends that do not raise RuntimeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unsupported backends warn about the reason
        try:
            sdpa(q, k, k, backend)
        except RuntimeError:
            return False
    return True


def window_attention(
    bench: Bench, title: str, shape: tuple[int, ...], where: dict[str, Any], like: Tensor, *, goal: float | None = None
) -> None:
    """Measure refresh and reuse of a window's residual, and the attention entropy, beside full attention.

    goal: the largest share of full attention's time that reuse may take.
    """
    torch.compiler.reset()  # each case compiles FlexAttention, and Dynamo limits recompiles
    q, k, v = (random(*shape, like=like) for _ in range(3))
    window = make_window("benchmark", shape[2], where["window"], where.get("grid"), 0)
    out, residual = naive.window_refresh(q, k, v, window, None, None)
    full = best_sdpa(bench, title, q, k, v, out)
    runs = {"SDPA": full, "SDPA again": full, **_window_runs(q, k, v, out, residual, where, full)}
    _window_rows(bench, title, bench.measure(title, {**runs, "entropy": _entropy(q, k)}), goal)


def _window_runs(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, residual: Tensor, where: dict[str, Any], full: Run
) -> dict[str, Run]:
    @functools.cache  # built at its first run, so that a failure affects this run only
    def flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return flex_window(q.shape[2], **where, device=str(q.device))

    def two_kernels() -> tuple[Tensor, Tensor]:
        """Compute O and O - W by two calls."""
        whole = full.call()
        assert isinstance(whole, Tensor)
        return whole, window_reuse(q, k, v, whole, **where, subtract=True)

    near, each = window_flops(q.shape, k.shape, **where), q.nbytes
    both = full.flops + near // 2  # O and W share the scores
    return {
        "refresh": Run(lambda: window_refresh(q, k, v, **where), both, 5 * each, (out, residual)),
        "SDPA + window": Run(two_kernels, both, 5 * each, (out, residual)),
        "reuse": Run(lambda: window_reuse(q, k, v, residual, **where), near, 5 * each, (out,)),
        "FlexAttention": Run(lambda: flex()(q, k, v), near, 4 * each, (out - residual,)),
    }


def _entropy(q: Tensor, k: Tensor) -> Run:
    work = attention_flops(q, k) // 2  # one of the two products
    expected = entropy_naive.attention_entropy(q, k, None, None, False, False)
    return Run(lambda: attention_entropy(q, k), work, q.nbytes + k.nbytes, (expected,))


def _window_rows(bench: Bench, title: str, samples: Samples, goal: float | None) -> None:
    bench.compare(f"{title}: A/A, SDPA / SDPA", samples, "SDPA again", "SDPA")
    bench.compare(f"{title}: reuse / SDPA", samples, "reuse", "SDPA", most=goal)
    bench.compare(f"{title}: reuse / FlexAttention, no residual", samples, "reuse", "FlexAttention")
    bench.compare(f"{title}: FlexAttention / SDPA", samples, "FlexAttention", "SDPA")
    bench.compare(f"{title}: refresh / SDPA", samples, "refresh", "SDPA")
    bench.compare(f"{title}: (SDPA + window) / SDPA", samples, "SDPA + window", "SDPA")
    bench.compare(f"{title}: refresh / (SDPA + window)", samples, "refresh", "SDPA + window")
    both: Samples = {name: samples[name] for name in ("refresh", "SDPA + window") if name in samples}
    if both:
        faster = fastest(both)
        bench.compare(f"{title}: faster refresh ({faster}) / SDPA", samples, faster, "SDPA", most=REFRESH_GOAL)
    bench.compare(f"{title}: entropy / SDPA", samples, "entropy", "SDPA")


def kept_pairs(shape: tuple[int, ...], kept: float, *, whole_tiles: bool) -> Tensor:
    """Choose at random which (batch, head, tile, block) pairs are kept: a fraction `kept` of pairs or of tiles."""
    groups = shape[:-1] if whole_tiles else shape
    count = math.prod(groups)
    chosen = torch.randperm(count) < round(kept * count)
    return chosen.view(groups if not whole_tiles else (*groups, 1)).expand(shape).contiguous()


def blockwise(
    bench: Bench, title: str, q_shape: tuple[int, ...], keys: int, block: int, tile: int, like: Tensor
) -> None:
    """Measure blockwise attention to `keys` keys, at several fractions of kept blocks, beside full attention.

    With a threshold of inf, exactly the pairs that `state.computed` flags are kept. The flags are set before each call,
    outside the timed region.
    """
    q = random(*q_shape, like=like)
    k, v = (random(*q_shape[:2], keys, q_shape[3], like=like) for _ in range(2))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    full = best_sdpa(bench, title, q, k, v, expected)
    state = new_state(q, k, v, block, tile)
    runs, predicted = {"SDPA": full}, {}
    blockwise_attention(q, k, v, state, threshold=math.inf, block=block, bound="sound")  # compute all pairs once
    for kept, whole in patterns(state.computed.shape[-1]):
        pairs = kept_pairs(tuple(state.computed.shape), kept, whole_tiles=whole).to(q.device)
        name = f"kept {kept:.0%}{' by tiles' if whole else ''}"
        runs[name] = _blockwise_run(q, k, v, state, pairs, expected)
        predicted[name] = 1 / roofline(bench.ceilings, state, pairs, q) if bench.ceilings else math.nan
    samples = bench.measure(title, runs)
    for name, by_arithmetic in predicted.items():
        bench.compare(f"{title}: {name} / SDPA (arithmetic {by_arithmetic:.2f})", samples, name, "SDPA")


def patterns(blocks: int) -> list[tuple[float, bool]]:
    """Return the kept fractions, and whether whole tiles are kept; with one block a kept tile is always whole."""
    by_blocks = [(0.0, False), (0.5, False), (0.9, False), (1.0, False)]
    return by_blocks if blocks == 1 else [*by_blocks, (0.5, True), (0.9, True)]


def _blockwise_run(q: Tensor, k: Tensor, v: Tensor, state: State, pairs: Tensor, expected: Tensor) -> Run:
    def call() -> Tensor:
        out, _ = blockwise_attention(q, k, v, state, threshold=math.inf, block=state.block, bound="sound")
        return out

    kept, whole, _ = shares(pairs)
    rows, row = math.prod(q.shape[:3]), q.shape[3] * q.element_size()
    busy = pairs.shape[-1] * (row + BLOCK_WORDS) + 6 * row
    bytes_moved = round(rows * (whole * 4 * row + (1 - whole) * busy))
    return Run(call, attention_flops(q, k, kept), bytes_moved, (expected,), before=lambda: state.computed.copy_(pairs))


def shares(pairs: Tensor) -> tuple[float, float, float]:
    """Return the shares of kept pairs, of fully kept tiles, and of kept pairs in the other tiles."""
    kept, whole = pairs.float().mean().item(), pairs.all(-1).float().mean().item()
    return kept, whole, (kept - whole) / (1 - whole) if whole < 1 else 0.0


def roofline(ceilings: Ceilings, state: State, pairs: Tensor, q: Tensor) -> float:
    """Return the speedup of blockwise attention over attention that the measured ceilings predict."""
    _, whole, others = shares(pairs)
    intensity = ceilings.flops / ceilings.bytes
    return speedup(state.keys, state.block, q.shape[3], q.element_size(), intensity, others, whole)


def change(bench: Bench, shape: tuple[int, ...], like: Tensor) -> None:
    """Measure relative_l1, which reads two tensors, beside a copy, which moves as many bytes."""
    current, reference = random(*shape, like=like), random(*shape, like=like)
    target = torch.empty_like(current)
    moved = current.nbytes + reference.nbytes
    expected = (current.double() - reference.double()).abs().sum() / reference.double().abs().sum()
    runs = {
        "copy": Run(lambda: target.copy_(current), bytes=moved, expected=(current,)),
        "relative_l1": Run(lambda: relative_l1(current, reference), bytes=moved, expected=(expected,)),
    }
    title = f"relative_l1, {' x '.join(map(str, shape))}"
    samples = bench.measure(title, runs)
    bench.compare(f"{title}: its bytes/s / a copy's", samples, "copy", "relative_l1", least=CHANGE_GOAL)
