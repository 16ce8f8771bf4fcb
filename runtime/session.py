"""The state of one thread: its trajectory, told or watched, and the call of the model that is under way."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_rewrite.errors import BadTrajectory, Reason
from dit_rewrite.runtime.cache import Bank
from dit_rewrite.runtime.decide import Moment
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.stats import Record, Stats
from dit_rewrite.runtime.trajectory import (
    Clock,
    ExplicitTrajectory,
    InferredTrajectory,
    Named,
    Place,
    Stream,
    Trajectory,
)


@dataclass
class Call:
    """One call of the model, while it runs: the graphs that it has called so far and the layers they held.

    ``fresh`` says why its stream has no values yet, where there is more to say than that.
    """

    trajectory: Trajectory
    stream: Stream
    inputs: Inputs
    explicit: bool = False
    fresh: Reason | None = None
    graphs: list[int] = field(default_factory=list)
    layers: int = 0
    _occurrences: Counter[int] = field(default_factory=Counter)

    @property
    def conditioning(self) -> tuple[Tensor, ...]:
        """The tensors that are expected to be the same at the stream's next call."""
        known = self.stream.conditioning
        return self.inputs.conditioning if known is None else known.steady(self.inputs)

    @property
    def moment(self) -> Moment:
        """Where the next graph of the call stands."""
        trajectory, stream = self.trajectory, self.stream
        sigma, snr = trajectory.noise(trajectory.step)
        return Moment(trajectory.step, trajectory.num_steps, self.layers, stream.num_layers, sigma, snr, stream.name)

    def enter(self, graph: int, num_sites: int) -> tuple[int, Bank, Reason | None]:
        """Count a call of a graph: which occurrence it is, its slots, and why they cannot be used if so."""
        occurrence = self._occurrences[graph]
        self._occurrences[graph] += 1
        position = len(self.graphs)
        self.graphs.append(graph)
        bank = self.stream.banks.setdefault((graph, occurrence), Bank(num_sites))
        before = self.stream.sequence
        if before is not None and before[position : position + 1] != (graph,):
            bank.clear()
            bank.stamp = None
            return occurrence, bank, Reason.CHANGED_GRAPH
        return occurrence, bank, None

    def lent(self, name: str, graph: int, occurrence: int) -> Bank | None:
        """The slots of the same place in the stream of another name; None where it has none, or several fit."""
        lenders = [stream for stream in self.trajectory.streams.named(name) if stream.place == self.stream.place]
        return lenders[0].banks.get((graph, occurrence)) if len(lenders) == 1 else None


@dataclass(frozen=True)
class Observation:
    """One call of a graph as it happened: its inputs, its outputs, and what its slots held after it."""

    graph: int
    position: int
    record: Record
    args: tuple[Any, ...]
    outputs: tuple[Any, ...]
    held: tuple[tuple[Tensor, ...] | None, ...]


class Session(threading.local):
    """Each thread that calls the model has trajectories and slots of its own."""

    def __init__(self, stats: Stats, limit: Callable[[], int] = lambda: sys.maxsize) -> None:
        """`limit` says how many bytes the slots of one trajectory may hold."""
        self.stats = stats
        self.explicit: ExplicitTrajectory | None = None
        self.inferred = InferredTrajectory()
        self.named = Named()
        self.call: Call | None = None
        self.known: int | None = None  # the number of the last call's trajectory: holding it would keep its slots
        self.ran: tuple[int, ...] = ()  # the graphs of the last call
        self.num_streams = 0  # of the last call's trajectory
        self.observer: Callable[[Observation], None] | None = None
        self.director: Callable[[Any, list[Any], Call, Bank], Any] | None = None  # decides and runs a graph instead
        self._limit = limit

    def begin(self, inputs: Inputs) -> Call:
        """A call of the model begins."""
        tracker = self.inferred if self.explicit is None else self.explicit
        place = tracker.place(inputs, self.named)
        if place.trajectory.number != self.known:
            self.known = place.trajectory.number
            self.stats.begin(place.trajectory.why)
        self._report(place)
        self.call = Call(place.trajectory, place.stream, inputs, self.explicit is not None, place.why)
        return self.call

    def _report(self, place: Place) -> None:
        if place.why is not None:
            self.stats.streams[place.why] += 1
        if place.lapsed:
            self.stats.streams[Reason.CALLED_ONCE] += place.lapsed

    def end(self, call: Call) -> None:
        """The call has returned: remember its shape for the next of its stream."""
        stream = call.stream
        self.ran = stream.sequence = tuple(call.graphs)
        stream.num_layers = call.layers
        self.num_streams = len(call.trajectory.streams.all)
        self.stats.called()
        self.call = None
        if not call.graphs:
            self.stats.miss(Reason.NOT_CAPTURED)
        if stream.calls == 1 and len(call.trajectory.streams.all) > 1:
            for _ in call.trajectory.streams.evict(self._limit(), stream):
                self.stats.streams[Reason.EVICTED] += 1

    def abandon(self, call: Call) -> None:
        """The call raised: nothing that it left behind is used."""
        call.stream.forget()
        self.call = None

    def enter(self, clock: Clock) -> None:
        """A trajectory that the caller marks begins."""
        if self.explicit is not None:
            raise BadTrajectory("A trajectory was opened inside another.", "Leave the outer context first.")
        self.forget()
        self.explicit = ExplicitTrajectory(clock)

    def leave(self) -> None:
        """The caller's trajectory has ended; its slots are gone."""
        self.explicit = None
        self.forget()

    def forget(self) -> None:
        """Drop the present trajectory and all its slots: the next call is the first of another."""
        self.inferred = InferredTrajectory()
        if self.explicit is not None:
            self.explicit.begin()

    def cache_bytes(self) -> int:
        """Bytes that the present trajectory's slots hold."""
        tracker = self.inferred if self.explicit is None else self.explicit
        return sum(stream.bytes for stream in tracker.trajectory.streams.all)

    def note_bytes(self) -> None:
        """Slots were filled: keep the most bytes that they ever held."""
        self.stats.peak_bytes = max(self.stats.peak_bytes, self.cache_bytes())
