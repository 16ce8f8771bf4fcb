"""The state that blockwise attention keeps between calls, and its size in bytes.

Storing the queries of each block's last recompute would take as many bytes as the partial outputs, and reading them
would cost as much as loading those. The state therefore stores one reference query per row (`q_ref`), and for each
(tile, block) a summary of how far the reference moved since that block's recompute (`q_moved`): the least and greatest
change per channel over the tile, and the greatest norm of a row's change. Summaries can be added (intervals add, and
norms obey the triangle inequality), so

    query now - query at the block's recompute  lies within  summary(q - q_ref) + q_moved.

The reference moves only when the tile recomputes some block; then `q_moved` becomes 0 for the recomputed blocks and
grows for the kept ones. While a tile is fully kept, `q_moved` does not grow. With tiles of 128 rows of 64 channels,
this takes 4 bytes per row and block instead of 128 in bfloat16.

Equation 14 of CachedAttention is about the change since the block's own recompute, and a sum of summaries only bounds
that. With `own_queries`, the state therefore stores the queries of each block's last recompute in `q_ref`, and no
`q_moved`. With one block the two are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention import bounds
from dit_rewrite.kernels.common import checks

NAME = "blockwise_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_SIZES = range(16, 257)


class State(NamedTuple):
    """The cache of one attention call site; the op updates it in place.

    B: batch, H: heads, T: tiles of t queries, J: key blocks. Tensors without a dtype below have that of q. Entries of
    rows beyond the last query, and of pairs that `computed` does not flag, are never read. A summary (2d+1) holds d
    least values, d greatest values and the greatest row norm. The last four tensors are empty if K and V are static.
    """

    row_max: Tensor  # (B, H, T, J, t) float32: m, the greatest score of each row in each block
    row_sum: Tensor  # (B, H, T, J, t) float32: l = sum exp(score - m)
    partial: Tensor  # (B, H, T, J, t, d): T / l, an average of rows of V, which cannot overflow a 16-bit type
    merged: Tensor  # (B, H, T, t, d): the last output; a fully kept tile loads nothing else
    q_ref: Tensor  # (B, H, T, t, d): the queries when the tile last recomputed a block; own: (B, H, T, J, t, d)
    q_moved: Tensor  # (B, H, T, J, 2d+1) float32: summary of the move of q_ref since the pair's last recompute; own: ()
    computed: Tensor  # (B, H, T, J) bool: whether the pair was ever computed
    k_stats: Tensor  # (B, H, J, 2d+1) float32: summary of each block of K
    v_stats: Tensor  # (B, H, J, 2d+1) float32: summary of each block of V
    counters: Tensor  # (4,) int64: pairs recomputed, pairs in total, scores recomputed, scores in total
    error: Tensor  # (1,) float32: the certified error of the last certified call, the greatest over all tiles
    k_ref: Tensor  # (B, H, M, d): the keys when some tile last recomputed the block
    v_ref: Tensor  # (B, H, M, d): the values at the same time
    k_moved: Tensor  # (B, H, T, J, 2d+1) float32: summary of the move of k_ref since the pair's last recompute
    v_moved: Tensor  # (B, H, T, J) float32: bound on |move of v_ref| since the pair's last recompute
    block: int  # keys per block; the last block has all that remain
    queries: int  # N
    keys: int  # M

    @property
    def own_queries(self) -> bool:
        """Whether each block has the queries of its last recompute."""
        return self.q_ref.ndim == 6

    @property
    def tensors(self) -> list[Tensor]:
        """All fields except the three sizes, in the order that the registered op takes them."""
        return list(self[:-3])


def new_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    tile: int = 128,
    *,
    kv_static: bool = True,
    keep: int | None = None,
    own_queries: bool = False,
) -> State:
    """Return an empty state for attention of q (B, H, N, d) over k and v (B, H, M, d).

    The first call with it computes all pairs.

    block: keys per block, 1 to M; the last block may be shorter. tile: queries that share a decision, a power of two of
    at least 16. With `kv_static`, every call must pass the same k, v and mask (cross-attention), and the summaries of K
    and V are computed here, once. keep: only blocks within this many leading keys may be kept, such as those of a
    condition; all other keys are one last block, which every call recomputes. own_queries: store the queries of each
    block, so that the change is measured since its own recompute. Raises BadOpArgument.
    """
    check_inputs(q, k, v, block, keep)
    checks.require(tile >= 16 and tile & (tile - 1) == 0, NAME, "tile", tile, "a power of two from 16 up")
    fields = layout(q.shape, k.shape, q.dtype, block, tile, kv_static, keep, own_queries)
    tensors = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in fields]
    state = State._make((*tensors, block, q.shape[2], k.shape[2]))
    reset(state, k, v)
    return state


def reset(state: State, k: Tensor, v: Tensor) -> None:
    """Clear the state in place and summarise the new k and v, for the next trajectory with the same shapes."""
    state.computed.zero_()
    state.counters.zero_()
    state.error.zero_()
    blocks = state.partial.shape[3]
    state.k_stats.copy_(bounds.of_blocks(bounds.summary, k, state.block, blocks))
    state.v_stats.copy_(bounds.of_blocks(bounds.summary, v, state.block, blocks))
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
    keep: int | None = None,
    own_queries: bool = False,
) -> int:
    """Return the size in bytes of the tensors that `new_state` allocates for these shapes."""
    fields = layout(q_shape, k_shape, dtype, block, tile, kv_static, keep, own_queries)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in fields)


def kept_fraction(state: State) -> float:
    """Return the fraction of scores, over all calls so far, that were not recomputed. Synchronises with the device."""
    _, _, recomputed, seen = state.counters.tolist()
    return 1 - recomputed / seen if seen else 0.0


def check_inputs(q: Tensor, k: Tensor, v: Tensor, block: int, keep: int | None) -> None:
    """Raise BadOpArgument for unsupported shapes, dtypes or head sizes of q, k and v, or for invalid block sizes."""
    checks.require(q.ndim == 4 and min(q.shape) > 0, NAME, "q.shape", tuple(q.shape), "(B, H, N, d), none of them 0")
    checks.require(q.dtype in DTYPES, NAME, "q.dtype", q.dtype, "float16, bfloat16 or float32")
    checks.require(q.shape[-1] in HEAD_SIZES, NAME, "q.shape[-1]", q.shape[-1], "a head size from 16 to 256")
    checks.require_same_dtype_and_device(NAME, "k", k, "q", q)
    fits = k.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    checks.require(fits, NAME, "k.shape", tuple(k.shape), f"(B, H, M, d) that matches q, {tuple(q.shape)}")
    checks.require_same_dtype_and_device(NAME, "v", v, "q", q)
    checks.require_same_shape(NAME, "v", v, "k", k)
    checks.require(1 <= block <= k.shape[2], NAME, "block", block, f"a number of keys from 1 to {k.shape[2]}")
    allowed = f"None, or at least a block of keys, and fewer than all {k.shape[2]}"
    checks.require(keep is None or block <= keep < k.shape[2], NAME, "keep", keep, allowed)


def check_state(state: State, q: Tensor, k: Tensor, block: int, kv_static: bool, keep: int | None) -> None:
    """Raise BadParameter if the state was made for other shapes, another dtype, device or block size."""
    checks.require(block == state.block, NAME, "block", block, f"that of the state, {state.block}")
    sizes = (q.shape[2], k.shape[2])
    for name, size, wanted in zip(("q.shape[2]", "k.shape[2]"), sizes, (state.queries, state.keys), strict=True):
        checks.require(size == wanted, NAME, name, size, f"that of the state, {wanted}")
    checks.require_same_dtype_and_device(NAME, "q", q, "the state", state.q_ref)
    fields = layout(q.shape, k.shape, q.dtype, block, state.partial.shape[-2], kv_static, keep, state.own_queries)
    for name, (shape, _), tensor in zip(State._fields, fields, state.tensors, strict=False):
        fits = tuple(tensor.shape) == shape and tensor.is_contiguous()
        checks.require(fits, NAME, f"state.{name}.shape", tuple(tensor.shape), f"the shape from new_state, {shape}")


def layout(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    dtype: torch.dtype,
    block: int,
    tile: int,
    kv_static: bool,
    keep: int | None = None,
    own_queries: bool = False,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor, in the order of the fields of State."""
    batch, heads, queries, size = q_shape
    keys = k_shape[2]
    per_tile = (batch, heads, -(-queries // tile))
    per_block = (batch, heads, -(-keys // block) if keep is None else keep // block + 1)
    pairs = (*per_tile, per_block[2])
    dynamic = (batch, heads, 0 if kv_static else keys, size)
    width, f32 = 2 * size + 1, torch.float32
    return [
        ((*pairs, tile), f32),
        ((*pairs, tile), f32),
        ((*pairs, tile, size), dtype),
        ((*per_tile, tile, size), dtype),
        ((*(pairs if own_queries else per_tile), tile, size), dtype),
        ((*pairs, width) if not own_queries else (0,), f32),
        (pairs, torch.bool),
        ((*per_block, width), f32),
        ((*per_block, width), f32),
        ((4,), torch.int64),
        ((1,), f32),
        (dynamic, dtype),
        (dynamic, dtype),
        ((*pairs, width) if not kv_static else (0,), f32),
        (pairs if not kv_static else (0,), f32),
    ]
