"""A sampler that waits at every call of its denoiser for the decisions and outputs of the call."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_rewrite.errors import (
    SamplerEnded,
    SearchCalledTwice,
    SearchOtherStreams,
    SearchOutsideTrajectory,
    SearchOverGraphs,
    SearchRecompiled,
    SearchRestarted,
)
from dit_rewrite.module import RewrittenModule
from dit_rewrite.proof.callers import calling
from dit_rewrite.runtime.cache import Cache
from dit_rewrite.runtime.decide import Decisions
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.runtime.session import Call


class Arrival(NamedTuple):
    """A call of the denoiser that waits for its decisions and its outputs."""

    graph: CompiledGraph
    args: list[Any]
    call: Call
    cache: Cache


def digest(arrivals: Iterable[Arrival]) -> str:
    """Return a hash of the inputs of calls without weights: latents, timesteps and conditioning. Copies from the
    device."""
    found = hashlib.sha256()
    for arrival in arrivals:
        weights = arrival.graph.wiring.static
        for value in (value for i, value in enumerate(arrival.args) if i not in weights):
            found.update(repr((value.shape, value.dtype) if isinstance(value, Tensor) else value).encode())
            if isinstance(value, Tensor):
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class State:
    """One trajectory within a step. ``wires`` has the values before the segment ``cursor``, the first that is not
    final."""

    def __init__(self, arrival: Arrival) -> None:
        self.graph, self.args, self.call, self.cache = arrival
        self.wires = self.graph.start(self.args)
        self.cursor = 0
        self.fresh: list[Any] = []

    def outputs(self, decide: Callable[[int], bool]) -> tuple[Tensor, float]:
        """Run the remaining segments with the given decisions, without making them final.

        Returns the model's floating-point output, several as one vector, and the fraction of the segments that ran.
        """
        wires = list(self.wires)
        count = len(self.graph.segments)
        for number in range(self.cursor, count):
            self.graph.run_segment(number, decide, self.args, wires, self.cache)
        tensors = [t for t in self.graph.results(wires) if isinstance(t, Tensor) and t.is_floating_point()]
        output = tensors[0] if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])
        return output, (count - self.cursor) / count

    def advance(self, until: int, decide: Callable[[int], bool]) -> float:
        """Run the segments before `until` and make them final. Returns the fraction of the segments that ran."""
        before = self.cursor
        for number in range(self.cursor, until):
            self.fresh += self.graph.run_segment(number, decide, self.args, self.wires, self.cache)
            self.cursor = number + 1
        return (self.cursor - before) / len(self.graph.segments)

    def finish(self, decided: Decisions) -> list[Any]:
        """Fill the slots, and return the results of the graph."""
        self.graph.commit(self.fresh, self.cache, self.call.moment, decided)
        return self.graph.results(self.wires)


class _Closed(BaseException):
    """Raised in the sampler's thread to end it."""


class Sampling:
    """Runs `sample(model)` in a thread. The sampler and its owner take turns: one waits while the other runs.

    Threads allow several samplers, which are written as loops, to run step by step side by side. Each has its own
    slots.
    """

    def __init__(self, model: RewrittenModule, sample: Callable[[Any], object], number: int = 0) -> None:
        self._model, self._sample, self._number = model, sample, number
        self._arrivals: SimpleQueue[Arrival | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Decisions, Sequence[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def next(self) -> Arrival:
        """Wait for the next call. Raises FunctionFailed if the sampler failed, and SamplerEnded if it returned."""
        if self._thread.ident is None:  # not started yet
            self._thread.start()
        arrival = self._arrivals.get()
        if arrival is None:
            raise SamplerEnded
        if isinstance(arrival, BaseException):
            raise arrival
        return arrival

    def answer(self, decided: Decisions, outputs: Sequence[Any]) -> None:
        """Let the call return `outputs`."""
        self._answers.put((decided, outputs))

    def close(self) -> None:
        """End the waiting sampler."""
        if self._thread.is_alive():
            self._answers.put(None)
            self._thread.join()

    def _run(self) -> None:
        self._model._backend.session.director = self._wait  # set for this thread only
        try:
            with torch.no_grad(), calling(self._sample, f"in trajectory {self._number}"):
                self._sample(self._model)
            self._arrivals.put(None)
        except _Closed:
            pass
        except BaseException as error:
            self._arrivals.put(error)

    def _wait(self, graph: CompiledGraph, args: list[Any], call: Call, cache: Cache) -> tuple[Decisions, Sequence[Any]]:
        self._arrivals.put(Arrival(graph, args, call, cache))
        answer = self._answers.get()
        if answer is None:
            raise _Closed
        return answer


class Samplers:
    """Samplers side by side, each in the same step and stream as the others.

    ``streams`` has the names of a step's streams in the order of their calls, as the first sampler's first step makes
    them. ``done`` is the number of calls that each sampler has made so far.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.samplings = samplings
        self.streams: tuple[Any, ...] = ()
        self.done = 0
        self._graph: CompiledGraph | None = None
        self._calls: list[Call | None] = [None] * len(samplings)  # the last call of each

    def next(self) -> list[Arrival]:
        """Wait for the next call of every sampler. Raises BadTrajectory unless all are the call that is due."""
        arrivals: list[Arrival] = []
        for i, sampling in enumerate(self.samplings):
            arrivals.append(sampling.next())
            self._check(arrivals[-1], arrivals[0], self._calls[i])
            self._calls[i] = arrivals[-1].call
        return arrivals

    def answer(self, decided: Decisions, outputs: Iterable[Sequence[Any]]) -> None:
        """Let the call of each sampler return its outputs."""
        for sampling, own in zip(self.samplings, outputs, strict=True):
            sampling.answer(decided, own)
        self.done += 1

    def close(self) -> None:
        """End the samplers."""
        for sampling in self.samplings:
            sampling.close()

    def _check(self, arrival: Arrival, first: Arrival, before: Call | None) -> None:
        call, step = arrival.call, arrival.call.trajectory.step
        if not call.explicit:
            raise SearchOutsideTrajectory
        if call is before:
            raise SearchOverGraphs
        if step > 0 if before is None else call.trajectory is not before.trajectory:
            raise SearchRestarted(self.done // max(1, len(self.streams)), step)
        if arrival is first and step == 0:
            self._learn(call.stream.name)
        self._check_stream(call)
        if before is None:
            self._graph = first.graph
        if arrival.graph is not self._graph:
            raise SearchRecompiled(step)
        if step > 0 and call.stream.calls == 1:
            name = repr(call.stream.name)
            raise SearchOtherStreams(step, f"{name} with other arguments", "one of the first step")

    def _learn(self, name: Hashable) -> None:
        """Add a stream of the first step. A plan knows several of them by their names."""
        self.streams = (*self.streams, name)
        names = {stream for stream in self.streams if isinstance(stream, str)}
        if self.done > 0 and len(names) <= self.done:
            raise SearchCalledTwice(0)

    def _check_stream(self, call: Call) -> None:
        """Check that a call is that of the step and stream that is due."""
        step, name = call.trajectory.step, call.stream.name
        due, place = divmod(self.done, len(self.streams))
        if step != due and len(self.streams) == 1:
            raise SearchCalledTwice(due - 1)
        if (step, name) != (due, self.streams[place]) and len(self.streams) > 1:
            raise SearchOtherStreams(step, repr(name), repr(self.streams[place]))
