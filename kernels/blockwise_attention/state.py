"""What blockwise attention keeps between calls, and how many bytes that takes.

The queries of every block's last recompute would be as many bytes as the partial outputs themselves, and reading them
as dear as loading those. So one reference query per row is kept (`q_ref`), and for each (tile, block) a summary of
how far the reference had moved since that block's recompute (`q_moved`): per channel the least and the greatest
change over the tile, and the greatest length of a row's change. Summaries add (intervals add, and the triangle
inequality holds), so

    query now - query at the block's recompute  lies within  summary(q - q_ref) + q_moved.

The reference moves only when the tile recomputes some block: then `q_moved` is 0 for the recomputed blocks and grows
for the kept ones. While a whole tile is kept nothing adds up. In bytes per row and block, with tiles of 128 rows of 64
channels: 4 for this instead of 128 in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_rewrite.kernels import checks
from dit_rewrite.kernels.blockwise_attention import bounds

WHERE = "blockwise_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_SIZES = range(16, 257)


class State(NamedTuple):
    """The cache of one attention core; the op changes it in place. B, H: batch, heads; T tiles of t rows; J key blocks.

    Rows beyond the last query and whatever `computed` does not flag are never read. `2d+1` is a summary: d least
    values, d greatest ones, the greatest length of a row. The last four are empty where K and V are static.
    """

    row_max: Tensor  # (B, H, T, J, t) float32: m, the greatest score of each row in each block
    row_sum: Tensor  # (B, H, T, J, t) float32: l = sum exp(score - m)
    partial: Tensor  # (B, H, T, J, t, d): T / l, an average of V's rows, which no 16-bit type can overflow
    merged: Tensor  # (B, H, T, t, d): the last output, which is all that a wholly kept tile loads
    q_ref: Tensor  # (B, H, T, t, d): the queries when the tile last recomputed a block
    q_moved: Tensor  # (B, H, T, J, 2d+1) float32: how far q_ref had moved since the block's own recompute
    computed: Tensor  # (B, H, T, J) bool: whether the pair was ever computed
    k_stats: Tensor  # (B, H, J, 2d+1) float32: summary of each block of K
    v_stats: Tensor  # (B, H, J, 2d+1) float32: summary of each block of V
    counters: Tensor  # (4,) int64: pairs recomputed, pairs seen, scores recomputed, scores seen
    k_ref: Tensor  # (B, H, M, d): the keys when some tile last recomputed the block
    v_ref: Tensor  # (B, H, M, d)
    k_moved: Tensor  # (B, H, T, J, 2d+1) float32
    v_moved: Tensor  # (B, H, T, J) float32: greatest |change|
    block: int
    queries: int
    keys: int

    @property
    def tensors(self) -> list[Tensor]:
        """Everything but the three sizes, as the registered op takes it."""
        return list(self[:-3])


def new_state(q: Tensor, k: Tensor, v: Tensor, block: int, tile: int = 128, *, kv_static: bool = True) -> State:
    """An empty state for attention of q (B, H, N, d) over k and v (B, H, M, d); its first call computes everything.

    `block`: keys of a block, 1 to M; the last one may be shorter. `tile`: queries that are decided on together, a power
    of two from 16 up. With `kv_static`, k, v and the mask must be the same in every call (cross-attention): then the
    extremes of their blocks are taken here, once. Raises BadParameter.
    """
    check_inputs(q, k, v, block)
    checks.require(tile >= 16 and tile & (tile - 1) == 0, WHERE, "tile", tile, "a power of two from 16 up")
    layout = _layout(q.shape, k.shape, q.dtype, block, tile, kv_static)
    tensors = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in layout]
    state = State._make((*tensors, block, q.shape[2], k.shape[2]))
    reset(state, k, v)
    return state


def reset(state: State, k: Tensor, v: Tensor) -> None:
    """Forget everything, in place, and take the extremes of new k and v: for the next trajectory of the same shapes."""
    state.computed.zero_()
    state.counters.zero_()
    state.k_stats.copy_(bounds.summary(k, state.block))
    state.v_stats.copy_(bounds.summary(v, state.block))
    if state.k_ref.numel():
        state.k_ref.copy_(k)
        state.v_ref.copy_(v)


def state_bytes(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    dtype: torch.dtype,
    block: int,
    tile: int = 128,
    *,
    kv_static: bool = True,
) -> int:
    """The exact bytes of `new_state`'s tensors."""
    layout = _layout(q_shape, k_shape, dtype, block, tile, kv_static)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in layout)


def kept_fraction(state: State) -> float:
    """The fraction of all scores, over all calls so far, that were not recomputed. Waits for the device."""
    _, _, recomputed, seen = state.counters.tolist()
    return 1 - recomputed / seen if seen else 0.0


def check_inputs(q: Tensor, k: Tensor, v: Tensor, block: int) -> None:
    """Refuse q, k and v that are no attention of the supported kind, and blocks that do not fit."""
    checks.require(q.ndim == 4 and min(q.shape) > 0, WHERE, "q.shape", tuple(q.shape), "(B, H, N, d), none of them 0")
    checks.require(q.dtype in DTYPES, WHERE, "q.dtype", q.dtype, "float16, bfloat16 or float32")
    checks.require(q.shape[-1] in HEAD_SIZES, WHERE, "q.shape[-1]", q.shape[-1], "a head size from 16 to 256")
    checks.same_kind(WHERE, "k", k, "q", q)
    fits = k.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    checks.require(fits, WHERE, "k.shape", tuple(k.shape), f"(B, H, M, d) that fits q's {tuple(q.shape)}")
    checks.same_kind(WHERE, "v", v, "q", q)
    checks.same_shape(WHERE, "v", v, "k", k)
    checks.require(1 <= block <= k.shape[2], WHERE, "block", block, f"a number of keys from 1 to {k.shape[2]}")


def check_state(state: State, q: Tensor, k: Tensor, block: int, kv_static: bool) -> None:
    """Refuse a state that was made for other shapes, another dtype or device, or another block size."""
    checks.require(block == state.block, WHERE, "block", block, f"that of the state, {state.block}")
    sizes = (q.shape[2], k.shape[2])
    for name, size, wanted in zip(("q.shape[2]", "k.shape[2]"), sizes, (state.queries, state.keys), strict=True):
        checks.require(size == wanted, WHERE, name, size, f"that of the state, {wanted}")
    checks.same_kind(WHERE, "q", q, "the state", state.q_ref)
    layout = _layout(q.shape, k.shape, q.dtype, block, state.partial.shape[-2], kv_static)
    for name, (shape, _), tensor in zip(State._fields, layout, state.tensors, strict=False):
        fits = tuple(tensor.shape) == shape and tensor.is_contiguous()
        checks.require(fits, WHERE, f"state.{name}.shape", tuple(tensor.shape), f"new_state makes it: {shape}")


def _layout(
    q_shape: Sequence[int], k_shape: Sequence[int], dtype: torch.dtype, block: int, tile: int, kv_static: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor, in the order of State's fields."""
    batch, heads, queries, size = q_shape
    keys = k_shape[2]
    per_tile = (batch, heads, -(-queries // tile))
    per_block = (batch, heads, -(-keys // block))
    pairs = (*per_tile, per_block[2])
    moving = (batch, heads, 0 if kv_static else keys, size)
    width, f32 = 2 * size + 1, torch.float32
    return [
        ((*pairs, tile), f32),
        ((*pairs, tile), f32),
        ((*pairs, tile, size), dtype),
        ((*per_tile, tile, size), dtype),
        ((*per_tile, tile, size), dtype),
        ((*pairs, width), f32),
        (pairs, torch.bool),
        ((*per_block, width), f32),
        ((*per_block, width), f32),
        ((4,), torch.int64),
        (moving, dtype),
        (moving, dtype),
        ((*pairs, width) if not kv_static else (0,), f32),
        (pairs if not kv_static else (0,), f32),
    ]
