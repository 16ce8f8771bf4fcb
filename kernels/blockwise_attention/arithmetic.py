"""Where keeping blocks pays: bytes against FLOPs, by a roofline (a kernel takes the longer of its two times).

Per query row, with head size d, s bytes per element and M keys in blocks: attention is 4 d M FLOPs and 2 d s bytes (q
in, output out; K and V are shared by many rows). A row of a tile that recomputes anything stores or loads every
partial output and both its sums, d s + 8 bytes per block, reads q twice and q_ref, and writes q_ref, the merged and
the output: 6 d s. A row of a wholly kept tile reads q, q_ref and the merged output, and writes the output: 4 d s.
"""

from __future__ import annotations

from dit_rewrite.errors import BadParameter

BLOCK_WORDS = 8  # bytes of m and l per row and block


def flops(batch: int, heads: int, queries: int, keys: int, head_size: int, kept: float = 0.0) -> int:
    """FLOPs of both products, a multiply-add counted as two; `kept`: the fraction of scores kept, see kept_fraction."""
    if not 0 <= kept <= 1:
        raise BadParameter("flops", "kept", kept, "a fraction from 0 to 1")
    scores = batch * heads * queries * keys
    return 4 * head_size * (scores - round(kept * scores))


def break_even_block(head_size: int, element_size: int, flops_per_byte: float) -> float:
    """Keys a block must have so that loading its partial output takes no longer than recomputing it.

    flops_per_byte: what the device computes while it loads a byte, FLOP/s over B/s.
    """
    return (head_size * element_size + BLOCK_WORDS) * flops_per_byte / (4 * head_size)


def break_even_keys(element_size: int, flops_per_byte: float) -> float:
    """Keys that attention must have so that loading a wholly kept tile's output takes no longer than attending."""
    return element_size * flops_per_byte


def speedup(
    keys: int, block: int, head_size: int, element_size: int, flops_per_byte: float, kept: float, whole: float = 0.0
) -> float:
    """Attention's time over that of blockwise attention; below 1 it loses.

    whole: the fraction of tiles that are wholly kept. kept: the fraction of blocks kept in the others.
    """
    vector = head_size * element_size
    compute = 4 * head_size * keys / flops_per_byte  # all times in those of a byte
    blocks = -(-keys // block)
    busy = max((1 - kept) * compute, blocks * (vector + BLOCK_WORDS) + 6 * vector)
    return max(compute, 2 * vector) / (whole * 4 * vector + (1 - whole) * busy)
