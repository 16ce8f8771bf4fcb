"""Attention that reuses the partial results of key blocks whose scores hardly changed (CachedAttention).

An error bound can be computed for each call (`certify=True`, see certificate.py).

When reuse is faster: for each row, a kept block still loads its partial output, d values and two sums, which are
2 d + 8 bytes at 16 bits per value. Recomputing a block of b keys takes 4 d b FLOPs. An H200 has 4.8 TB/s and
990 TFLOP/s (dense bfloat16), so it computes 206 FLOPs per byte loaded at peak, and 125 if attention reaches
600 TFLOP/s.

- Keeping a block is faster only if the block has more than (2 + 8 / d) * 206 / 4 = 110 keys (66 at 600 TFLOP/s) for
  d = 64. Blocks of 64 keys are always slower at peak. Larger blocks are better because there are fewer partial outputs.
- A fully kept tile moves one merged output (8 d bytes in all) instead of computing 4 d M FLOPs. It is faster only if
  there are more than 2 * 206 = 412 keys (250 at 600 TFLOP/s); below that, memory traffic dominates attention itself.

Speedup of the whole op by `arithmetic.speedup` (d = 64, bfloat16; first at peak, then at 600 TFLOP/s):

    keys   block   90 % of blocks kept    and half the tiles fully kept   all kept
     120     120       0.28   0.28              0.36   0.36              0.50   0.50
     300     300       0.41   0.68              0.53   0.87              0.73   1.20
    1024     256       0.97   1.60              1.39   2.30              2.48   4.10
    4096     128       0.99   1.64              1.81   2.98              9.93  16.38
    4096     512       2.74   4.52              4.29   7.08              9.93  16.38

Cross-attention over the text of PixArt (120 or 300 tokens) therefore gains nothing from blockwise reuse on such a
device; reuse the whole branch with its projections instead. Conditions of 1000 tokens or more gain. Where keys and
values move (joint attention, self-attention), measuring their change takes more launches than attention has, so it is
refused on CUDA.
"""

from dit_rewrite.kernels.blockwise_attention.arithmetic import (
    block_size,
    break_even_block,
    break_even_keys,
    flops,
    speedup,
)
from dit_rewrite.kernels.blockwise_attention.op import blockwise_attention
from dit_rewrite.kernels.blockwise_attention.state import State, kept_fraction, new_state, reset, state_bytes

__all__ = [
    "State",
    "block_size",
    "blockwise_attention",
    "break_even_block",
    "break_even_keys",
    "flops",
    "kept_fraction",
    "new_state",
    "reset",
    "speedup",
    "state_bytes",
]
