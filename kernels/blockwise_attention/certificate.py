"""A bound on the error of the output when blocks are kept.

In one row let p_i be the weights used, w_j the sum of the weights of block j, v_i the values used, o = sum p_i v_i. The
true scores differ by d_i with |d_i| <= e_j for key i of block j (e_j is the sound estimate of a kept block plus the
rounding error of the scores), the true values v'_i by at most g_j. The true weights are p_i exp(d_i) / Z with
Z = sum p_i exp(d_i). Since sum p_i (v_i - o) = 0,

    o' - o = sum p_i exp(d_i) (v'_i - v_i) / Z + sum p_i (exp(d_i) - 1) (v_i - o) / Z                              (1)

so |o' - o| <= sum_j w_j [(exp(e_j) - 1) r_j + exp(e_j) g_j] / sum_j w_j exp(-e_j), where r_j = |o - middle_j| +
half_j + g_j bounds the distance of a value of block j from o by the range of V in that block and channel. Two more
bounds hold, and the least of the three is used in each channel. With e and g the greatest e_j and g_j:

    |o' - o| <= tanh(e / 2) (range of V + 2 g) + g                                                                   (2)
    |o' - o| <= the distance of o from the farthest v', since o' is an average of the v'                             (3)

(2) holds because for any set A of keys the odds p(A) / p(not A) change by a factor of at most exp(2 e), so p(A), and
with it the total variation distance, changes by at most tanh(e / 2). To first order in e, (1) and (2) are attained.

The bound includes rounding. Each estimate is widened by more than the rounding error of its own sums. The output adds
|V| (4 u + 2^-21 (block + blocks + |m| + 32)). The first term, with u the unit roundoff of the working dtype, covers
the weights that multiply V, the kept partial outputs and the output itself. The second covers float32 sums,
exponentials and scores; |m| is the mean absolute value of a row's greatest scores. The certified error therefore
bounds |output - attention in real numbers|.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention.bounds import SLACK, Decision, KVChange, group_rows, row_norms
from dit_rewrite.kernels.blockwise_attention.state import State

MAX_SCORE_CHANGE = 20.0  # for larger e, (1) is never smaller than (3), and exp might overflow


class _Changes(NamedTuple):
    score: Tensor  # (B, H, T, J): e, with the rounding error of the scores; only that error if recomputed
    value: Tensor  # (B, H, T, J): g


def certified_error(state: State, decision: Decision, kv_change: KVChange | None, q: Tensor, scale: float) -> Tensor:
    """Return a bound on max |output - exact attention| of each query tile, (B, H, T) float32.

    Call it after the output was computed. Exact attention is that of the given q, k and v in real numbers. The cost is
    several elementwise PyTorch passes over the output for each block, so use it for tests and measurements only.
    """
    changes = _bounds_on_changes(state, decision, kv_change, q, scale)
    middle, half = _ranges(state.v_stats)
    low, high = (middle - half).amin(2), (middle + half).amax(2)
    out = state.merged.float()
    weight, rounding = _weights(state, changes.value)
    numerator, farthest = torch.zeros_like(out), torch.zeros_like(out)
    for j in range(weight.shape[3]):
        e, g = (x[..., j, None, None] for x in changes)
        distance = (out - middle[:, :, j, None, None]).abs() + half[:, :, j, None, None] + rounding
        gain = e.clamp(max=MAX_SCORE_CHANGE)
        numerator += weight[..., j, :, None] * (gain.expm1() * (distance + g) + gain.exp() * g)
        farthest = torch.maximum(farthest, distance)
    e, g = (x.amax(3)[..., None, None] for x in changes)
    shrunk = (weight * (-changes.score[..., None].clamp(max=MAX_SCORE_CHANGE)).exp()).sum(3).unsqueeze(-1)
    by_mass = torch.where(e < MAX_SCORE_CHANGE, numerator / torch.where(shrunk > 0, shrunk, 1.0), math.inf)
    by_distance = (e / 2).tanh() * ((high - low)[:, :, None, None] + 2 * g) + g
    bound = torch.minimum(torch.minimum(by_mass, by_distance), farthest).amax(-1) * 1.001 + rounding.squeeze(-1)
    return torch.where(_valid(q, bound), bound, 0.0).amax(-1)


def _bounds_on_changes(
    state: State, decision: Decision, kv_change: KVChange | None, q: Tensor, scale: float
) -> _Changes:
    kept = decision.recompute == 0
    moved = torch.where(kept, decision.change[..., -1], 0.0)
    score = torch.where(kept, decision.score_change, 0.0)
    value, k_moved = torch.zeros_like(score), torch.zeros_like(score)
    if kv_change is not None:
        value, k_moved = (torch.where(kept, x, 0.0) for x in (kv_change.v_change, kv_change.k_change[..., -1]))
    q_norm = row_norms(group_rows(q.float(), state.partial.shape[-2])).amax(-1).unsqueeze(-1)
    size = abs(scale) * (q_norm + moved) * (state.k_stats[..., -1].unsqueeze(2) + k_moved)
    return _Changes(score + size * (SLACK * (q.shape[-1] + 8)), value)


def _weights(state: State, v_change: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of each block in each row, (B, H, T, J, t), and the rounding error, (B, H, T, t, 1)."""
    peak = state.row_max.amax(3, keepdim=True)
    mass = state.row_sum * (state.row_max - torch.where(peak.isneginf(), 0.0, peak)).exp()
    total = mass.sum(3, keepdim=True)
    weight = mass / torch.where(total > 0, total, 1.0)
    level = torch.where(weight > 0, weight * state.row_max.abs(), 0.0).sum(3)
    largest = state.v_stats[..., :-1].abs().amax((2, 3))[..., None] + v_change.amax(3)
    longest = max(state.block, state.keys - (weight.shape[3] - 1) * state.block)
    single = 2 * SLACK * (longest + weight.shape[3] + level + 32)
    kind = torch.finfo(state.partial.dtype)
    rounding = largest.unsqueeze(-1) * (2 * kind.eps + single) + max(4 * kind.tiny * kind.eps, 1e-36)
    return weight, rounding.unsqueeze(-1)


def _ranges(v_stats: Tensor) -> tuple[Tensor, Tensor]:
    """Return the midpoint and half the width of the range of V per block and channel, each (B, H, J, d)."""
    low, high = v_stats[..., :-1].chunk(2, -1)
    return (low + high) / 2, (high - low) / 2


def _valid(q: Tensor, rows: Tensor) -> Tensor:
    """Return which rows of the tiles are queries and not padding, as a bool tensor (T, t)."""
    tiles, tile = rows.shape[2:]
    return (torch.arange(tiles * tile, device=q.device) < q.shape[2]).view(tiles, tile)
