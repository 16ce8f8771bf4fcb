"""Measurements for guards: how much a probe has changed since a site was last computed.

Measurements stay on the device until a guard reads them. With a lag of one call they are copied to the host
asynchronously.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_rewrite.runtime.spectral import Grid, on_grid, sea_filter

Distance = Callable[[Tensor, Tensor], Tensor]  # (now, before) -> relative L1 change, a 0-d tensor


class Measured(NamedTuple):
    """A measured symbol that a site's guard, or its weights, read.

    statistic: "similarity" (relative L1 change of the probe since the site was last computed), "drift" (sum of the
    relative L1 changes from call to call since then), or "advance" (the probe's change since the site was last
    computed, over its change between the two last computed calls). wire: the wire of the probe.
    rescale: coefficients, highest power first, of a polynomial that is applied to each change; or "rate", which
    multiplies each change by the last known ratio of the output's relative change to the probe's change (EasyCache).
    output: the wire of the model's output, if it is read. grid: if given, the probe is filtered by the noise of its
    step (SeaCache).
    """

    symbol: str
    statistic: str
    wire: int
    rescale: tuple[float, ...] | Literal["rate"] | None = None
    output: int | None = None
    grid: Grid | None = None

    @property
    def late(self) -> bool:
        """Whether the probe is the output of the call, so that only later calls can read the measurement."""
        return self.wire == self.output

    @property
    def place(self) -> tuple[int, Grid | None]:
        """The key of the probe: symbols with the same wire and grid share it."""
        return self.wire, self.grid


@dataclass(frozen=True)
class ForecastError:
    """A symbol that a site's guard reads: the largest error of the forecasts of these sites, each when it was computed
    last; the ratio of the means, or the mean of the ratios."""

    sites: tuple[int, ...]
    elementwise: bool = False


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Evaluate a polynomial, highest power first, in float64. NaN and inf in `x` always propagate."""
    x = x.double()
    value = x * 0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def mean_change(now: Tensor, before: Tensor) -> Tensor:
    """Return the mean absolute change as a 0-d tensor, computed in float32 (float64 for float64)."""
    dtype = torch.promote_types(now.dtype, torch.float32)
    return (now.to(dtype) - before.to(dtype)).abs().mean()


class Number:
    """A measurement on the device. With `ahead`, a copy to the host starts at once, without waiting for it."""

    def __init__(self, tensor: Tensor, ahead: bool) -> None:
        self.tensor = tensor
        self._host: Tensor | None = None
        if ahead and tensor.is_cuda:
            self._host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> float:
        """Return the number. With `ahead`, this waits for the copy only, not for work that was queued later."""
        if self._host is None:
            return float(self.tensor.item())
        self._arrived.synchronize()
        return float(self._host)


@dataclass(frozen=True)
class Track:
    """The state of one measured symbol of a site.

    reference: the probe when the site was last computed. value: the measurement up to the last call. For "drift" it is
    the sum of the changes; for "similarity" it is kept only with a lag, or if the probe is the output of the calls,
    where it is the change between the last two computed calls.
    """

    reference: Tensor
    value: Number | None = None
    output: Tensor | None = None  # the output of the last computed call, for a rate
    rate: Tensor | None = None  # relative change of that output over the change of the probe
    before: Tensor | None = None  # the probe of the last computed call but one, for an advance

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.reference, self.before, self.output) if tensor is not None)


@dataclass
class Tracked:
    """The tracks of a cache by site and symbol, the last value of each probe, and of each site whose forecasts are
    compared the error when it was computed last: the ratio of the means, or the mean of the ratios."""

    tracks: dict[tuple[int, str], Track] = field(default_factory=dict)
    errors: dict[tuple[int, bool], Number] = field(default_factory=dict)
    last: dict[tuple[int, Grid | None], Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are kept for comparison."""
        return (*(t for track in self.tracks.values() for t in track.tensors), *self.last.values())

    def error(self, asked: ForecastError) -> float | None:
        """The largest of the errors that are asked for; None where one of them is not known, NaN where one is."""
        found = [self.errors.get((site, asked.elementwise)) for site in asked.sites]
        numbers = [number.read() for number in found if number is not None]
        if not numbers or len(numbers) < len(found):
            return None
        return math.nan if any(map(math.isnan, numbers)) else max(numbers)


class Meter:
    """The measurements of one call.

    wires: the values of the wires so far (see segments.py). lag: with 0, a guard reads the change up to this call; with
    1, the change up to the previous call, which is the same number one call later.
    """

    def __init__(
        self,
        tracked: Tracked,
        sites: Sequence[tuple[Measured, ...]],
        wires: Sequence[Tensor | None],
        num_inputs: int,
        lag: int,
        distance: Distance,
        noise: float | None = None,
    ) -> None:
        """Create the meter of a call. `noise` is the share of noise at its step; None means unknown."""
        self._tracked, self._sites, self._wires, self._num_inputs = tracked, sites, wires, num_inputs
        self._lag, self._distance = lag, distance
        self._noise = noise
        self._filtered: dict[tuple[int, Grid | None], Tensor | None] = {}
        self._known: dict[tuple[Distance, int, int], tuple[Tensor, ...]] = {}  # with the tensors: their ids are in use

    def read(self, site: int, symbol: str) -> float | None:
        """Return a measurement of `site`, or None if nothing was measured."""
        track = self._tracked.tracks.get((site, symbol))
        if track is None:
            return None
        measured = next(m for m in self._sites[site] if m.symbol == symbol)
        value = track.value if self._lag or measured.late else self._now(track, measured)
        return None if value is None else value.read()

    def _now(self, track: Track, measured: Measured) -> Number | None:
        """Measure up to this call."""
        if measured.statistic == "advance":
            return self._advance(track, measured)
        now, similar = self._value(measured), measured.statistic == "similarity"
        before = track.reference if similar else self._tracked.last.get(measured.place)
        change = self._change(now, before, measured, track.rate)
        if change is not None and not similar and track.value is not None:
            change = track.value.tensor + change
        return None if change is None else Number(change, ahead=bool(self._lag))

    def _advance(self, track: Track, measured: Measured) -> Number | None:
        """How far the probe is along the way between the last two computed calls."""
        now = self._value(measured)
        if now is None or track.before is None:
            return None
        way = self._once(mean_change, track.reference, track.before)
        return Number(self._once(mean_change, now, track.before) / way, ahead=bool(self._lag))

    def _value(self, measured: Measured) -> Tensor | None:
        """Return the probe's value in this call, filtered if it has a grid, or None if it is not computed yet."""
        value = self._wires[measured.wire]
        if value is None or measured.grid is None:
            return value
        if measured.place not in self._filtered:
            self._filtered[measured.place] = self._filter(value, measured.grid)
        return self._filtered[measured.place]

    def _filter(self, value: Tensor, grid: Grid) -> Tensor | None:
        latent = self._wires[grid.latent]
        placed = None if latent is None or self._noise is None else on_grid(value, grid, latent)
        return None if placed is None or self._noise is None else sea_filter(*placed, self._noise)

    def _change(
        self, now: Tensor | None, before: Tensor | None, measured: Measured, rate: Tensor | None
    ) -> Tensor | None:
        """Return the rescaled change from `before` to `now`, or None if it is unknown."""
        if now is None or before is None:
            return None
        if measured.rescale == "rate":
            return None if rate is None else self._once(mean_change, now, before) * rate
        change = self._once(self._distance, now, before)
        return change if measured.rescale is None else polynomial(measured.rescale, change)

    def _once(self, distance: Distance, now: Tensor, before: Tensor) -> Tensor:
        """Return a distance of two tensors. It is computed once for all sites that compare the same tensors."""
        key = (distance, id(now), id(before))
        if key not in self._known:
            self._known[key] = (distance(now, before), now, before)
        return self._known[key][0]

    def close(self, row: Sequence[bool]) -> None:
        """Record the measurements at the end of a call, and the probes of the computed sites as new references."""
        tracks, kept = self._tracked.tracks, dict[tuple[int, Grid | None], Tensor]()
        for site, reused in enumerate(row):
            for measured in self._sites[site]:
                now = self._value(measured)
                if now is None or (reused and measured.late):  # nothing is measured inside a reused span
                    continue
                if measured.place not in kept:  # the caller may modify an input in place
                    own = measured.wire >= self._num_inputs or measured.grid is not None
                    kept[measured.place] = now if own else now.clone()
                track = tracks.get((site, measured.symbol))
                tracks[site, measured.symbol] = self._next(track, measured, kept[measured.place], reused)
        self._tracked.last.update(kept)

    def _next(self, track: Track | None, measured: Measured, now: Tensor, reused: bool) -> Track:
        if track is None or measured.late:
            change = None if track is None else self._change(now, track.reference, measured, None)
            return Track(now, None if change is None else Number(change, ahead=True), self._output(measured, reused))
        following = track if reused else self._computed(track, measured, now)
        if measured.statistic == "advance":
            return replace(following, value=self._advance(following, measured) if self._lag else None)
        if measured.statistic == "similarity":
            return replace(following, value=self._now(track, measured) if self._lag else None)
        if reused:
            return replace(following, value=self._now(track, measured))
        return replace(following, value=self._now(replace(track, value=None), measured) if self._lag else None)

    def _computed(self, track: Track, measured: Measured, now: Tensor) -> Track:
        """Return the track of a site that this call computed."""
        output, rate = self._output(measured, False), None
        if output is not None and track.output is not None:
            rate = self._once(self._distance, track.output, output) / self._once(mean_change, now, track.reference)
        before = track.reference if measured.statistic == "advance" else None
        return Track(now, output=output, rate=rate, before=before)

    def _output(self, measured: Measured, reused: bool) -> Tensor | None:
        """Return the output of this call if a rate needs it and the call computed it."""
        is_read = measured.rescale == "rate" and measured.output is not None and not reused
        return self._wires[measured.output] if is_read else None  # type: ignore[index]
