"""Registration of `dit_rewrite::blockwise_attention`: the naive reference on a CPU, Triton on CUDA."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention import naive
from dit_rewrite.kernels.blockwise_attention.certificate import certified_error
from dit_rewrite.kernels.blockwise_attention.dynamic_kv import measure_kv_change, only_unmoved, update_kv_references
from dit_rewrite.kernels.blockwise_attention.state import NAME, State, check_inputs, check_state
from dit_rewrite.kernels.common import checks
from dit_rewrite.kernels.common.scores import default_scale

if __name__ != "dit_rewrite.kernels.blockwise_attention.op":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")

BOUNDS = ("paper", "sound")
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!)[] state, Tensor? attn_mask, float threshold, int block, str bound, "
    "float scale, bool kv_static, bool certify, int? keep=None) -> (Tensor, Tensor)"
)


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    threshold: float,
    block: int,
    bound: Literal["paper", "sound"],
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    kv_static: bool = True,
    certify: bool = False,
    keep: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention, recomputing only the (query tile, key block) pairs whose scores may have changed too much.

    q is (B, H, N, d), k and v are (B, H, M, d), with d from 16 to 256, in float16, bfloat16 or float32, of any strides.
    The first result is the output, with the shape and dtype of q. `state` comes from `new_state` with the same block
    and kv_static, and is updated in place. No call synchronises with the device.

    - threshold: a pair is kept if its estimate is at most this. inf keeps every cached pair with a finite estimate,
      -inf recomputes all pairs, and 0 with bound="sound" equals attention up to rounding. A pair's first call computes.
    - bound="sound": the estimate is an upper bound on |change of a score| since the pair's last recompute, in units of
      the exponent of the softmax. bound="paper": equation 14 of CachedAttention as printed (no scale, may be negative).
      Both are about the change of the queries; a state with `own_queries` has it exactly, others bound it.
    - attn_mask: bool (True takes part) or additive, broadcastable to (B, H, N, M). The mask and `scale` (default
      1 / sqrt(d)) must be the same in every call with one state.
    - kv_static=True: the caller guarantees that k and v are those passed to `new_state`. False: their change is
      measured and added to the bound, the change of V relative to the greatest |V|. This needs bound="sound", because
      equation 14 does not cover a change of K. With `keep` it is allowed: blocks that moved at all are recomputed.
    - certify: the second result is a bound on max |output - exact attention| of each query tile, (B, H, T) float32,
      which includes rounding (see certificate.py). Its greatest number is left in `state.error`. Otherwise it is None.

    - keep: that of the state. Only blocks within this many leading keys may be kept.

    Fully masked rows give 0, as in PyTorch's attention. Raises BadOpArgument.
    """
    scale = default_scale(q, scale)
    _check(q, k, v, state, attn_mask, threshold, block, bound, scale, kv_static, keep)
    options = (attn_mask, float(threshold), block, bound, float(scale), kv_static, certify, keep)
    out, error = _op(q, k, v, state.tensors, *options)
    return out, error if certify else None


@torch.library.custom_op(
    "dit_rewrite::blockwise_attention", mutates_args=("state",), device_types="cpu", schema=_SCHEMA
)
def _op(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    return run(naive, q, k, v, state, *options)


@_op.register_kernel("cuda")
def _cuda(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    from dit_rewrite.kernels.blockwise_attention import triton_kernel

    return run(triton_kernel, q, k, v, state, *options)


@_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    certify = options[6]
    return torch.empty_like(q), q.new_empty(state[3].shape[:3] if certify else (0,), dtype=torch.float32)


def run(
    device: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    attn_mask: Tensor | None,
    threshold: float,
    block: int,
    bound: str,
    scale: float,
    kv_static: bool,
    certify: bool,
    keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one call with `estimate` and `attend` of the module `device`, which is `naive` or `triton_kernel`."""
    state = State._make((*tensors, block, q.shape[2], k.shape[2]))
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    kv_change = None if kv_static else measure_kv_change(state, k, v)
    if keep is not None:
        state.computed[..., -1] = False  # the keys behind the kept ones
        kv_change = only_unmoved(kv_change) if bound == "paper" and kv_change is not None else kv_change
    decision = device.estimate(q, k, state, kv_change, threshold, scale, bound == "paper")
    out = device.attend(q, k, v, mask, state, decision, scale)
    if kv_change is not None:
        update_kv_references(state, decision, kv_change, k, v)
    if not certify:
        return out, q.new_empty((0,), dtype=torch.float32)
    error = certified_error(state, decision, kv_change, q, scale)
    state.error.copy_(error.amax())
    return out, error


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    attn_mask: Tensor | None,
    threshold: float,
    block: int,
    bound: str,
    scale: float,
    kv_static: bool,
    keep: int | None,
) -> None:
    check_inputs(q, k, v, block, keep)
    check_state(state, q, k, block, kv_static, keep)
    checks.require(not math.isnan(threshold), NAME, "threshold", threshold, "a number, inf or -inf")
    checks.require(math.isfinite(scale), NAME, "scale", scale, "a finite number")
    allowed = BOUNDS if kv_static or keep is not None else BOUNDS[1:]
    checks.require(bound in allowed, NAME, "bound", bound, f"one of {allowed} with kv_static={kv_static}")
    checks.require_attention_mask(NAME, attn_mask, q, (*q.shape[:3], k.shape[2]))
