"""CUDA graphs with a live cache: variants are captured over buffers that belong to one stream.

A captured graph reads and writes fixed addresses. Weights are read where they are. Every other input has a buffer that
is filled before a replay; the value of a slot is copied there once, and the slot keeps it there. New values of slots,
and values that only the next segment reads, are written to buffers within the graph; all other results are copied to
new memory. So nothing is read from the memory that graphs share after another graph ran, and no buffer is
overwritten while a slot keeps a value in it.
"""

from __future__ import annotations

import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import GraphReason
from dit_rewrite.runtime.cache import Cache, Stamp
from dit_rewrite.runtime.captured import Bound, Buffers, Captured, Pool, Roles, apart
from dit_rewrite.runtime.decide import SiteSpec
from dit_rewrite.runtime.forecast_errors import Fresh
from dit_rewrite.runtime.segments import Executable, Wiring, execute, gather
from dit_rewrite.runtime.static_buffers import Layout
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.tensors import storage_address

WARM_UP = 2  # runs of a variant before it is captured: kernels are tuned, and libraries allocate their workspaces
MOST = 16  # streams, and shapes of their inputs, whose graphs are kept
CAPTURES = 4  # of one variant; if its weights move after each of them, it is no longer captured
CPU = torch.device("cpu")

Key = tuple[int, Stamp, tuple[torch.device, Hashable]]  # the graph, its inputs, and the device with its queue


class Device(Protocol):
    """Captures graphs."""

    def queue(self, device: torch.device) -> Hashable | GraphReason:
        """Return the queue of the device that now takes work (a CUDA stream), or why nothing can be captured there."""

    def pool(self, device: torch.device) -> Pool:
        """Return a new pool, for graphs that run in the current queue."""


@dataclass
class Variant:
    """The state of a variant in one stream. ``results`` are the layouts of its last results, or numbers themselves."""

    runs: int = 0
    captures: int = 0
    results: tuple[Any, ...] = ()
    refused: GraphReason | None = None
    graph: Captured | None = None


class StreamGraphs:
    """The graphs of one captured graph's variants, for one stream and one shape of the inputs.

    They serve one cache at a time: a stream of this trajectory, then one of the next. ``plainly``: whether a segment of
    the current call ran without its graph.
    """

    def __init__(self, key: Key, roles: Roles, pool: Pool, stats: Stats, owner: Graphs) -> None:
        self.key, self.plainly, self.bytes = key, False, 0
        self._roles, self._pool, self._stats = roles, pool, stats
        self._owner: Graphs = weakref.proxy(owner)  # without a cycle, memory is freed as soon as nobody needs it
        self._buffers = Buffers()
        self._variants: dict[tuple[int, DecisionRow], Variant] = {}
        self._cache: weakref.ref[Cache] | None = None

    def serve(self, cache: Cache) -> None:
        """Begin a call with the slots of `cache`."""
        if cache.graphs is not self:
            self._cache = weakref.ref(cache)
        self.plainly = False

    @property
    def is_free(self) -> bool:
        """Whether no cache has values in the buffers, or may expect its values there."""
        cache = None if self._cache is None else self._cache()
        if cache is None:
            return True
        used = {storage_address(tensor) for values in cache.values if values is not None for tensor in values}
        return cache.graphs is not self and not used & self._buffers.memory

    def can_serve(self, cache: Cache) -> bool:
        """Whether it is free, or has served this cache last."""
        return self.is_free or (self._cache is not None and self._cache() is cache)

    def execute(
        self,
        which: tuple[int, DecisionRow],
        executable: Executable,
        wires: list[Any],
        slots: Sequence[tuple[Tensor, ...] | None],
        table: Sequence[Tensor],
        cache: Cache,
    ) -> Fresh:
        """Run the variant of a segment for a row of decisions, as `segments.execute` does, by its graph if it can."""
        inputs = gather(executable, wires, slots, table)
        variant = self._variants.setdefault(which, Variant())
        why = self._prepare(variant, executable, inputs)
        if why is None and variant.graph is not None:
            moved = variant.graph.moved(inputs)
            why = variant.graph.unfit(inputs, moved, cache)
            if why is None:
                self._stats.add("replays")
                return variant.graph.run(inputs, moved, wires, cache)
            self._retry(variant, why)
        self.plainly = True
        self._stats.not_captured(why or GraphReason.WARM_UP)
        return self._run(variant, executable, wires, slots, table)

    def _prepare(self, variant: Variant, executable: Executable, inputs: Sequence[Any]) -> GraphReason | None:
        """Capture a variant that is warm. Returns why it has no graph."""
        if variant.graph is None and variant.refused is None:
            variant.refused = self._refusal(executable, inputs)
        if variant.graph is not None or variant.refused is not None:
            return variant.refused
        if variant.runs < WARM_UP:
            return GraphReason.WARM_UP
        if not self._owner.admit(self):
            return GraphReason.OVER_LIMIT
        try:
            self._capture(variant, executable, inputs)
        except Exception:  # ops and compilers raise any exception; run without a graph, the variant raises its own
            variant.refused = GraphReason.CAPTURE_FAILED
            warnings.warn(f"{GraphReason.CAPTURE_FAILED}:\n{traceback.format_exc()}", stacklevel=2)
        return variant.refused

    def _refusal(self, executable: Executable, inputs: Sequence[Any]) -> GraphReason | None:
        """Return why a variant can never be captured, or None."""
        if executable.uncapturable is not None:
            return executable.uncapturable
        if {site for site, _ in (*executable.cached, *executable.fresh)} & self._roles.mutated:
            return GraphReason.STATE_IN_PLACE
        device, _ = self.key[2]
        elsewhere = any(isinstance(value, Tensor) and value.device != device for value in inputs)
        return GraphReason.MIXED_DEVICES if elsewhere else None

    def _capture(self, variant: Variant, executable: Executable, inputs: Sequence[Any]) -> None:
        bound = Bound.of(executable, self._roles, self._buffers, inputs, variant.results)
        fixed = bound.fixed(inputs)
        bound.warm_up()
        replay = self._pool.capture(lambda: bound.body(executable.run, fixed))
        variant.graph = Captured(executable, bound, replay)
        variant.captures += 1
        graphs = (each.graph.bytes for each in self._variants.values() if each.graph is not None)
        self.bytes = self._buffers.bytes + sum(graphs)
        self._stats.add("captures")

    def _retry(self, variant: Variant, why: GraphReason) -> None:
        """Drop a graph whose weights have moved. The next call captures it again, unless that happened too often."""
        if why is GraphReason.MOVED_WEIGHTS:
            variant.graph = None
            variant.refused = GraphReason.WEIGHTS_MOVE if variant.captures >= CAPTURES else None

    def _run(
        self,
        variant: Variant,
        executable: Executable,
        wires: list[Any],
        slots: Sequence[tuple[Tensor, ...] | None],
        table: Sequence[Tensor],
    ) -> Fresh:
        """Run a variant without a graph. Its results may be views of its inputs, but not of buffers."""
        memory = self._buffers.memory
        fresh = [(place, apart(value, memory)) for place, value in execute(executable, wires, slots, table)]
        for wire in executable.outputs:
            wires[wire] = apart(wires[wire], memory)
        results = (*(wires[wire] for wire in executable.outputs), *(value for _, value in fresh))
        variant.results = tuple(Layout.of(each) if isinstance(each, Tensor) else each for each in results)
        variant.runs += 1
        return fresh


class Graphs:
    """The captured graphs of one thread. They and their buffers take at most `limit` bytes."""

    def __init__(self, device: Device, stats: Stats, limit: Callable[[], int]) -> None:
        self._device, self._stats, self._limit = device, stats, limit
        self._all: list[StreamGraphs] = []
        self._pools: dict[Hashable, Pool] = {}

    def serve(
        self, graph: int, cache: Cache, stamp: Stamp, wiring: Wiring, sites: Sequence[SiteSpec]
    ) -> StreamGraphs | None:
        """Return the graphs for a call of graph number `graph` whose inputs have this stamp, or None without any.

        A call in another queue of the device has other graphs, because graphs of one pool may not run side by side.
        """
        devices = (each[2] for each in stamp if isinstance(each, tuple))
        device = next((each for each in devices if each.type != "cpu"), CPU)  # Dynamo makes CPU tensors of numbers
        queue = self._device.queue(device)
        if isinstance(queue, GraphReason):
            self._stats.not_captured(queue)
            return None
        key: Key = graph, stamp, (device, queue)
        found = cache.graphs
        if found is None or found.key != key:
            able = (each for each in self._all if each.key == key and each.can_serve(cache))
            found = next(able, None) or self._add(key, device, Roles.of(wiring, sites))
        found.serve(cache)
        return found  # type: ignore[no-any-return]

    def _add(self, key: Key, device: torch.device, roles: Roles) -> StreamGraphs:
        if len(self._all) >= MOST:
            self.drop_free(1)
        if key[2] not in self._pools:
            self._pools[key[2]] = self._device.pool(device)
        self._all.append(StreamGraphs(key, roles, self._pools[key[2]], self._stats, self))
        return self._all[-1]

    def admit(self, who: StreamGraphs) -> bool:
        """Return whether the memory limit admits another graph; free graphs are dropped for it, the oldest first."""
        while self.bytes > self._limit() and self.drop_free(1, but=who):
            pass
        return self.bytes <= self._limit()

    def drop_free(self, most: int, but: StreamGraphs | None = None) -> int:
        """Drop up to `most` graphs that serve no cache. Returns how many were dropped."""
        free = [each for each in self._all if each is not but and each.is_free][:most]
        self._all = [each for each in self._all if each not in free]
        return len(free)

    def clear(self) -> None:
        """Drop all graphs. The next calls capture new ones."""
        self._all, self._pools = [], {}

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self._all)


class AllGraphs:
    """The captured graphs of all threads that call one model. A thread owns its graphs; they are freed when it ends."""

    def __init__(self, device: Device, stats: Stats, limit: Callable[[], int]) -> None:
        """Each thread captures by `device`, and its graphs take at most `limit` bytes."""
        self._make = partial(Graphs, device, stats, limit)
        self._each: weakref.WeakSet[Graphs] = weakref.WeakSet()
        self._lock = threading.Lock()

    def of_thread(self) -> Graphs:
        """Return a new collection of graphs for the calling thread, which must keep the only reference."""
        made = self._make()
        with self._lock:
            self._each.add(made)
        return made

    def clear(self) -> None:
        """Drop the graphs of all threads."""
        for graphs in self._alive():
            graphs.clear()

    @property
    def bytes(self) -> int:
        return sum(graphs.bytes for graphs in self._alive())

    def _alive(self) -> list[Graphs]:
        with self._lock:
            return list(self._each)
