"""Where CachedAttention can be faster than attention, by arithmetic: python -m benchmarks.where_blocks_pay

Each figure is the time of full attention over that of blockwise attention (arithmetic.py of the op), for
constant keys in one block, by the share of query tiles that are kept. Attention is taken to reach 60 % of the machine's
dense 16-bit peak, and memory its full bandwidth. Below 1, blockwise attention is slower. The number of queries cancels
out, as each row of queries costs the same in both; launches and the decision itself are not counted, so the figures are
upper bounds. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator

from dit_rewrite.kernels.blockwise_attention import block_size, break_even_keys, speedup

MACHINES = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}  # FLOP/s, bytes/s
REACHED = 0.6  # share of the peak that attention reaches
KEYS = (120, 300, 512, 1024, 4096)
KEPT = (0.5, 0.9, 1.0)
HEAD_SIZES = (64, 72, 128)
ELEMENT = 2  # bytes


def intensity(machine: str) -> float:
    """Return the FLOPs that attention does in the time of loading one byte."""
    flops, bandwidth = MACHINES[machine]
    return REACHED * flops / bandwidth


def rows() -> Iterator[tuple[str, int, int, tuple[float, ...]]]:
    """Yield machine, head size, keys, and the speedup for each share of `KEPT`."""
    for machine in MACHINES:
        for size in HEAD_SIZES:
            for keys in KEYS:
                block = block_size(keys, kv_static=True)
                each = (speedup(keys, block, size, ELEMENT, intensity(machine), 0.0, whole) for whole in KEPT)
                yield machine, size, keys, tuple(each)


def main() -> None:
    """Print the table, and from how many keys a fully kept tile is faster."""
    print(f"| machine | head size | keys | {' | '.join(f'{kept:.0%} of tiles kept' for kept in KEPT)} |")
    print(f"|---|---:|---:|{'---:|' * len(KEPT)}")
    for machine, size, keys, found in rows():
        print(f"| {machine} | {size} | {keys} | {' | '.join(f'{each:.2f}' for each in found)} |")
    for machine in MACHINES:
        print(f"{machine}: a kept tile is faster from {break_even_keys(ELEMENT, intensity(machine)):.0f} keys")


if __name__ == "__main__":
    main()
