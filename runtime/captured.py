"""One variant of a segment as a captured CUDA graph, and the buffers that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dit_rewrite.errors import GraphReason
from dit_rewrite.runtime.cache import Cache
from dit_rewrite.runtime.decide import SiteSpec
from dit_rewrite.runtime.forecast_errors import Fresh
from dit_rewrite.runtime.segments import Executable, Wiring, chosen
from dit_rewrite.runtime.static_buffers import Buffer, Layout, duplicates, fill
from dit_rewrite.runtime.tensors import storage_address

Place = tuple[Hashable, ...]  # ("wire", w), ("slot", site, index) or ("column", name)


class Replay(Protocol):
    """A captured function: calling it runs the function again on the same addresses. ``outputs`` are in memory that
    the next replay of any graph of the pool may overwrite. ``bytes``: the bytes that the capture added to the pool."""

    outputs: Sequence[Tensor]
    bytes: int

    def __call__(self) -> None: ...


class Pool(Protocol):
    """Memory that captured graphs share. None of them may run while another one does."""

    def capture(self, body: Callable[[], Sequence[Tensor]]) -> Replay:
        """Capture a function without running it."""


@dataclass(frozen=True)
class Roles:
    """How a graph's values move. ``weights``: wires whose addresses stay. ``ours``: wires whose tensors nobody changes.
    ``kept``: wires that are read after the call. ``rolled``: sites whose slots hold several values, which move from one
    place in the slot to the next. ``mutated``: sites whose slots an op updates in place."""

    weights: frozenset[int]
    ours: frozenset[int]
    kept: frozenset[int]
    rolled: frozenset[int]
    mutated: frozenset[int]

    @classmethod
    def of(cls, wiring: Wiring, sites: Sequence[SiteSpec]) -> Roles:
        first = wiring.num_inputs - wiring.num_hoisted
        measured = [each for site in sites for each in site.measured]
        read = {each.wire for each in measured} | {each.output for each in measured if each.output is not None}
        read |= {each.grid.latent for each in measured if each.grid is not None}
        states = {i if site.reads is None else site.reads for i, site in enumerate(sites) if site.counters is not None}
        return cls(
            wiring.static,
            frozenset(range(first, wiring.num_inputs)),
            frozenset(read | {out for out in wiring.outputs if isinstance(out, int)}),
            frozenset(i for i, site in enumerate(sites) if site.depth > 1),
            frozenset(states),
        )


class Buffers:
    """The buffers of one stream, by place and layout. The variants of all segments share them."""

    def __init__(self) -> None:
        self._all: dict[tuple[Place, Layout], Buffer] = {}

    def get(self, place: Place, layout: Layout) -> Buffer:
        if (place, layout) not in self._all:
            self._all[place, layout] = Buffer(layout)
        return self._all[place, layout]

    @property
    def bytes(self) -> int:
        return sum(buffer.bytes for buffer in self._all.values())

    @property
    def memory(self) -> frozenset[int]:
        """The addresses of the buffers' storages."""
        return frozenset(storage_address(buffer.tensor) for buffer in self._all.values())


def apart(value: Any, memory: frozenset[int]) -> Any:
    """Return `value`, or a copy if it is a tensor whose storage is at one of these addresses."""
    if not isinstance(value, Tensor) or storage_address(value) not in memory:
        return value
    return duplicates([value], [Layout.of(value)])[0]


@dataclass
class Bound:
    """The memory that each input and each result of a captured variant is bound to, by position.

    weights: inputs that are read where they are, with their addresses. numbers: inputs that are no tensors. copied:
    inputs that are copied to a buffer for each replay, unless they are in it. constant: those among them that nobody
    changes, so that one copy of a tensor is enough. slots: inputs from a slot, by site and index, which the slot keeps
    in the buffer from then on. filled: the buffers that the graph fills; the other results are ``returned``.
    """

    weights: dict[int, int] = field(default_factory=dict)
    numbers: dict[int, Any] = field(default_factory=dict)
    copied: dict[int, Buffer] = field(default_factory=dict)
    constant: set[int] = field(default_factory=set)
    slots: dict[int, tuple[int, int, Buffer]] = field(default_factory=dict)
    filled: dict[int, Buffer] = field(default_factory=dict)
    returned: dict[int, Layout] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)  # results that are no tensors

    @classmethod
    def of(
        cls, executable: Executable, roles: Roles, buffers: Buffers, inputs: Sequence[Any], results: Sequence[Any]
    ) -> Bound:
        """Bind the variant's parameters for calls like the one that had these inputs and results. `results` are the
        layouts of tensors, and all other values themselves."""
        bound, first = cls(), len(executable.inputs)
        for i, value in enumerate(inputs):
            if not isinstance(value, Tensor):
                bound.numbers[i] = value
            elif i < first:
                bound._bind_wire(i, executable.inputs[i], value, roles, buffers)
            elif i < first + len(executable.cached):
                bound._bind_slot(i, executable.cached[i - first], value, roles, buffers)
            else:
                column = executable.columns[i - first - len(executable.cached)]
                bound.copied[i] = buffers.get(("column", column), Layout.of(value))
        bound._bind_results(executable, roles, buffers, results)
        return bound

    def _bind_wire(self, i: int, wire: int, value: Tensor, roles: Roles, buffers: Buffers) -> None:
        if wire in roles.weights:
            self.weights[i] = value.data_ptr()
            return
        self.copied[i] = buffers.get(("wire", wire), Layout.of(value))
        if wire in roles.ours:
            self.constant.add(i)

    def _bind_slot(self, i: int, place: tuple[int, int], value: Tensor, roles: Roles, buffers: Buffers) -> None:
        buffer = buffers.get(("slot", *place), Layout.of(value))
        if place[0] in roles.rolled:
            self.copied[i] = buffer
            self.constant.add(i)
        else:
            self.slots[i] = (*place, buffer)

    def _bind_results(self, executable: Executable, roles: Roles, buffers: Buffers, results: Sequence[Any]) -> None:
        first = len(executable.outputs)
        for i, layout in enumerate(results):
            wire = executable.outputs[i] if i < first else None
            site, index = executable.fresh[i - first] if i >= first else (None, 0)
            if not isinstance(layout, Layout):
                self.results[i] = layout
            elif wire in roles.kept or site in roles.rolled:
                self.returned[i] = layout
            else:
                place: Place = ("slot", site, index) if wire is None else ("wire", wire)
                self.filled[i] = buffers.get(place, layout)

    def fixed(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the inputs that the graph is captured with: `inputs`, with buffers where there are any."""
        found = list(inputs)
        for i, buffer in self.copied.items():
            found[i] = buffer.tensor
        for i, (_, _, buffer) in self.slots.items():
            found[i] = buffer.tensor
        return found

    def warm_up(self) -> None:
        """Copy the buffers of the results as `body` will, but onto themselves: no kernel may be loaded in a capture."""
        filled = list(self.filled.values())
        fill(filled, duplicates([buffer.tensor for buffer in filled], [buffer.layout for buffer in filled]))

    def body(self, run: Callable[..., Sequence[Any]], inputs: Sequence[Any]) -> Sequence[Tensor]:
        """Run the variant and fill the buffers of its results. Returns the other results, in memory of the pool.

        A result that is a view of a buffer that is filled is copied first.
        """
        results = list(run(*inputs))
        memory = frozenset(storage_address(buffer.tensor) for buffer in self.filled.values())
        for i in (*self.filled, *self.returned):
            results[i] = apart(results[i], memory)
        fill(list(self.filled.values()), [results[i] for i in self.filled])
        return [results[i] for i in self.returned]


class Captured:
    """A variant that was captured."""

    def __init__(self, executable: Executable, bound: Bound, replay: Replay) -> None:
        self._executable, self._bound, self._replay = executable, bound, replay
        self.bytes = replay.bytes
        fresh = [buffer for i, buffer in bound.filled.items() if i >= len(executable.outputs)]
        self._fresh = {id(buffer.tensor) for buffer in fresh}
        self._weights, self._addresses = chosen(tuple(bound.weights)), list(bound.weights.values())

    def moved(self, inputs: Sequence[Any]) -> dict[int, Buffer]:
        """Return the buffers, by input, that do not have the value of these inputs yet."""
        bound = self._bound
        found = {i: buffer for i, buffer in bound.copied.items() if inputs[i] is not buffer.tensor}
        for i in bound.constant & found.keys():
            if found[i].is_copy_of(inputs[i]):
                del found[i]
        return found | {i: buffer for i, (_, _, buffer) in bound.slots.items() if inputs[i] is not buffer.tensor}

    def unfit(self, inputs: Sequence[Any], moved: Mapping[int, Buffer], cache: Cache) -> GraphReason | None:
        """Return why the graph cannot run on these inputs, or None if it can."""
        if [*map(Tensor.data_ptr, self._weights(inputs))] != self._addresses:
            return GraphReason.MOVED_WEIGHTS
        if any(inputs[i] != number for i, number in self._bound.numbers.items()):
            return GraphReason.CHANGED_NUMBER
        held = (value for values in cache.values if values is not None for value in values)
        if self._fresh and any(id(value) in self._fresh for value in held):
            return GraphReason.SLOT_IN_USE
        fits = all([buffer.fits(inputs[i]) for i, buffer in moved.items()])
        return None if fits else GraphReason.CHANGED_LAYOUT

    def run(self, inputs: Sequence[Any], moved: Mapping[int, Buffer], wires: list[Any], cache: Cache) -> Fresh:
        """Replay the graph on inputs that fit. Writes its outputs to `wires` and returns the new slot tensors."""
        self._copy(inputs, moved, cache)
        self._replay()
        bound, first = self._bound, len(self._executable.outputs)
        results: dict[int, Any] = {i: buffer.tensor for i, buffer in bound.filled.items()} | bound.results
        results |= zip(bound.returned, duplicates(self._replay.outputs, list(bound.returned.values())), strict=True)
        for i, wire in enumerate(self._executable.outputs):
            wires[wire] = results[i]
        return [(place, results[first + n]) for n, place in enumerate(self._executable.fresh)]

    def _copy(self, inputs: Sequence[Any], moved: Mapping[int, Buffer], cache: Cache) -> None:
        """Fill the buffers of the inputs. A slot keeps its value in the buffer from now on, so it is copied once."""
        fill(list(moved.values()), [inputs[i] for i in moved])
        for i in self._bound.constant & moved.keys():
            moved[i].note_source(inputs[i])
        for i in self._bound.slots.keys() & moved.keys():
            site, index, buffer = self._bound.slots[i]
            values: Mapping[int, Tensor] = dict(enumerate(cache.values[site] or ())) | {index: buffer.tensor}
            cache.values[site] = tuple(values.values())
