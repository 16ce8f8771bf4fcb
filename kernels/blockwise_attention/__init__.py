"""Attention that keeps the partial results of key blocks whose scores hardly changed (CachedAttention), with a proof.

Where that pays is arithmetic. A kept block of a row still loads its partial output: d values and two sums, 2 d + 8
bytes in 16 bits. Recomputing it for b keys takes 4 d b FLOPs. An H200 has 4.8 TB/s and 990 TFLOP/s (dense bfloat16):
206 FLOPs in the time of a byte at its peak, 125 where attention reaches 600 TFLOP/s.

- A block pays only if it has more than (2 + 8 / d) * 206 / 4 = 110 keys (66 at 600 TFLOP/s), however many are kept, and
  for any head size. Blocks of 64 always lose at the peak. Larger blocks are better: the partial outputs are fewer.
- A wholly kept tile loads one merged output (8 d bytes in all) instead of 4 d M FLOPs: it pays only if attention has
  more than 2 * 206 = 412 keys (250). Up to there attention hardly costs more than its own reads and writes.

Speedups of the whole op by `arithmetic.speedup` (d = 64, bfloat16; first at the peak, then at 600 TFLOP/s):

    keys   block   90 % of blocks kept    so, and half the tiles wholly   all kept
     120     120       0.28   0.28              0.36   0.36              0.50   0.50
     300     300       0.41   0.68              0.53   0.87              0.73   1.20
    1024     256       0.97   1.60              1.39   2.30              2.48   4.10
    4096     128       0.99   1.64              1.81   2.98              9.93  16.38
    4096     512       2.74   4.52              4.29   7.08              9.93  16.38

So the text of PixArt (120 or 300 tokens) never pays for itself by blocks on such a device: there reuse the whole
branch, projections included. Conditions of 1000 tokens and more, joint and self-attention do, with blocks of 256 to
1024 keys.
"""

from dit_rewrite.kernels.blockwise_attention.arithmetic import break_even_block, break_even_keys, flops, speedup
from dit_rewrite.kernels.blockwise_attention.op import blockwise_attention
from dit_rewrite.kernels.blockwise_attention.state import State, kept_fraction, new_state, reset, state_bytes

__all__ = [
    "State",
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
