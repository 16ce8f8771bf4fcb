"""The table of where CachedAttention can pay: monotonic, 1 at the break-even, and printed whole."""

from __future__ import annotations

import pytest

from benchmarks import where_blocks_pay
from benchmarks.where_blocks_pay import ELEMENT, HEAD_SIZES, KEPT, KEYS, MACHINES, intensity, rows
from dit_rewrite.kernels.blockwise_attention import break_even_keys, speedup


def test_kept_tiles_break_even() -> None:
    """At the break-even a kept tile takes as long as attention; PixArt's 120 keys are below it on every machine."""
    for machine in MACHINES:
        keys = round(break_even_keys(ELEMENT, intensity(machine)))
        assert speedup(keys, keys, 64, ELEMENT, intensity(machine), 0.0, 1.0) == pytest.approx(1, rel=0.01)
        assert keys > 120
    assert intensity("H100") == pytest.approx(0.6 * 989 / 3.35)


def test_more_keys_and_more_kept_tiles_pay_more(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(rows())
    assert len(found) == len(MACHINES) * len(HEAD_SIZES) * len(KEYS)
    assert all(list(each) == sorted(each) and len(each) == len(KEPT) for *_, each in found)
    assert all(max(each) < 1 for _, _, keys, each in found if keys == 120)
    assert all(each[-1] > 1 for _, _, keys, each in found if keys == 4096)
    where_blocks_pay.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found) + len(MACHINES)
