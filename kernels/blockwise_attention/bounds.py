"""How much the scores of kept blocks can have changed.

Let D be the change of a tile's queries since a block was last recomputed: per channel it lies in [lo, hi], and no
row's change is longer than n. The block's keys lie in [k_lo, k_hi] and are no longer than k_n. Then, for each row and
key, the sum over the channels of D_c k_c lies between the sums of the least and of the greatest of the four products
lo k_lo, lo k_hi, hi k_lo, hi k_hi, and its size is at most n k_n (Cauchy-Schwarz). The smaller of the two bounds,
times the scale, is the *sound* estimate. Where the keys change by E,

    q'.k' - q.k = D.(k' - E) + q'.E,

and both products are bounded so. (Kept V that changed count as their change relative to the largest |V|, so that the
estimate is 0 only where nothing changed.) The *paper's* estimate (CachedAttention, equation 14 and Algorithm 1) sums
max(hi k_hi, lo k_lo) without the scale. It leaves out two corners and is no bound: hi = 1, lo = 0, k in [-1, -1] gives
0 where the score changed by 1; it can be negative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLACK = 2.0**-22  # above the rounding of one float32 operation, as a fraction of its result


class Keys(NamedTuple):
    """How far K and V moved since each (tile, block) was recomputed."""

    change: Tensor  # (B, H, T, J, 2d+1): summary of K's change
    v_change: Tensor  # (B, H, T, J): greatest |change| of V
    v_relative: Tensor  # (B, H, T, J): the same over the greatest |V| of the head


class Decision(NamedTuple):
    """What one call decided for each (tile, block)."""

    recompute: Tensor  # (B, H, T, J): not 0 where the block is recomputed
    score_change: Tensor  # (B, H, T, J) float32: the sound bound on how much a score changed; garbage if never computed
    change: Tensor  # (B, H, T, J, 2d+1): summary of the queries' change since the block's recompute; likewise


def groups(x: Tensor, rows: int) -> Tensor:
    """(B, H, n, d) as (B, H, ceil(n / rows), rows, d); the last group is filled up with its last row."""
    missing = -x.shape[2] % rows
    if missing:
        x = torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1)), 2)
    return x.unflatten(2, (-1, rows))


def summary(x: Tensor, rows: int) -> Tensor:
    """Of each group of `rows` rows of x (B, H, n, d): least and greatest value per channel, greatest length of a row.

    (B, H, groups, 2d+1) in float32, widened by more than its rounding. NaN spreads.
    """
    x = groups(x.float(), rows)
    norm = lengths(x).amax(-1, keepdim=True) * (1 + SLACK * x.shape[-1])
    return widen(torch.cat((x.amin(-2), x.amax(-2), norm), -1))


def lengths(x: Tensor) -> Tensor:
    """The length of each row, in float32. Rows are scaled first: squares of 1e20 or 1e-23 are out of float32's range,
    and a length that came out as 0 would prove a change that is not there."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return ((x / scale) ** 2).sum(-1).sqrt() * scale.squeeze(-1)


def widen(summary: Tensor) -> Tensor:
    """Move each bound outwards by more than the rounding of one addition."""
    size = summary.shape[-1] // 2
    outwards = torch.ones_like(summary)
    outwards[..., :size] = -1
    return summary + outwards * summary.abs() * SLACK


def sound(change: Tensor, k_stats: Tensor, scale: float, q_stats: Tensor | None, keys: Keys | None) -> Tensor:
    """The greatest possible |change of a score| of each (tile, block), (B, H, T, J); see the top of this file."""
    k_stats = k_stats.unsqueeze(2)
    if keys is None:
        return abs(scale) * (1 + SLACK) * torch.minimum(_corners(change, k_stats), _lengths(change, k_stats))
    assert q_stats is not None
    then = widen(k_stats + _negative(keys.change))
    corners = _corners(change, then) + _corners(q_stats.unsqueeze(3), keys.change)
    lengths = _lengths(change, then) + _lengths(q_stats.unsqueeze(3), keys.change)
    return abs(scale) * (1 + SLACK) * torch.minimum(corners, lengths)


def paper(change: Tensor, k_stats: Tensor) -> Tensor:
    """Equation 14, summed over the channels as in Algorithm 1. It can be negative, and is no bound."""
    low, high, _ = _parts(change)
    k_low, k_high, _ = _parts(k_stats.unsqueeze(2))
    return torch.maximum(high * k_high, low * k_low).sum(-1)


def decide(estimate: Tensor, computed: Tensor, threshold: float) -> Tensor:
    """Recompute (True) unless the pair was computed before and its estimate is finite and at most the threshold."""
    return ~(computed & estimate.isfinite() & (estimate <= threshold))


def _corners(a: Tensor, b: Tensor) -> Tensor:
    a_low, a_high, _ = _parts(a)
    b_low, b_high, _ = _parts(b)
    first, second, third, fourth = a_low * b_low, a_low * b_high, a_high * b_low, a_high * b_high
    high = torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))
    low = torch.minimum(torch.minimum(first, second), torch.minimum(third, fourth))
    size = torch.maximum(high.abs(), low.abs()).sum(-1)
    return torch.maximum(high.sum(-1), -low.sum(-1)) + size * (SLACK * (a_low.shape[-1] + 8))


def _lengths(a: Tensor, b: Tensor) -> Tensor:
    return a[..., -1] * b[..., -1] * (1 + 4 * SLACK)


def _parts(summary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = summary.shape[-1] // 2
    return summary[..., :size], summary[..., size : 2 * size], summary[..., -1]


def _negative(summary: Tensor) -> Tensor:
    """The summary of the negated rows."""
    low, high, norm = _parts(summary)
    return torch.cat((-high, -low, norm.unsqueeze(-1)), -1)
