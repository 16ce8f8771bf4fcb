"""Naive reference of blockwise attention in PyTorch; the op runs it on a CPU.

For each key block j, S = q k_j^T scale (+ mask), m_j = rowmax S, P = exp(S - m_j), l_j = rowsum P and T_j = P v_j; a
kept block takes m_j, l_j and T_j from the state. With m = max m_j, the output is sum exp(m_j - m) T_j / sum
exp(m_j - m) l_j. This is Algorithm 2 of CachedAttention with three corrections: the loop runs over blocks (printed:
dim), line 10 is T_i = P_i V_i, and a kept block needs its m_j and l_j instead of its scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention import bounds
from dit_rewrite.kernels.blockwise_attention.bounds import Decision, KVChange, group_rows
from dit_rewrite.kernels.blockwise_attention.state import State
from dit_rewrite.kernels.common.scores import apply_mask

Index = tuple[Tensor, ...]


def estimate(
    q: Tensor, k: Tensor, state: State, kv_change: KVChange | None, threshold: float, scale: float, paper: bool
) -> Decision:
    """Decide which (tile, block) pairs to recompute, and update `state.counters`."""
    tile = state.partial.shape[-2]
    change = _change(q, state)
    q_stats = None if kv_change is None else bounds.summary(q, tile)
    score_change = bounds.sound(change, state.k_stats, scale, q_stats, kv_change)
    by = bounds.paper(change, state.k_stats) if paper else score_change
    finite = torch.where(score_change.isfinite(), 0.0, torch.nan)
    recompute = bounds.decide(
        by + finite + (0.0 if kv_change is None else kv_change.v_relative), state.computed, threshold
    )
    _count(state, recompute, q.shape[2], k.shape[2])
    return Decision(recompute, score_change, change)


def _change(q: Tensor, state: State) -> Tensor:
    """Return the summary of the queries' change since each (tile, block) was recomputed."""
    tile = state.partial.shape[-2]

    def since(reference: Tensor) -> Tensor:
        return bounds.summary(q.float() - reference.flatten(2, 3)[:, :, : q.shape[2]].float(), tile)

    if state.own_queries:
        return torch.stack([since(reference) for reference in state.q_ref.unbind(3)], 3)
    return bounds.widen(since(state.q_ref).unsqueeze(3) + state.q_moved)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: State, decision: Decision, scale: float
) -> Tensor:
    """Recompute the chosen blocks, merge them with the kept blocks, update the state, and return the output."""
    busy = (decision.recompute != 0).any(-1).nonzero(as_tuple=True)
    tile = state.partial.shape[-2]
    queries = group_rows(q, tile)[busy]
    peak = torch.full(queries.shape[:2], -torch.inf, device=q.device)
    total, out = torch.zeros_like(peak), torch.zeros(queries.shape, device=q.device)
    for j in range(state.partial.shape[3]):
        peak_j, total_j, sum_j = _block(queries, k, v, mask, state, decision, busy, j, scale)
        higher = torch.maximum(peak, peak_j)
        old, new = _decay(peak, higher), _decay(peak_j, higher)
        total = old * total + new * total_j
        out = old.unsqueeze(-1) * out + new.unsqueeze(-1) * sum_j
        peak = higher
    state.merged[busy] = _average(out, total).to(q.dtype)
    if not state.own_queries:
        state.q_ref[busy] = queries
        moved = torch.where(decision.recompute.bool()[busy].unsqueeze(-1), 0.0, decision.change[busy])
        state.q_moved[busy] = moved
    state.computed.fill_(True)
    return torch.empty_like(q).copy_(state.merged.flatten(2, 3)[:, :, : q.shape[2]])


def _block(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: State,
    decision: Decision,
    busy: Index,
    j: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return m, l and T of block j for the n tiles in `busy`: (n, t), (n, t) and (n, t, d), float32.

    Writes recomputed results to the state.
    """
    batch, head, tile = busy
    peak_j, total_j = state.row_max[batch, head, tile, j], state.row_sum[batch, head, tile, j]
    sum_j = state.partial[batch, head, tile, j].float() * total_j.unsqueeze(-1)
    at = (decision.recompute[batch, head, tile, j] != 0).nonzero().squeeze(1)
    b, h, i = batch[at], head[at], tile[at]
    last = j + 1 == state.partial.shape[3]
    chosen = slice(j * state.block, None if last else (j + 1) * state.block)
    scores = queries[at].float() @ k[:, :, chosen][b, h].float().transpose(1, 2) * scale
    if mask is not None:
        rows = i[:, None] * queries.shape[1] + torch.arange(queries.shape[1], device=i.device)
        rows = rows.clamp(max=mask.shape[2] - 1)
        scores = apply_mask(scores, mask[..., chosen][b[:, None], h[:, None], rows])
    peak_j[at] = scores.amax(-1)
    weights = _decay(scores, peak_j[at].unsqueeze(-1))
    total_j[at], sum_j[at] = weights.sum(-1), weights @ v[:, :, chosen][b, h].float()
    state.row_max[b, h, i, j], state.row_sum[b, h, i, j] = peak_j[at], total_j[at]
    state.partial[b, h, i, j] = _average(sum_j[at], total_j[at]).to(state.partial.dtype)
    if state.own_queries:
        state.q_ref[b, h, i, j] = queries[at]
    return peak_j, total_j, sum_j


def _decay(low: Tensor, high: Tensor) -> Tensor:
    """Return exp(low - high), or 0 if both are -inf because all keys were masked."""
    return (low - torch.where(high.isneginf(), 0.0, high)).exp()


def _average(weighted: Tensor, total: Tensor) -> Tensor:
    """Return weighted / total, or 0 for fully masked rows, as PyTorch's attention does."""
    return weighted / torch.where(total == 0, 1.0, total).unsqueeze(-1)


def _count(state: State, recompute: Tensor, queries: int, keys: int) -> None:
    tiles, blocks = recompute.shape[2:]
    tile = state.partial.shape[-2]
    rows = (queries - torch.arange(tiles, device=recompute.device) * tile).clamp(max=tile)
    columns = torch.full((blocks,), state.block, device=recompute.device)
    columns[-1] = keys - (blocks - 1) * state.block
    scores = rows[:, None] * columns
    batch = recompute.shape[0] * recompute.shape[1]
    seen = torch.tensor([recompute.numel(), batch * queries * keys], device=recompute.device)
    done = torch.stack((recompute.sum(), (recompute * scores).sum()))
    state.counters.add_(torch.stack((done, seen), 1).flatten())
