"""One step of attention in Triton: scores, mask, online softmax, and the product with the values."""

# Arguments of Triton kernels have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from dit_rewrite.kernels.common.heads import load_pieces, masked, products


@triton.jit
def attend(
    acc, acc_tail, largest, total, q, q_tail, key, value, mask, row_valid, token, at, real, seen, scale, k_row, k_dim,
    v_row, v_dim, m_col, MODE: tl.constexpr, KIND: tl.constexpr, ONE_ROW: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Advance the online softmax by the keys `token` + `at`. The sums are relative to `largest`, in units of log 2.

    With MODE 0 all rows see all these keys. Otherwise keys that are not `real` are not read, and `seen`, which expands
    to the scores, says which row sees which key.
    """
    here = tl.cast(token, tl.int64)
    masks: tl.constexpr = MODE != 0
    k, k_tail = load_pieces(key + here * k_row, at[None, :] * k_row, 0, k_dim, real[None, :], D, D1, D2, masks)
    v, v_tail = load_pieces(value + here * v_row, at[:, None] * v_row, 1, v_dim, real[:, None], D, D1, D2, masks)
    scores = products(q, q_tail, k, k_tail, D2)
    if KIND > 0:
        columns = (token + at)[None, :]
        valid = real[None, :] if ONE_ROW else row_valid & real[None, :]
        scores = masked(scores, scale, mask + columns.to(tl.int64) * m_col, valid, KIND)
    if MODE != 0:
        scores = tl.where(seen, scores, float("-inf"))
    factor = 1.0 if KIND == 2 else scale
    new = tl.maximum(largest, tl.max(scores, 1) * factor)
    base = new
    if MODE != 0 or KIND > 0:
        base = tl.where(new == float("-inf"), 0.0, new)  # only masked keys so far: avoid -inf - -inf
    p = tl.exp2(scores * factor - base[:, None])
    decay = tl.exp2(largest - base)
    total = total * decay + tl.sum(p, 1)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * decay[:, None], input_precision="ieee")
    if D2 > 0:
        acc_tail = tl.dot(p, v_tail, acc_tail * decay[:, None], input_precision="ieee")
    return acc, acc_tail, new, total
