"""Measurements for guards: how much a probe has changed since a site was last computed.

They stay on the device until a guard needs the number. What is read one call later is copied to the host at once,
without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_rewrite.runtime.spectral import Grid, on_grid, sea_filter

Distance = Callable[[Tensor, Tensor], Tensor]  # (now, before) -> relative L1, a tensor of no dimensions


class Measured(NamedTuple):
    """A symbol that a site's guard reads: "similarity" or "drift" of what a wire carries.

    ``rescale`` are the coefficients, highest power first, of a polynomial that each change is put through, or "rate":
    each is multiplied by how much of its output a computed call changed per change of the probe, at last. ``output`` is
    the wire of what the model returns, where that is read. On a ``grid`` the probe is filtered by its step's noise.
    """

    symbol: str
    statistic: str
    wire: int
    rescale: tuple[float, ...] | Literal["rate"] | None = None
    output: int | None = None
    grid: Grid | None = None

    @property
    def late(self) -> bool:
        """Whether it is of what the call returns: known once the call is over, and told to the next ones."""
        return self.wire == self.output

    @property
    def place(self) -> tuple[int, Grid | None]:
        """What is measured there, under whichever symbol."""
        return self.wire, self.grid


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """The value of a polynomial, highest power first, in float64; what is not finite stays so."""
    x = x.double()
    value = x * 0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def mean_change(now: Tensor, before: Tensor) -> Tensor:
    """The mean of the absolute change, in float32 (float64 for float64)."""
    dtype = torch.promote_types(now.dtype, torch.float32)
    return (now.to(dtype) - before.to(dtype)).abs().mean()


class Number:
    """A measurement on the device, and its copy on the host: on its way there where it was asked for ahead."""

    def __init__(self, tensor: Tensor, ahead: bool) -> None:
        self.tensor = tensor
        self._host: Tensor | None = None
        if ahead and tensor.is_cuda:
            self._host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> float:
        """The number; waits for its copy alone, not for what was queued since."""
        if self._host is None:
            return float(self.tensor.item())
        self._arrived.synchronize()
        return float(self._host)


@dataclass(frozen=True)
class Track:
    """A probe's value when the site was last computed, and what was measured since, up to the last call.

    Of "drift" that is the sum of the changes from call to call; of "similarity" it is kept for a lag alone, or
    where the probe is what the calls return: then it is the change from the one computed call to the last.
    """

    reference: Tensor
    value: Number | None = None
    output: Tensor | None = None  # what the last computed call returned, where a rate is made of it
    rate: Tensor | None = None  # its relative change since the one before, over the probe's change

    @property
    def held(self) -> tuple[Tensor, ...]:
        return (self.reference,) if self.output is None else (self.reference, self.output)


@dataclass
class Tracked:
    """The tracks of a bank by site and symbol, and the last value of each probe."""

    tracks: dict[tuple[int, str], Track] = field(default_factory=dict)
    last: dict[tuple[int, Grid | None], Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held for comparison."""
        return (*(t for track in self.tracks.values() for t in track.held), *self.last.values())


class Meter:
    """The measurements of one call. `wires` holds what each wire carries so far; those below `num_inputs` are inputs.

    With `lag` 0 a guard reads what changed up to this call, with 1 what changed up to the last one: the same numbers,
    one call later.
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
        """`noise` is the share of noise at the call's step, None where nobody knows it."""
        self._tracked, self._sites, self._wires, self._num_inputs = tracked, sites, wires, num_inputs
        self._lag, self._distance = lag, distance
        self._noise = noise
        self._filtered: dict[tuple[int, Grid | None], Tensor | None] = {}
        self._known: dict[tuple[Distance, int, int], tuple[Tensor, ...]] = {}  # with the tensors: their ids are in use

    def read(self, site: int, symbol: str) -> float | None:
        """The number that a guard asks for; None where nothing was measured."""
        track = self._tracked.tracks.get((site, symbol))
        if track is None:
            return None
        measured = next(m for m in self._sites[site] if m.symbol == symbol)
        value = track.value if self._lag or measured.late else self._now(track, measured)
        return None if value is None else value.read()

    def _now(self, track: Track, measured: Measured) -> Number | None:
        """What is measured up to this call."""
        now, similar = self._value(measured), measured.statistic == "similarity"
        before = track.reference if similar else self._tracked.last.get(measured.place)
        change = self._change(now, before, measured, track.rate)
        if change is not None and not similar and track.value is not None:
            change = track.value.tensor + change
        return None if change is None else Number(change, ahead=bool(self._lag))

    def _value(self, measured: Measured) -> Tensor | None:
        """What a probe is in this call, so far as it is known."""
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
        """The change from one tensor to another, rescaled."""
        if now is None or before is None:
            return None
        if measured.rescale == "rate":
            return None if rate is None else self._once(mean_change, now, before) * rate
        change = self._once(self._distance, now, before)
        return change if measured.rescale is None else polynomial(measured.rescale, change)

    def _once(self, distance: Distance, now: Tensor, before: Tensor) -> Tensor:
        """A distance of two tensors; taken once, whoever asks."""
        key = (distance, id(now), id(before))
        if key not in self._known:
            self._known[key] = (distance(now, before), now, before)
        return self._known[key][0]

    def close(self, row: Sequence[bool]) -> None:
        """The call is over: note what was measured, and what the sites that computed are to be compared with."""
        tracks, kept = self._tracked.tracks, dict[tuple[int, Grid | None], Tensor]()
        for site, reused in enumerate(row):
            for measured in self._sites[site]:
                now = self._value(measured)
                if now is None or (reused and measured.late):  # inside a reused span nothing is measured
                    continue
                if measured.place not in kept:  # an input is the caller's, who may change it in place
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
        if measured.statistic == "similarity":
            return replace(following, value=self._now(track, measured) if self._lag else None)
        if reused:
            return replace(following, value=self._now(track, measured))
        return replace(following, value=self._now(replace(track, value=None), measured) if self._lag else None)

    def _computed(self, track: Track, measured: Measured, now: Tensor) -> Track:
        """The track of a site that this call computed."""
        output, rate = self._output(measured, False), None
        if output is not None and track.output is not None:
            rate = self._once(self._distance, track.output, output) / self._once(mean_change, now, track.reference)
        return Track(now, output=output, rate=rate)

    def _output(self, measured: Measured, reused: bool) -> Tensor | None:
        """What this call returned, where a rate is made of it, and it computed."""
        is_read = measured.rescale == "rate" and measured.output is not None and not reused
        return self._wires[measured.output] if is_read else None  # type: ignore[index]
