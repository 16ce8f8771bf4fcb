"""Calibrate the share of tiles that each branch recomputes in a step (`TileReuse`): `calibrate_tiles`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.errors import BadParameter, TooFewSteps
from dit_rewrite.guards import step
from dit_rewrite.module import attach, twin, unwrapped
from dit_rewrite.passes.rewrite.tiles import TileCodec, tile_codec
from dit_rewrite.policies import TileReuse
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import ReuseTiles
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.image_metrics import mean_squared_error
from dit_rewrite.runtime.session import Observation

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # candidates, as multiples of the mean share
UNIFORM = FACTORS.index(1.0)


@dataclass(frozen=True)
class TileShares:
    """The calibrated policy, the share of each branch by name, and the weighted sum of the branches' errors: with these
    shares, and with the same share everywhere. ``error`` is at most ``uniform``."""

    policy: Policy
    shares: Mapping[str, float]
    error: float
    uniform: float


def calibrate_tiles(
    model: nn.Module,
    sample: Callable[[Any], object],
    refresh: float = 0.25,
    tile: int = 128,
    order: Literal["turns", "change"] = "turns",
    kinds: tuple[str, ...] = ("cross",),
    *,
    weights: Mapping[str, float] | None = None,
    backend: InnerBackend = "inductor",
) -> TileShares:
    """Return `TileReuse` with a share of its own for each branch, at no more FLOPs than with `refresh` everywhere.

    `sample` runs the sampler, for one or more pictures, with the denoiser that it takes; this run computes everything.
    Beside it, the slot of each branch is kept for several shares as a reusing run would keep it, and its mean squared
    distance from the computed value is averaged over the steps. All branches add to the residual stream, so their
    distances are in the same units. The shares give the least sum of these errors that a greedy search finds, or are
    all `refresh` if that is less. The error is that of the branches for exact inputs, and not of the image. `weights`
    has for each branch what its squared error costs, 1 by default.

    Takes the memory of a copy of the branches' outputs for each of 8 shares. Raises BadParameter, also if no branch can
    be computed in tiles, or TooFewSteps.
    """
    usual = TileReuse(refresh, tile, order, kinds)
    shares = tuple(dict.fromkeys(min(1.0, refresh * factor) for factor in FACTORS))
    made = Backend(unwrapped(model), usual, Lowering.of(backend), force=True)
    replays = Replays(made, shares, tile, order == "change")
    made.session.observer = replays.see
    with torch.no_grad():
        sample(attach(twin(model), made))
    if not replays.codecs:
        raise BadParameter("calibrate_tiles", "kinds", kinds, "kinds of branches that can be computed in tiles")
    if not replays.errors:
        raise TooFewSteps(1)
    places = list(replays.errors)
    errors = [[(weights or {}).get(p, 1.0) * statistics.fmean(each) for each in replays.errors[p]] for p in places]
    costs = [[replays.flops[p] * (1 - codec.saved) for codec in replays.codecs[p]] for p in places]
    chosen = choose(errors, costs)
    rules = tuple(
        Rule(step > 0, ReuseTiles(shares[i], tile, order), Where(kinds, names=escape(place)))
        for place, i in zip(places, chosen, strict=True)
    )
    return TileShares(
        Policy(rules, f"{usual.name} by branch"),
        {place: shares[i] for place, i in zip(places, chosen, strict=True)},
        _total(errors, chosen),
        _total(errors, [UNIFORM] * len(errors)),
    )


class Replays:
    """Keeps the slots of each branch for several shares, beside a run that computes everything."""

    def __init__(self, backend: Backend, shares: Sequence[float], tile: int, by_change: bool) -> None:
        self.codecs: dict[str, list[TileCodec]] = {}
        self.flops: dict[str, int] = {}
        self.errors: dict[str, list[list[float]]] = {}
        self._backend, self._shares, self._tile, self._by_change = backend, shares, tile, by_change
        self._slots: dict[Hashable, list[tuple[Tensor, ...]]] = {}
        self._trajectory: int | None = None

    def see(self, observation: Observation) -> None:
        """Replay a call, whose slots contain the values that it computed."""
        record, rewritten = observation.record, self._backend.rewritten[observation.graph]
        if record.trajectory != self._trajectory:
            self._slots, self._trajectory = {}, record.trajectory
        for number, (index, slot) in enumerate(zip(rewritten.reached, observation.slots, strict=True)):
            if slot is None:
                continue
            site, codec = rewritten.found.sites[index], rewritten.bound.formats[index][0]
            assert isinstance(codec, TileCodec)
            self.flops[site.place] = site.flops
            self.codecs[site.place] = codecs = self._codecs(slot[0].shape[codec.dim], codec.dim)
            self._replay(site.place, (record.stream, observation.position, number), codecs, slot[0])

    def _codecs(self, tokens: int, dim: int) -> list[TileCodec]:
        return [tile_codec(tokens, dim, self._tile, share, self._by_change) for share in self._shares]

    def _replay(self, place: str, key: Hashable, codecs: Sequence[TileCodec], value: Tensor) -> None:
        if key not in self._slots:
            self._slots[key] = [codec.encode(value, ()) for codec in codecs]
            return
        by_share = self.errors.setdefault(place, [[] for _ in codecs])
        for codec, slot, errors in zip(codecs, self._slots[key], by_share, strict=True):
            chosen, rows = codec.choose(slot)
            kept = codec.update(slot, chosen, rows, value.index_select(codec.dim, rows))
            errors.append(mean_squared_error(kept, value))


def choose(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> list[int]:
    """Return a candidate for each branch with a small sum of `errors`, at no more than the costs of `UNIFORM` for all.

    Starts with the cheapest ones, and takes the change with the most gain for its cost while one fits. If `UNIFORM` for
    all has a smaller sum, it is the result.
    """
    everywhere = [UNIFORM] * len(errors)
    budget = _total(costs, everywhere) * (1 + 1e-9)
    picked = [min(range(len(row)), key=row.__getitem__) for row in costs]
    while moves := list(_moves(errors, costs, picked, budget)):
        _, branch, candidate = max(moves)
        picked[branch] = candidate
    return min(picked, everywhere, key=lambda row: _total(errors, row))


def _moves(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], picked: Sequence[int], budget: float
) -> Iterator[tuple[float, int, int]]:
    """Yield the changes that reduce the sum of errors within the budget: the gain for the cost, branch, candidate."""
    left = budget - _total(costs, picked)
    for branch, now in enumerate(picked):
        for candidate, (error, cost) in enumerate(zip(errors[branch], costs[branch], strict=True)):
            gain, more = errors[branch][now] - error, cost - costs[branch][now]
            if gain > 0 and more <= left:
                yield (gain / more if more > 0 else math.inf), branch, candidate


def _total(table: Sequence[Sequence[float]], row: Sequence[int]) -> float:
    return sum(values[i] for values, i in zip(table, row, strict=True))
