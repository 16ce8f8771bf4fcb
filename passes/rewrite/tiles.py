"""Tiles of tokens: the choice of those that a step recomputes, and the contents of the slot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.passes.rewrite.codec import inline
from dit_rewrite.passes.rewrite.rows import RowWriter, find_tokens


@dataclass(frozen=True)
class TileCodec:
    """The slot of a value of which each reusing step recomputes ``count`` of ``tiles`` tiles, in place.

    The tokens are in dimension ``dim``; a tile has ``tile`` of them. The slot stores the value and the state of
    `choose`. If ``by_change`` is False, that is the first tile of the next step, so that tiles take turns; otherwise,
    for each tile, its mean absolute change per step when it was last recomputed, and the number of steps since then.
    The batch shares its tiles. The host reads nothing.
    """

    dim: int
    tile: int
    tiles: int
    count: int
    by_change: bool

    @property
    def saved(self) -> float:
        """The share of the tokens that a reusing step does not compute."""
        return 1 - self.count / self.tiles

    @property
    def longest(self) -> int:
        """The number of steps after which a tile is recomputed in any case. No step has more such tiles than `count`,
        since each step recomputes that many, and at first the tiles take turns."""
        rounds = -(-self.tiles // self.count)
        return 2 * rounds if self.by_change else rounds

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return False

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return a copy of the value, because the next steps change it, and the state of the choice."""
        if not self.by_change:
            return value.clone(), value.new_zeros(1, dtype=torch.int64)
        unknown = value.new_full((self.tiles,), torch.inf, dtype=torch.float32)
        return value.clone(), unknown, value.new_zeros(self.tiles, dtype=torch.int64)

    def decode(self, stored: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return stored[0]

    def choose(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the indices of the tiles to recompute in this step, and those of their tokens."""
        every = torch.arange(self.tiles, device=stored[0].device)
        if self.count == self.tiles:
            chosen = every
        elif not self.by_change:
            chosen = (stored[1] + every[: self.count]) % self.tiles
        else:
            change, age = stored[1], stored[2] + 1
            expected = torch.where(age >= self.longest, torch.inf, change * age)
            order = expected.sort(descending=True, stable=True)[1]  # NaN comes first
            chosen = order[: self.count].sort()[0]
        tokens = torch.arange(self.tile, device=stored[0].device)
        return chosen, (chosen[:, None] * self.tile + tokens).flatten()

    def update(self, stored: Sequence[Tensor], chosen: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
        """Write the `fresh` tokens and the state of the choice into the slot in place, and return the value."""
        if not self.by_change:
            value, first = stored
            first.copy_((first + self.count) % self.tiles)
            return value.index_copy_(self.dim, rows, fresh)
        value, change, age = stored
        now = age + 1
        moved = (fresh.float() - value.index_select(self.dim, rows).float()).abs().movedim(self.dim, 0)
        means = moved.reshape(self.count, -1).mean(1) / now.index_select(0, chosen)
        change.index_copy_(0, chosen, means)
        age.copy_(now.index_fill(0, chosen, 0))
        return value.index_copy_(self.dim, rows, fresh)


def tile_codec(tokens: int, dim: int, most: int, refresh: float, by_change: bool) -> TileCodec:
    """Return the codec for a value of that many tokens: tiles of at most `most` that divide the tokens, and that are
    small enough for the share `refresh` of them to be at least one."""
    share = Fraction(str(refresh))
    largest = max(1, min(most, int(tokens * share), tokens // 2))
    tile = next(size for size in range(largest, 0, -1) if tokens % size == 0)
    tiles = tokens // tile
    return TileCodec(dim, tile, tiles, -(-tiles * share.numerator // share.denominator), by_change)


def write_tiles(
    graph: fx.Graph,
    codec: TileCodec,
    value: fx.Node,
    inside: Collection[str],
    stored: Sequence[fx.Node],
    env: Mapping[Any, fx.Node],
    position: Mapping[fx.Node, int],
    copied: bool,
) -> fx.Node:
    """Append to `graph` the nodes that recompute some tiles of `value`, whose slot is `stored`, and return its node.

    `inside` are the names of the nodes that only the value depends on. `env` maps other nodes to nodes of `graph`.
    `copied`: another slot takes the value too, and must not share the memory that later steps change.
    The choice of the tiles comes before all nodes of the captured graph, and the slot is written after the value.
    """
    closure = [node for node in value.graph.nodes if node.name in inside]
    tokens, home = find_tokens(value, closure), position[value]
    assert tokens is not None, f"{value.name} mixes tokens and should have been refused"
    chosen, rows = inline(graph, lambda *held: codec.choose(held), stored, -1, home)
    writer = RowWriter(graph, env, position, home, rows, codec.count * codec.tile)
    fresh = writer.write(value, closure, tokens)
    width = len(stored)
    arguments = [*stored, chosen, rows, fresh]
    update = (lambda *t: codec.update(*t).clone()) if copied else codec.update
    (updated,) = inline(graph, lambda *t: (update(t[:width], *t[width:]),), arguments, home, home)
    return updated
