"""The step tables of a graph at run time: rows of values that depend on the step and the conditioning alone.

A row is found by the value of the timestep, and belongs to the weights and the conditioning that it was computed from.
If the timesteps of the trajectory are known, the rows of all steps are computed by one batched call; otherwise
a row is computed when a step first reads it. Rows that depend on no conditioning outlive the trajectory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_rewrite.errors import TableReason
from dit_rewrite.runtime.clock import Clock
from dit_rewrite.runtime.schedule import numbers
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.tensors import Memoized

SHARE = 8  # the rows of a graph take at most this part of the memory that caches may take, and so does computing them
BATCH = 64  # rows that are computed at once
MOST = 8  # tables that are kept, of the conditioning of several streams or prompts
STEADY = 2  # how often the conditioning of a cache may change before rows are no longer computed ahead

Columns = tuple[str, ...]
Times = tuple[float, ...] | None  # the timesteps of a schedule


class Program(Protocol):
    """Computes rows. ``step``, ``weights``, ``conditioning`` and ``sizes`` are positions among a graph's inputs.
    ``columns`` are those that some variant reads."""

    columns: Columns
    step: tuple[int, ...]
    weights: tuple[int, ...]
    conditioning: tuple[int, ...]
    sizes: tuple[int, ...]

    def add(self, columns: Columns) -> None:
        """Add the columns that a variant reads."""

    def bytes_of(self, columns: Columns) -> int:
        """Return the bytes of a row with these columns."""

    def peak_of(self, columns: Columns) -> int:
        """Return the most bytes that each row takes while rows with these columns are computed at once."""

    def row(self, columns: Columns, args: Sequence[Any]) -> Sequence[Tensor]:
        """Return the values of `columns` for the timestep in `args`."""

    def rows(self, columns: Columns, args: Sequence[Any], timesteps: Tensor) -> Sequence[Tensor] | None:
        """Return the values of `columns` for each of `timesteps`, stacked; None if an op cannot be batched."""

    def checksum(self, args: Sequence[Any]) -> Tensor:
        """Return the checksum of the weights, see `tensors.checksum`."""

    def release(self, args: Sequence[Any]) -> None:
        """Release the weights that only rows are computed from, if the caller asked for that."""


class Row:
    """The values of one step by column, and the tuples of them that variants take."""

    __slots__ = ("values", "bytes", "_taken")

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.bytes = 0
        self._taken: dict[Columns, tuple[Tensor, ...]] = {}

    def take(self, columns: Columns) -> tuple[Tensor, ...] | None:
        """Return the values of `columns`, or None if one is missing."""
        taken = self._taken.get(columns)
        if taken is None and all(column in self.values for column in columns):
            taken = self._taken[columns] = tuple(map(self.values.__getitem__, columns))
        return taken

    def put(self, columns: Columns, values: Sequence[Tensor]) -> None:
        """Set the values of `columns`."""
        self.values.update(zip(columns, values, strict=True))
        self._taken.clear()
        self.bytes = sum(value.nbytes for value in self.values.values())


@dataclass
class Table:
    """The rows for one state of the weights, one conditioning and one schedule, by timestep, the oldest first.

    ``times`` are the timesteps of the schedule, None without one: rows are computed in batches, another schedule may
    round them differently, and a trajectory must not depend on earlier ones. ``content`` is the checksum of the
    weights, which a trajectory compares before it reads rows of another one.
    """

    weights: Memoized
    content: Tensor
    conditioning: Memoized
    times: Times
    rows: OrderedDict[Hashable, Row] = field(default_factory=OrderedDict)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows.values())


@dataclass
class Bookmark:
    """The table that the last call of a cache's graph read, and the number of tables that such calls have read.

    ``row`` is the row of the current call, which several segments of the graph read.
    """

    table: Table | None = None
    row: Row | None = None
    count: int = 0

    def begin(self, explicit: bool) -> None:
        """Begin a call of the graph, after `Cache.fit` has forgotten the table if a weight has another version.

        Inference tensors have no version counter. They count as unmodified only in an `explicit` trajectory; otherwise
        the table is forgotten, and found again by their content.
        """
        self.row = None
        if self.table is not None and not explicit and None in self.table.weights.versions:
            self.table = None


class Tables:
    """The tables of one graph in one thread. Their rows take at most `limit` bytes."""

    def __init__(self, program: Program, stats: Stats, limit: Callable[[], int]) -> None:
        self._program, self._stats, self._limit = program, stats, limit
        self._tables: list[Table] = []  # the most recently used last
        self._batched = True

    def read(
        self, columns: Columns, args: Sequence[Any], bookmark: Bookmark, explicit: bool, clock: Clock | None
    ) -> tuple[Tensor, ...]:
        """Return the values of `columns` for the call of a graph with the inputs `args`.

        `explicit`: whether the caller marked the trajectory. `clock` knows its timesteps.
        """
        taken = None if bookmark.row is None else bookmark.row.take(columns)
        if taken is not None:
            return taken
        table, key = self._table(args, bookmark, explicit, clock), self._key(args, clock)
        row = bookmark.row = table.rows.get(key) if key is not None else None
        taken = None if row is None else row.take(columns)
        if taken is not None:
            return taken
        if key is None:
            self._stats.dropped(TableReason.UNREADABLE)
            return tuple(self._program.row(columns, args))
        self._fill(table, key, args, clock if bookmark.count <= STEADY else None)
        bookmark.row = table.rows[key]
        filled = bookmark.row.take(columns)
        assert filled is not None
        self._bound(table, key)
        return filled

    @property
    def bytes(self) -> int:
        return sum(table.bytes for table in self._tables)

    def drop_dead(self) -> None:
        """Drop the rows of conditioning that was freed."""
        self._tables = [table for table in self._tables if table.conditioning.is_alive]

    @property
    def _share(self) -> int:
        """The bytes that the rows of one table may take. It does not depend on the other tables: streams would drop
        each other's rows in turn, and the rows of an image would be computed in other batches behind other images."""
        return self._limit() // SHARE // MOST

    def _table(self, args: Sequence[Any], bookmark: Bookmark, explicit: bool, clock: Clock | None) -> Table:
        """Return the table for the weights and the conditioning of a call.

        `Cache.fit` has compared the versions of the weights. In the first call of a trajectory their content is
        compared too, which reads the device once if there are rows of another trajectory. For inference tensors, which
        have no version, only the content is compared. The table of conditioning that changes from call to call is not
        kept for other trajectories: the checksum reads all weights.
        """
        conditioning = [args[i] for i in self._program.conditioning]
        before, times = bookmark.table, None if clock is None else clock.times
        if before is not None and before.times == times and before.conditioning.valid_for(conditioning, explicit):
            return before
        weights = [args[i] for i in self._program.weights]
        current = [table for table in self._tables if table.weights.valid_for(weights, explicit=True)]
        if len(current) < len(self._tables):
            self._stats.dropped(TableReason.NEW_WEIGHTS, len(self._tables) - len(current))
        same = [table for table in current if table.conditioning.valid_for(conditioning, explicit=False)]
        fitting = [table for table in same if table.times == times]
        if before is not None and not same:
            self._stats.dropped(TableReason.NEW_CONDITIONING)
        fleeting = not fitting and bookmark.count >= STEADY
        content = torch.zeros(0) if fleeting else self._program.checksum(args)
        if fitting and not torch.equal(fitting[0].content, content):
            self._stats.dropped(TableReason.NEW_WEIGHTS)
            current, fitting = [table for table in current if table is not fitting[0]], []
        new = Table(Memoized.of(weights, ()), content, Memoized.of(conditioning, ()), times)
        found = fitting[0] if fitting else new
        alive = [table for table in current if table is not found and table.conditioning.is_alive]
        self._tables = alive if fleeting else [*alive, found][-MOST:]
        bookmark.table, bookmark.count = found, bookmark.count + 1
        return found

    def _key(self, args: Sequence[Any], clock: Clock | None) -> Hashable:
        """Return all sizes, and the value of the timestep with its dtype and shape; None if it cannot be read."""
        parts: list[Hashable] = self._sizes(args)
        for i in self._program.step:
            value = args[i]
            if isinstance(value, Tensor):
                found = numbers(value) if clock is None else clock.numbers(value)
                if found is None:
                    return None
                parts.append(_key_of(value, found))
            else:
                parts.append(value)
        return tuple(parts)

    def _sizes(self, args: Sequence[Any]) -> list[Hashable]:
        """Return the sizes that rows depend on. Of a tensor among these inputs, rows depend on the shape alone."""
        given = (args[i] for i in self._program.sizes)
        return [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in given]

    def _fill(self, table: Table, key: Hashable, args: Sequence[Any], clock: Clock | None) -> None:
        """Compute the row of a call and, if the timesteps are known ahead, the rows of other steps."""
        columns = self._program.columns
        batch = self._batch(table, key, columns, args, clock)
        if len(batch) > 1:
            device = args[self._program.step[0]].device
            stacked = self._program.rows(columns, args, torch.stack(list(batch.values())).to(device))
            if stacked is not None:
                for number, each in enumerate(batch):
                    self._put(table, each, columns, [values[number].clone() for values in stacked])
                self._program.release(args)  # not after a single row: the next step may compute another one
                return
            self._batched = False
            self._stats.dropped(TableReason.NOT_BATCHED)
        self._put(table, key, columns, self._program.row(columns, args))

    def _batch(
        self, table: Table, key: Hashable, columns: Columns, args: Sequence[Any], clock: Clock | None
    ) -> dict[Hashable, Tensor]:
        """Return the timesteps by key whose rows are computed together with that of a call.

        They are a fixed part of the schedule, since rounding may depend on the number of rows: a row is the same
        whichever step reads it first, and so are the images.
        """
        timestep = args[self._program.step[0]]
        if clock is None or not self._batched or len(self._program.step) != 1 or not isinstance(timestep, Tensor):
            return {}
        given, sizes = clock.given(timestep), self._sizes(args)
        keys = [(*sizes, _key_of(value, value.flatten().tolist())) for value in given]
        room = self._limit() // SHARE // max(self._program.peak_of(columns), 1)  # while they are computed
        size = min(self._share // max(self._program.bytes_of(columns), 1), room, BATCH)
        if size < 1 or key not in keys:
            return {}
        first = keys.index(key) // size * size
        return dict(list(zip(keys, given, strict=True))[first : first + size])

    def _put(self, table: Table, key: Hashable, columns: Columns, values: Sequence[Tensor]) -> None:
        table.rows.setdefault(key, Row()).put(columns, values)
        self._stats.add("table_rows")

    def _bound(self, table: Table, key: Hashable) -> None:
        """Drop the oldest rows of a table until the rest is within its share, but not the row of this call."""
        size, oldest = table.bytes, [old for old in table.rows if old != key]
        if size > self._share and oldest:
            self._stats.dropped(TableReason.OVER_LIMIT)
        while size > self._share and oldest:
            size -= table.rows.pop(oldest.pop(0)).bytes
        self._stats.table_bytes = max(self._stats.table_bytes, self.bytes)


def _key_of(timestep: Tensor, values: Sequence[float]) -> Hashable:
    return timestep.dtype, timestep.shape, *values
