"""The state of one thread: its trajectory, explicit or inferred, and the current call of the model."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_rewrite.errors import GraphReason, MissReason, NestedTrajectory, StreamReason
from dit_rewrite.runtime.cache import Cache, Stamp
from dit_rewrite.runtime.cuda_graphs import AllGraphs, StreamGraphs
from dit_rewrite.runtime.decide import SiteSpec
from dit_rewrite.runtime.history import Moment
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.segments import Wiring
from dit_rewrite.runtime.stats import Record, Stats
from dit_rewrite.runtime.step_tables import Program, Tables
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
    """One running call of the model. ``graphs`` has the graphs called so far, ``layers`` the number of their blocks,
    ``returned`` the tensors that they returned.

    ``fresh`` is a specific reason why the stream has no values yet, if there is one.
    """

    trajectory: Trajectory
    stream: Stream
    inputs: Inputs
    explicit: bool = False
    fresh: StreamReason | None = None
    graphs: list[int] = field(default_factory=list)
    layers: int = 0
    returned: list[weakref.ref[Tensor]] = field(default_factory=list)
    _occurrences: dict[int, int] = field(default_factory=dict)

    @property
    def conditioning(self) -> tuple[Tensor, ...]:
        """The tensors that are expected to stay the same in the stream's next call."""
        known = self.stream.conditioning
        return self.inputs.conditioning if known is None else known.invariant(self.inputs)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, and those that the graphs called so far returned."""
        returned = (reference() for reference in self.returned)
        return [*self.inputs.tensors, *(tensor for tensor in returned if tensor is not None)]

    @property
    def moment(self) -> Moment:
        """The moment of the next graph of this call."""
        trajectory, stream = self.trajectory, self.stream
        sigma, snr = trajectory.noise(trajectory.step)
        return Moment(trajectory.step, trajectory.num_steps, self.layers, stream.num_layers, sigma, snr, stream.name)

    def enter(self, graph: int, num_sites: int, ordered: bool = True) -> tuple[int, Cache, MissReason | None]:
        """Count a call of `graph`.

        Returns its occurrence number within this call, its cache, and the reason why the cache was cleared: the graph
        sequence differs from that of the stream's last call. The reason is None if it does not, or without `ordered`,
        for callers that tell a block by its weights.
        """
        occurrence = self._occurrences.get(graph, 0)
        self._occurrences[graph] = occurrence + 1
        position = len(self.graphs)
        self.graphs.append(graph)
        cache = self.stream.caches.get((graph, occurrence))
        if cache is None:
            cache = self.stream.caches[graph, occurrence] = Cache(num_sites)
        before = self.stream.sequence
        if ordered and before is not None and before[position : position + 1] != (graph,):
            cache.clear()
            cache.stamp = None
            return occurrence, cache, MissReason.CHANGED_GRAPH
        return occurrence, cache, None

    def leave(self, layers: int, outputs: Sequence[Any]) -> None:
        """Count the blocks of a graph that has run, and record the tensors that it returned."""
        self.layers += layers
        self.returned += [weakref.ref(out) for out in outputs if isinstance(out, Tensor)]

    def lent(self, name: str, graph: int, occurrence: int) -> Cache | None:
        """Return the cache of the same graph in the stream called `name`, or None if no or several streams match."""
        lenders = [stream for stream in self.trajectory.streams.named(name) if stream.place == self.stream.place]
        return lenders[0].caches.get((graph, occurrence)) if len(lenders) == 1 else None


@dataclass(frozen=True)
class Observation:
    """A finished call of a graph: its inputs, its outputs, and the values in its slots (``slots``) after it."""

    graph: int
    position: int
    record: Record
    args: tuple[Any, ...]
    outputs: tuple[Any, ...]
    slots: tuple[tuple[Tensor, ...] | None, ...]


class Session(threading.local):
    """The runtime state of one thread; each thread that calls the model has its own trajectories and cache."""

    def __init__(
        self, stats: Stats, limit: Callable[[], int] = lambda: sys.maxsize, graphs: AllGraphs | None = None
    ) -> None:
        """Create a session. `limit` returns the maximum size in bytes of the cache of one trajectory. `graphs` are the
        CUDA graphs of all threads, if the caller asked for them.
        """
        self.stats = stats
        self._explicit: ExplicitTrajectory | None = None
        self.inferred = InferredTrajectory()
        self.named = Named()
        self.call: Call | None = None
        self.known: int | None = None  # number of the last call's trajectory; a reference would keep its cache alive
        self.ran: tuple[int, ...] = ()  # the graphs of the last call
        self.num_streams = 0  # of the last call's trajectory
        self.observer: Callable[[Observation], None] | None = None
        self.director: Callable[[Any, list[Any], Call, Cache], Any] | None = None  # if set, decides and runs each graph
        self._limit = limit
        self._tables: dict[int, Tables] = {}  # by graph
        self._graphs = None if graphs is None else graphs.of_thread()

    def graphs(
        self, graph: int, cache: Cache, stamp: Stamp, wiring: Wiring, sites: Sequence[SiteSpec]
    ) -> StreamGraphs | None:
        """Return the CUDA graphs for a call of a graph, or None if it runs without."""
        if self._graphs is not None and (self.observer is not None or self.director is not None):
            self.stats.not_captured(GraphReason.OBSERVED)
            return None
        return None if self._graphs is None else self._graphs.serve(graph, cache, stamp, wiring, sites)

    def tables_of(self, graph: int, program: Program) -> Tables:
        """Return the step tables of a graph."""
        if graph not in self._tables:
            self._tables[graph] = Tables(program, self.stats, self._limit)
        return self._tables[graph]

    def begin(self, inputs: Inputs) -> Call:
        """Begin a call of the model: find its trajectory and stream."""
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
            self.stats.streams[StreamReason.CALLED_ONCE] += place.lapsed

    def end(self, call: Call) -> None:
        """End a call that returned: record its graph sequence, and evict slots if the cache exceeds its limit."""
        stream = call.stream
        self.ran = stream.sequence = tuple(call.graphs)
        stream.num_layers = call.layers
        self.num_streams = len(call.trajectory.streams.all)
        self.stats.called()
        self.call = None
        if not call.graphs:
            self.stats.miss(MissReason.NOT_CAPTURED)
        if stream.calls == 1 and len(call.trajectory.streams.all) > 1:
            for _ in call.trajectory.streams.evict(self._limit(), stream):
                self.stats.streams[StreamReason.EVICTED] += 1
                if self._graphs is not None:
                    self._graphs.drop_free(1)

    def abandon(self, call: Call) -> None:
        """End a call that raised: clear the slots of its stream."""
        call.stream.forget()
        self.call = None

    @property
    def explicit(self) -> ExplicitTrajectory | None:
        """The explicit trajectory of this thread, unless another thread has closed it."""
        current = self._explicit
        return current if current is not None and current.is_open else None

    def enter(self, clock: Clock, of_run: bool = False) -> ExplicitTrajectory:
        """Begin an explicit trajectory. That of a pipeline's run may interrupt that of another run, which goes on
        after it. Raises BadTrajectory inside any other one."""
        outer = self.explicit
        if outer is not None and not (of_run and outer.of_run):
            raise NestedTrajectory
        if outer is None:
            self.forget()
        self._explicit = ExplicitTrajectory(clock, of_run, outer)
        return self._explicit

    def leave(self, trajectory: ExplicitTrajectory) -> None:
        """End an explicit trajectory and drop its cache. A generator may do so in another thread than it began in."""
        trajectory.close()
        if self._explicit is trajectory:
            self._explicit = trajectory.outer
            if self.explicit is None:
                self.forget()

    def forget(self) -> None:
        """Drop the current trajectory and its cache; the next call begins another."""
        self.inferred = InferredTrajectory()
        if self.explicit is not None:
            self.explicit.begin()
        for tables in self._tables.values():
            tables.drop_dead()

    def cache_bytes(self) -> int:
        """Return the size in bytes of the current trajectory's cache."""
        tracker = self.inferred if self.explicit is None else self.explicit
        return sum(stream.bytes for stream in tracker.trajectory.streams.all)

    def note_bytes(self) -> None:
        """Update the peak cache size after slots were filled."""
        self.stats.peak_bytes = max(self.stats.peak_bytes, self.cache_bytes())
