"""The op `dit_rewrite::blockwise_attention`: plain PyTorch on a CPU, Triton on a GPU, opaque to the compiler."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from dit_rewrite.kernels import checks
from dit_rewrite.kernels.blockwise_attention import plain
from dit_rewrite.kernels.blockwise_attention.certificate import certified_error
from dit_rewrite.kernels.blockwise_attention.moving import measure_keys, move_keys
from dit_rewrite.kernels.blockwise_attention.state import WHERE, State, check_inputs, check_state
from dit_rewrite.kernels.scores import default_scale

if __name__ != "dit_rewrite.kernels.blockwise_attention.op":
    raise ImportError("Import dit_rewrite.kernels: under another name its ops would be registered a second time.")

BOUNDS = ("paper", "sound")
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!)[] state, Tensor? attn_mask, float threshold, int block, str bound, "
    "float scale, bool kv_static, bool certify) -> (Tensor, Tensor)"
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
) -> tuple[Tensor, Tensor | None]:
    """Attention that recomputes a (query tile, key block) only if its scores may have changed by more than a threshold.

    q is (B, H, N, d), k and v are (B, H, M, d), d from 16 to 256, in float16, bfloat16 or float32, of any strides. The
    output is shaped as q. `state` comes from `new_state` with the same block and kv_static, and is changed in place; no
    call waits for the device.

    - bound="sound": the estimate is a true bound on |change of a score|, in units of the softmax's exponent, since
      that pair's last recompute. bound="paper": equation 14 of CachedAttention as printed (no scale, may be negative).
    - threshold: a pair is kept if its estimate is at most this. inf keeps whatever is cached and finite, -inf
      recomputes all, and 0 with "sound" is plain attention within rounding. A pair's first call always computes.
    - attn_mask: bool (True takes part) or additive, broadcastable to (B, H, N, M). It and `scale` (default 1 / sqrt(d))
      must be the same in every call of a state.
    - kv_static=True: k and v are those of `new_state`; trusted. False: their change is measured and enters the bound,
      a change of V relative to the greatest |V|; needs bound="sound", as equation 14 knows no change of K.
    - certify: also return, for each query tile, a bound on max |output - exact attention|, float32 (B, H, T), rounding
      included (see certificate.py); else None.

    A wholly masked row gives 0, as PyTorch's attention does. Raises BadParameter.
    """
    scale = default_scale(q, scale)
    _check(q, k, v, state, attn_mask, threshold, block, bound, scale, kv_static)
    options = (attn_mask, float(threshold), block, bound, float(scale), kv_static, certify)
    out, error = _op(q, k, v, state.tensors, *options)
    return out, error if certify else None


@torch.library.custom_op(
    "dit_rewrite::blockwise_attention", mutates_args=("state",), device_types="cpu", schema=_SCHEMA
)
def _op(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    return run(plain, q, k, v, state, *options)


@_op.register_kernel("cuda")
def _cuda(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    from dit_rewrite.kernels.blockwise_attention import triton_kernel

    return run(triton_kernel, q, k, v, state, *options)


@_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    certify = options[-1]
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
) -> tuple[Tensor, Tensor]:
    """One call, by the `estimate` and `attend` of the module `device`: `plain` or `triton_kernel`."""
    state = State._make((*tensors, block, q.shape[2], k.shape[2]))
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    keys = None if kv_static else measure_keys(state, k, v)
    decision = device.estimate(q, k, state, keys, threshold, scale, bound == "paper")
    out = device.attend(q, k, v, mask, state, decision, scale)
    if keys is not None:
        move_keys(state, decision, keys, k, v)
    if not certify:
        return out, q.new_empty((0,), dtype=torch.float32)
    return out, certified_error(state, decision, keys, q, scale)


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
) -> None:
    check_inputs(q, k, v, block)
    check_state(state, q, k, block, kv_static)
    checks.require(not math.isnan(threshold), WHERE, "threshold", threshold, "a number, inf or -inf")
    checks.require(math.isfinite(scale), WHERE, "scale", scale, "a finite number")
    allowed = BOUNDS if kv_static else BOUNDS[1:]
    checks.require(bound in allowed, WHERE, "bound", bound, f"one of {allowed} with kv_static={kv_static}")
    checks.attention_mask(WHERE, attn_mask, q, (*q.shape[:3], k.shape[2]))
