"""Which tiles a step recomputes, and what it leaves in the slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_rewrite.passes.rewrite.tiles import TileCodec, tile_codec


def steps(codec: TileCodec, fresh: list[Tensor]) -> tuple[list[list[int]], Tensor]:
    """Return the tiles that each step recomputes, and the value at the end, if the full values would be `fresh`."""
    stored, chosen = codec.encode(fresh[0], ()), []
    for value in fresh[1:]:
        tiles, rows = codec.choose(stored)
        result = codec.update(stored, tiles, rows, value.index_select(codec.dim, rows))
        assert result.data_ptr() == stored[0].data_ptr() != fresh[0].data_ptr()
        chosen.append(tiles.tolist())
    return chosen, stored[0]


@pytest.mark.parametrize(
    ("tokens", "most", "refresh", "tile", "tiles", "count"),
    [
        (4096, 128, 0.25, 128, 32, 8),
        (4032, 128, 0.1, 126, 32, 4),  # 128 does not divide the tokens
        (64, 128, 0.25, 16, 4, 1),  # the share is less than a tile
        (64, 128, 1, 32, 2, 2),
        (64, 128, 0.01, 1, 64, 1),
        (13, 4, 0.5, 1, 13, 7),
        (10, 1, 0.1, 1, 10, 1),  # 0.1 * 10 is exactly 1
    ],
)
def test_sizes(tokens: int, most: int, refresh: float, tile: int, tiles: int, count: int) -> None:
    assert tile_codec(tokens, 1, most, refresh, False) == TileCodec(1, tile, tiles, count, False)


def test_turns() -> None:
    """Each step takes the next tiles, also around the end; a token is that of the step that computed it."""
    codec = TileCodec(1, 2, 5, 2, by_change=False)
    chosen, value = steps(codec, [torch.full((3, 10, 4), float(i)) for i in range(5)])
    assert chosen == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert value[1, :, 2].tolist() == [3, 3, 4, 4, 4, 4, 2, 2, 3, 3]
    assert codec.longest == 3


def test_those_that_change_most() -> None:
    """After a round the changes are known: tile 2 changes by 1 in each step, the others by 0.1."""
    codec = TileCodec(0, 1, 4, 1, by_change=True)
    speed = torch.tensor([0.1, 0.1, 1.0, 0.1])[:, None]
    chosen, value = steps(codec, [speed * i for i in range(20)])
    order = [tile for (tile,) in chosen]
    assert order[:4] == [0, 1, 2, 3]
    assert order[4:].count(2) > 7 and set(order[4:]) == {0, 1, 2, 3}
    assert torch.equal(value[2], speed[2] * 19)


@pytest.mark.parametrize("by_change", [False, True])
def test_no_tile_waits_longer(by_change: bool) -> None:
    """Whatever changes, also where most tiles never do."""
    generator = torch.Generator().manual_seed(0)
    for tiles, count in ((7, 1), (7, 3), (8, 2), (5, 4), (3, 3)):
        codec = TileCodec(0, 1, tiles, count, by_change)
        moves = torch.randn(60, tiles, 1, generator=generator) * (torch.arange(tiles) < 2)[:, None]
        chosen, _ = steps(codec, list(moves.cumsum(0)))
        last = dict.fromkeys(range(tiles), 0)
        for step, each in enumerate(chosen, 1):
            assert len(set(each)) == len(each) == count
            last.update(dict.fromkeys(each, step))
            assert step - min(last.values()) <= codec.longest - 1


def test_all_tiles_are_in_order() -> None:
    """With refresh=1 nothing is left of earlier steps, and products have their rows in the usual order."""
    for by_change in (False, True):
        codec = tile_codec(8, 0, 128, 1.0, by_change)
        fresh = [torch.randn(8, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        chosen, value = steps(codec, fresh)
        assert chosen == [[0, 1]] * 2 and torch.equal(value, fresh[-1])
