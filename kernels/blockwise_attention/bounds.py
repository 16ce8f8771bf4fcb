"""Bounds on how much the scores of kept blocks can have changed.

Let D be the change of a tile's queries since a block was last recomputed. Each channel of D lies in [lo, hi], and the
norm of a row of D is at most n. The block's keys lie in [k_lo, k_hi] and have norms of at most k_n. For each row and
key, the sum over the channels of D_c k_c then lies between the sums of the least and of the greatest of the four
products lo k_lo, lo k_hi, hi k_lo, hi k_hi, and its absolute value is at most n k_n (Cauchy-Schwarz). The *sound*
estimate is the smaller of these two bounds times the scale. If the keys change by E,

    q'.k' - q.k = D.(k' - E) + q'.E,

and both products are bounded in the same way. A change of V adds its size relative to the largest |V|, so that the
estimate is 0 only if nothing changed. The *paper's* estimate (CachedAttention, equation 14 and Algorithm 1) sums
max(hi k_hi, lo k_lo) without the scale. It omits two of the four products and is not a bound: hi = 1, lo = 0,
k in [-1, -1] gives 0 although the score changes by 1, and it can be negative.

A *summary* (..., 2d+1) holds d least values, d greatest values and the greatest row norm of a group of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SLACK = 2.0**-22  # relative; exceeds the rounding error of one float32 operation


class KVChange(NamedTuple):
    """Change of K and V since each (tile, block) was last recomputed; all float32."""

    k_change: Tensor  # (B, H, T, J, 2d+1): summary of the change of K
    v_change: Tensor  # (B, H, T, J): greatest |change| of V
    v_relative: Tensor  # (B, H, T, J): v_change over the greatest |V| of the head


class Decision(NamedTuple):
    """Decisions of one call for each (tile, block). The bounds are undefined for pairs that were never computed."""

    recompute: Tensor  # (B, H, T, J) bool or int32: nonzero if the block is recomputed
    score_change: Tensor  # (B, H, T, J) float32: sound bound on |change of a score|
    change: Tensor  # (B, H, T, J, 2d+1) float32: summary of the queries' change since the pair's last recompute


def group_rows(x: Tensor, rows: int) -> Tensor:
    """Reshape (B, H, n, d) to (B, H, ceil(n / rows), rows, d); the last row is repeated to complete the last group."""
    missing = -x.shape[2] % rows
    if missing:
        x = torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1)), 2)
    return x.unflatten(2, (-1, rows))


def summary(x: Tensor, rows: int) -> Tensor:
    """Return the summary of each group of `rows` rows of x (B, H, n, d), as (B, H, groups, 2d+1) float32.

    The bounds are widened by more than their rounding error. NaN propagates.
    """
    x = group_rows(x.float(), rows)
    norm = row_norms(x).amax(-1, keepdim=True) * (1 + SLACK * x.shape[-1])
    return widen(torch.cat((x.amin(-2), x.amax(-2), norm), -1))


def of_blocks(reduce: Callable[[Tensor, int], Tensor], x: Tensor, block: int, blocks: int) -> Tensor:
    """Return `reduce`, as `summary`, of the rows of each key block. The last block has all rows from its first on."""
    last = (blocks - 1) * block
    if x.shape[2] - last <= block:
        return reduce(x, block)
    return torch.cat((reduce(x[:, :, :last], block), reduce(x[:, :, last:], x.shape[2] - last)), 2)


def row_norms(x: Tensor) -> Tensor:
    """Return the norm of each row in float32.

    Rows are scaled first, because squares of 1e20 or 1e-23 overflow or underflow, and a norm of 0 would wrongly prove
    that nothing changed.
    """
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return ((x / scale) ** 2).sum(-1).sqrt() * scale.squeeze(-1)


def widen(summary: Tensor) -> Tensor:
    """Widen each bound of a summary by more than the rounding error of one addition."""
    size = summary.shape[-1] // 2
    outwards = torch.ones_like(summary)
    outwards[..., :size] = -1
    return summary + outwards * summary.abs() * SLACK


def sound(change: Tensor, k_stats: Tensor, scale: float, q_stats: Tensor | None, kv_change: KVChange | None) -> Tensor:
    """Return the sound bound on |change of a score| for each (tile, block), (B, H, T, J); see the module docstring."""
    k_stats = k_stats.unsqueeze(2)
    if kv_change is None:
        return (
            abs(scale)
            * (1 + SLACK)
            * torch.minimum(_interval_products(change, k_stats), _cauchy_schwarz(change, k_stats))
        )
    assert q_stats is not None
    then = widen(k_stats + _negative(kv_change.k_change))
    corners = _interval_products(change, then) + _interval_products(q_stats.unsqueeze(3), kv_change.k_change)
    lengths = _cauchy_schwarz(change, then) + _cauchy_schwarz(q_stats.unsqueeze(3), kv_change.k_change)
    return abs(scale) * (1 + SLACK) * torch.minimum(corners, lengths)


def paper(change: Tensor, k_stats: Tensor) -> Tensor:
    """Return the estimate of CachedAttention (equation 14, summed as in Algorithm 1). It is not a bound."""
    low, high, _ = _parts(change)
    k_low, k_high, _ = _parts(k_stats.unsqueeze(2))
    return torch.maximum(high * k_high, low * k_low).sum(-1)


def decide(estimate: Tensor, computed: Tensor, threshold: float) -> Tensor:
    """Return True (recompute) unless the pair was computed before and its estimate is finite and <= `threshold`."""
    return ~(computed & estimate.isfinite() & (estimate <= threshold))


def _interval_products(a: Tensor, b: Tensor) -> Tensor:
    a_low, a_high, _ = _parts(a)
    b_low, b_high, _ = _parts(b)
    first, second, third, fourth = a_low * b_low, a_low * b_high, a_high * b_low, a_high * b_high
    high = torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))
    low = torch.minimum(torch.minimum(first, second), torch.minimum(third, fourth))
    size = torch.maximum(high.abs(), low.abs()).sum(-1)
    return torch.maximum(high.sum(-1), -low.sum(-1)) + size * (SLACK * (a_low.shape[-1] + 8))


def _cauchy_schwarz(a: Tensor, b: Tensor) -> Tensor:
    return a[..., -1] * b[..., -1] * (1 + 4 * SLACK)


def _parts(summary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = summary.shape[-1] // 2
    return summary[..., :size], summary[..., size : 2 * size], summary[..., -1]


def _negative(summary: Tensor) -> Tensor:
    """Return the summary of the negated rows."""
    low, high, norm = _parts(summary)
    return torch.cat((-high, -low, norm.unsqueeze(-1)), -1)
