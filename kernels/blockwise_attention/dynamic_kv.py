"""Keys and values that change between calls, as in self-attention; PyTorch on every device.

K and V are tracked like the queries (see state.py): one reference row per key, and per (tile, block) a bound on how
far the reference moved since the tile last recomputed the block. The reference moves when any tile recomputes the
block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention.bounds import (
    SLACK,
    Decision,
    KVChange,
    group_rows,
    of_blocks,
    summary,
    widen,
)
from dit_rewrite.kernels.blockwise_attention.state import State


def measure_kv_change(state: State, k: Tensor, v: Tensor) -> KVChange:
    """Return the change of K and V since each (tile, block) was recomputed. Updates the state's K and V summaries."""
    blocks = (state.block, state.partial.shape[3])
    state.k_stats.copy_(of_blocks(summary, k, *blocks))
    state.v_stats.copy_(of_blocks(summary, v, *blocks))
    change = of_blocks(summary, k.float() - state.k_ref.float(), *blocks).unsqueeze(2)
    largest = of_blocks(_largest, v.float() - state.v_ref.float(), *blocks).unsqueeze(2)
    v_change = (largest + state.v_moved) * (1 + SLACK)
    size = state.v_stats[..., :-1].abs().amax((2, 3))[..., None, None]
    relative = torch.where(v_change == 0, 0.0, v_change / size)
    return KVChange(widen(change + state.k_moved), v_change, relative)


def only_unmoved(change: KVChange) -> KVChange:
    """Return the change for equation 14, which assumes constant keys: any change of a block counts as infinite."""
    moved = (change.k_change != 0).any(-1) | (change.v_change != 0)
    return change._replace(v_relative=torch.where(moved, torch.inf, 0.0))


def _largest(x: Tensor, rows: int) -> Tensor:
    return group_rows(x.abs(), rows).amax((-2, -1))


def update_kv_references(state: State, decision: Decision, kv_change: KVChange, k: Tensor, v: Tensor) -> None:
    """Move the references of the recomputed blocks to k and v, and add the move to the drift of the kept pairs."""
    recomputed = decision.recompute != 0
    moves = recomputed.any(2, keepdim=True)
    k_moved = torch.where(moves.unsqueeze(-1), kv_change.k_change, state.k_moved)
    state.k_moved.copy_(torch.where(recomputed.unsqueeze(-1), 0.0, k_moved))
    state.v_moved.copy_(torch.where(recomputed, 0.0, torch.where(moves, kv_change.v_change, state.v_moved)))
    block_of = (torch.arange(k.shape[2], device=k.device) // state.block).clamp(max=moves.shape[3] - 1)
    rows = moves[:, :, 0, block_of].unsqueeze(-1)
    state.k_ref.copy_(torch.where(rows, k, state.k_ref))
    state.v_ref.copy_(torch.where(rows, v, state.v_ref))
