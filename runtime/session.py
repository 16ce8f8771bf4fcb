"""The state of one thread: its trajectory, told or watched, and the call of the model that is under way."""

from __future__ import annotations

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
from dit_rewrite.runtime.trajectory import Named, Stream, Told, Trajectory, Watched


@dataclass
class Call:
    """One call of the model, while it runs: the graphs that it has called so far and the layers they held."""

    trajectory: Trajectory
    stream: Stream
    conditioning: tuple[Tensor, ...] = ()
    told: bool = False
    graphs: list[int] = field(default_factory=list)
    layers: int = 0
    _occurrences: Counter[int] = field(default_factory=Counter)

    @property
    def moment(self) -> Moment:
        """Where the next graph of the call stands."""
        trajectory, stream = self.trajectory, self.stream
        sigma, snr = trajectory.noise(trajectory.step)
        sigma = trajectory.sigma if sigma is None else sigma
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

    def lent(self, stream: str, graph: int, occurrence: int) -> Bank | None:
        """The slots of the same place in another stream; None where it was not called."""
        lender = self.trajectory.streams.get(stream)
        return None if lender is None else lender.banks.get((graph, occurrence))


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

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self.told: Told | None = None
        self.watched = Watched()
        self.named = Named()
        self.call: Call | None = None
        self.known: int | None = None  # the number of the last call's trajectory: holding it would keep its slots
        self.ran: tuple[int, ...] = ()  # the graphs of the last call
        self.observer: Callable[[Observation], None] | None = None
        self.director: Callable[[Any, list[Any], Call, Bank], Any] | None = None  # decides and runs a graph instead

    def begin(self, inputs: Inputs) -> Call:
        """A call of the model begins."""
        if self.told is not None:
            trajectory, stream = self.told.place(inputs, self.named)
        else:
            trajectory, stream = self.watched.place(inputs, self.named)
        if trajectory.number != self.known:
            self.known = trajectory.number
            if trajectory.why is not None:
                self.stats.trajectories[trajectory.why] += 1
        self.call = Call(trajectory, stream, inputs.conditioning, self.told is not None)
        return self.call

    def end(self, call: Call) -> None:
        """The call has returned: remember its shape for the next of its stream."""
        self.ran = call.stream.sequence = tuple(call.graphs)
        call.stream.num_layers = call.layers
        self.stats.calls += 1
        self.call = None
        if not call.graphs:
            self.stats.misses[Reason.NOT_CAPTURED] += 1

    def abandon(self, call: Call) -> None:
        """The call raised: nothing that it left behind is used."""
        call.stream.banks.clear()
        call.stream.sequence = None
        self.call = None

    def tell(self, told: Told) -> None:
        """A told trajectory begins."""
        if self.told is not None:
            raise BadTrajectory("A trajectory is told inside another.", "Leave the outer context first.")
        self.forget()
        self.told = told

    def forget(self) -> None:
        """Drop the present trajectory, told or watched, and all its slots: the next call is the first of another."""
        self.watched = Watched()
        if self.told is not None:
            self.told.begin()

    def cache_bytes(self) -> int:
        """Bytes that the present trajectory's slots hold."""
        trajectory = self.told.trajectory if self.told is not None else self.watched.trajectory
        return sum(bank.bytes for stream in trajectory.streams.values() for bank in stream.banks.values())
