"""Keys and values that change from call to call, as those of self-attention do; plain PyTorch on every device.

As for the queries: one reference row per key, and per (tile, block) a summary of how far the reference moved since the
tile last recomputed the block. The reference moves when some tile recomputes the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention.bounds import SLACK, Decision, Keys, groups, summary, widen
from dit_rewrite.kernels.blockwise_attention.state import State


def measure_keys(state: State, k: Tensor, v: Tensor) -> Keys:
    """How far K and V moved since each (tile, block) was recomputed. Brings the state's extremes up to date."""
    state.k_stats.copy_(summary(k, state.block))
    state.v_stats.copy_(summary(v, state.block))
    change = summary(k.float() - state.k_ref.float(), state.block).unsqueeze(2)
    largest = groups((v.float() - state.v_ref.float()).abs(), state.block).amax((-2, -1)).unsqueeze(2)
    v_change = (largest + state.v_moved) * (1 + SLACK)
    size = state.v_stats[..., :-1].abs().amax((2, 3))[..., None, None]
    relative = torch.where(v_change == 0, 0.0, v_change / size)
    return Keys(widen(change + state.k_moved), v_change, relative)


def move_keys(state: State, decision: Decision, keys: Keys, k: Tensor, v: Tensor) -> None:
    """After the decisions: the references of recomputed blocks move, and what was kept remembers by how much."""
    recomputed = decision.recompute != 0
    moves = recomputed.any(2, keepdim=True)
    k_moved = torch.where(moves.unsqueeze(-1), keys.change, state.k_moved)
    state.k_moved.copy_(torch.where(recomputed.unsqueeze(-1), 0.0, k_moved))
    state.v_moved.copy_(torch.where(recomputed, 0.0, torch.where(moves, keys.v_change, state.v_moved)))
    rows = moves[:, :, 0].repeat_interleave(state.block, -1)[..., : k.shape[2], None]
    state.k_ref.copy_(torch.where(rows, k, state.k_ref))
    state.v_ref.copy_(torch.where(rows, v, state.v_ref))
