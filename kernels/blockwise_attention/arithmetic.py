"""Roofline model of blockwise attention: a kernel takes the longer of its memory time and its compute time.

Per query row, with head size d, s bytes per element and M keys: attention takes 4 d M FLOPs and moves 2 d s bytes (it
reads q and writes the output; K and V are shared by many rows). In a tile that recomputes any block, a row loads or
stores every partial output with its two sums, d s + 8 bytes per block, reads q twice and q_ref once, and writes q_ref,
the merged output and the output: 6 d s. In a fully kept tile, a row reads q, q_ref and the merged output, and writes
the output: 4 d s.
"""

from __future__ import annotations

from dit_rewrite.errors import BadOpArgument

LEAST_BLOCK, MOST_BLOCKS = 512, 8  # where keys move; shorter blocks cost more to load than to compute
BLOCK_WORDS = 8  # bytes of the two float32 sums m and l per row and block


def block_size(keys: int, kv_static: bool) -> int:
    """Return the number of keys of a block where none is given.

    Keys that do not change are one block: of the partial outputs, which are as large as the output each, one is least,
    and conditions are rarely longer than the keys at which a block pays. Keys that move have at most `MOST_BLOCKS`.
    """
    return keys if kv_static else min(keys, max(LEAST_BLOCK, -(-keys // MOST_BLOCKS)))


def flops(batch: int, heads: int, queries: int, keys: int, head_size: int, kept: float = 0.0) -> int:
    """Return the FLOPs of both matrix products; a multiply-add counts as two.

    kept: the fraction of scores that are not recomputed, see `kept_fraction`. Raises BadParameter outside 0 to 1.
    """
    if not 0 <= kept <= 1:
        raise BadOpArgument("flops", "kept", kept, "a fraction from 0 to 1")
    scores = batch * heads * queries * keys
    return 4 * head_size * (scores - round(kept * scores))


def break_even_block(head_size: int, element_size: int, flops_per_byte: float) -> float:
    """Return the number of keys per block at which loading the partial output takes as long as recomputing it.

    flops_per_byte: FLOP/s of the device divided by its memory bandwidth in B/s.
    """
    return (head_size * element_size + BLOCK_WORDS) * flops_per_byte / (4 * head_size)


def break_even_keys(element_size: int, flops_per_byte: float) -> float:
    """Return the number of keys at which loading the output of a fully kept tile takes as long as attention."""
    return element_size * flops_per_byte


def speedup(
    keys: int, block: int, head_size: int, element_size: int, flops_per_byte: float, kept: float, whole: float = 0.0
) -> float:
    """Return the time of full attention divided by that of blockwise attention; below 1, reuse is slower.

    whole: the fraction of tiles that are fully kept. kept: the fraction of blocks kept in the other tiles.
    """
    vector = head_size * element_size
    compute = 4 * head_size * keys / flops_per_byte  # in units of the time of one byte
    blocks = -(-keys // block)
    busy = max((1 - kept) * compute, blocks * (vector + BLOCK_WORDS) + 6 * vector)
    return max(compute, 2 * vector) / (whole * 4 * vector + (1 - whole) * busy)
