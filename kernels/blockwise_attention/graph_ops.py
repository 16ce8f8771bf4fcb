"""Functional entry points of blockwise attention for compiled graphs: fill a state, and take a step that updates it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention.op import blockwise_attention
from dit_rewrite.kernels.blockwise_attention.state import State, new_state
from dit_rewrite.kernels.common.scores import default_scale

if __name__ != "dit_rewrite.kernels.blockwise_attention.graph_ops":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")


@torch.library.custom_op("dit_rewrite::blockwise_fill", mutates_args=())
def blockwise_fill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    block: int,
    scale: float | None,
    kv_static: bool,
    keep: int | None = None,
    own_queries: bool = False,
) -> list[Tensor]:
    """Return the tensors of a new state (see state.py) in which every key block is computed from q, k and v.

    Shapes and dtypes are those of `blockwise_attention`, and so is the BadParameter that invalid arguments raise.
    """
    state = new_state(q, k, v, block, kv_static=kv_static, keep=keep, own_queries=own_queries)
    options = {"threshold": -math.inf, "block": block, "bound": "sound", "attn_mask": attn_mask, "scale": scale}
    blockwise_attention(q, k, v, state, kv_static=kv_static, keep=keep, **options)  # type: ignore[arg-type]
    state.counters.zero_()
    return state.tensors


@blockwise_fill.register_fake
def _fill_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    block: int,
    scale: float | None,
    kv_static: bool,
    keep: int | None = None,
    own_queries: bool = False,
) -> list[Tensor]:
    return new_state(q, k, v, block, kv_static=kv_static, keep=keep, own_queries=own_queries).tensors


def blockwise_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    attn_mask: Tensor | None,
    threshold: float,
    block: int,
    bound: str,
    scale: float | None,
    kv_static: bool,
    certify: bool = False,
    keep: int | None = None,
) -> Tensor:
    """Call `blockwise_attention` with the tensors of a state, which it updates in place. Raises BadOpArgument.

    With `certify`, the state's `error` becomes the bound on the error of this call.
    """
    found, _ = blockwise_attention(
        q,
        k,
        v,
        State._make((*state, block, q.shape[2], k.shape[2])),
        threshold=threshold,
        block=block,
        bound=bound,  # type: ignore[arg-type]
        attn_mask=attn_mask,
        scale=default_scale(q, scale),
        kv_static=kv_static,
        certify=certify,
        keep=keep,
    )
    return found
