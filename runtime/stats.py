"""Counters of a rewritten model, and the decisions that it made."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from dit_rewrite.errors import DecisionReason, GraphReason, Reason, StreamReason, TableReason, TrajectoryReason
from dit_rewrite.runtime.block_counts import BlockCounts, Certificate, KeptBlocks
from dit_rewrite.runtime.decide import Decisions, SiteSpec


@dataclass(frozen=True)
class Decision:
    """The decisions of one call of one graph: a row of `Stats.decisions`.

    strategies: maps each guarded site to "compute", "reuse", "forecast" or "verify"; a site that only keeps a value for
    another site has "fill" or "leave". reasons: maps each site to the reason. measured: maps each site whose guard or
    forecast read measurements to their values by symbol.
    """

    trajectory: int
    step: int
    stream: Hashable
    occurrence: int
    strategies: dict[str, str]
    reasons: dict[str, Reason]
    measured: dict[str, dict[str, float]]


class TimedCall(NamedTuple):
    """The seconds of one call of the model, the device's work included.

    ``reused``: how many site decisions reused a value. ``compiles``: the call also compiled something.
    """

    trajectory: int | None
    seconds: float
    reused: int
    compiles: bool


_COUNTERS = ("misses", "trajectories", "streams", "tables", "uncaptured")
_SLOTS: dict[Reason, str] = {
    DecisionReason.WILL_BE_READ: "fill",  # a site that only keeps a value for another site
    DecisionReason.UNREAD: "leave",
    DecisionReason.VERIFIED: "verify",  # computes, and leaves its slot as it is
}


class Record(NamedTuple):
    """A Decision in the compact form that is recorded during a call; `decision` converts it on demand."""

    trajectory: int
    step: int
    stream: Hashable
    graph: int
    occurrence: int
    names: tuple[str, ...]
    row: tuple[bool, ...]
    reasons: tuple[Reason, ...]
    weights: tuple[tuple[float, ...] | None, ...] = ()
    measured: Mapping[int, Mapping[str, float]] = MappingProxyType({})

    def decision(self) -> Decision:
        did = ["reuse" if reused else "compute" for reused in self.row]
        for i, weights in enumerate(self.weights):
            did[i] = did[i] if weights is None else "forecast"
        done = zip(self.names, did, self.reasons, strict=True)
        strategies = {name: _SLOTS.get(reason, what) for name, what, reason in done}
        return Decision(
            self.trajectory,
            self.step,
            self.stream,
            self.occurrence,
            strategies,
            dict(zip(self.names, self.reasons, strict=True)),
            {self.names[site]: dict(numbers) for site, numbers in self.measured.items()},
        )


@dataclass
class Stats:
    """Counters since the model was compiled; all threads share them.

    calls: calls of the model. computed, reused: site decisions. variants: compiled variants, of which late_variants
    were compiled during a trajectory. recompiles, graph_breaks: those of Dynamo.
    cache_bytes: size of the cache now. peak_bytes: its largest size so far, over all streams of a thread.
    hoists: how often the values that are computed once per trajectory were computed.
    misses: by reason, how often a rule would have reused a site whose slot had no valid value.
    num_trajectories: all trajectories. trajectories: those that the caller did not mark, by the reason they began.
    streams: streams that have no values, or have lost them, by reason.
    table_rows: rows of step tables that were computed. table_bytes: the largest size of a graph's rows so far.
    tables: by reason, how often rows were dropped or computed anew, or weights were not released. released_bytes: the
    bytes of weights that are released now.
    captures, replays: of CUDA graphs; a call replays one for each segment. uncaptured: by reason, how often a segment
    ran without its graph. graph_bytes: the memory of graphs and their buffers, the slots among them.
    timed: the last 10,000 calls with their times, if the caller asked for these.
    """

    calls: int = 0
    computed: int = 0
    reused: int = 0
    variants: int = 0
    late_variants: int = 0
    recompiles: int = 0
    graph_breaks: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    hoists: int = 0
    misses: Counter[Reason] = field(default_factory=Counter)
    num_trajectories: int = 0
    trajectories: Counter[TrajectoryReason] = field(default_factory=Counter)
    streams: Counter[StreamReason] = field(default_factory=Counter)
    table_rows: int = 0
    table_bytes: int = 0
    tables: Counter[TableReason] = field(default_factory=Counter)
    timed: deque[TimedCall] = field(default_factory=lambda: deque(maxlen=10_000), repr=False)
    released_bytes: int = 0
    captures: int = 0
    replays: int = 0
    graph_bytes: int = 0
    uncaptured: Counter[GraphReason] = field(default_factory=Counter)
    blocks: BlockCounts = field(default_factory=BlockCounts, repr=False, compare=False)
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=10_000), repr=False)
    records_seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def kept_blocks(self) -> dict[str, KeptBlocks]:
        """For each attention that reused blocks of keys, how many it kept; steps that computed it are not counted.

        Reading this waits for the device. No step of the model did.
        """
        return self.blocks.kept()

    @property
    def certificates(self) -> list[Certificate]:
        """The last 10,000 bounds of attentions with ``certify=True``, oldest first. Reading this waits for the device.

        Each bounds the error of the output of one attention at one step, not that of the image, see `BlockwiseReuse`.
        """
        return self.blocks.certificates()

    @property
    def recomputed_fraction(self) -> float:
        """Fraction of the site decisions that computed: Recomp% of FORA (table 1), as a fraction of 1."""
        total = self.computed + self.reused
        return self.computed / total if total else 1.0

    @property
    def computing_seconds(self) -> float | None:
        """The median seconds of a call whose sites all computed, or None without one."""
        seconds = [call.seconds for call in self.timed if not (call.reused or call.compiles)]
        return median(seconds) if seconds else None

    @property
    def speedup(self) -> float | None:
        """The measured speed-up over the trajectories that compiled nothing; None without one.

        It is the time of as many computing calls, divided by that of the calls. Calls with as many reused sites count
        with their median, because other load on the machine delays single calls.
        """
        compiled = {call.trajectory for call in self.timed if call.compiles}
        groups: dict[int, list[float]] = {}
        for call in self.timed:
            if call.trajectory not in compiled:
                groups.setdefault(call.reused, []).append(call.seconds)
        took = sum(len(group) * median(group) for group in groups.values())
        whole = self.computing_seconds
        return sum(map(len, groups.values())) * whole / took if took and whole is not None else None

    @property
    def decisions(self) -> list[Decision]:
        """The decisions of the last 10,000 calls of captured graphs."""
        return [record.decision() for record in self.records]

    def count(self, record: Record, misses: tuple[Reason, ...], counts: tuple[int, int]) -> None:
        """Record the decisions of one call of a graph. `counts`: how many sites computed, and how many reused."""
        computed, reused = counts
        with self.lock:
            self.computed += computed
            self.reused += reused
            if misses:
                self.misses.update(misses)
            self.records.append(record)
            self.records_seen += 1

    def note_blocks(
        self,
        sites: Sequence[tuple[int, SiteSpec]],
        values: Sequence[tuple[Tensor, ...] | None],
        decided: Decisions,
        when: tuple[int, int, Hashable],
    ) -> None:
        """Register the blocks of attention that a call kept, see `BlockCounts.note`."""
        with self.lock:
            self.blocks.note(sites, values, decided, when)

    def time(self, call: TimedCall) -> None:
        """Record the time of a call."""
        with self.lock:
            self.timed.append(call)

    def called(self) -> None:
        """Count a call of the model."""
        with self.lock:
            self.calls += 1

    def miss(self, reason: Reason) -> None:
        """Count a miss of a whole graph."""
        with self.lock:
            self.misses[reason] += 1

    def dropped(self, reason: TableReason, count: int = 1) -> None:
        """Count rows of step tables that were dropped, or computed anew."""
        with self.lock:
            self.tables[reason] += count

    def not_captured(self, reason: GraphReason) -> None:
        """Count a segment that ran without a CUDA graph."""
        with self.lock:
            self.uncaptured[reason] += 1

    def begin(self, why: TrajectoryReason | None) -> None:
        """Count a new trajectory. `why` is None if the caller marked it."""
        with self.lock:
            self.num_trajectories += 1
            if why is not None:
                self.trajectories[why] += 1

    def add(self, name: str, count: int = 1) -> None:
        """Add `count` to the counter `name`."""
        with self.lock:
            setattr(self, name, getattr(self, name) + count)

    def since(self, earlier: Stats) -> Stats:
        """Return the counts since `earlier`, which `copy` made. Sizes in bytes are not subtracted."""
        numbers = ["calls", "computed", "reused", "variants", "late_variants", "recompiles", "graph_breaks", "hoists"]
        numbers += ["num_trajectories", "table_rows", "captures", "replays"]
        changes: dict[str, Any] = {name: getattr(self, name) - getattr(earlier, name) for name in numbers}
        for name in _COUNTERS:
            changes[name] = getattr(self, name) - getattr(earlier, name)
        calls = self.records_seen - earlier.records_seen
        changes["blocks"] = self.blocks.since(earlier.blocks)
        return replace(self, **changes, records=deque(list(self.records)[max(len(self.records) - calls, 0) :]))

    def copy(self, **changes: Any) -> Stats:
        """Return a copy of the counters; the records of decisions are shared."""
        with self.lock:
            counters = {name: getattr(self, name).copy() for name in _COUNTERS}
            return replace(self, **counters, blocks=self.blocks.snapshot(), **changes)

    def __str__(self) -> str:
        lines = [
            f"{self.calls} calls: {self.reused} values reused, {self.computed} computed "
            f"(Recomp {self.recomputed_fraction:.1%})",
            f"{self.variants} variants ({self.late_variants} compiled late), {self.recompiles} recompiles, "
            f"{self.graph_breaks} graph breaks, {self.peak_bytes / 2**20:.2f} MiB cached at most",
        ]
        lines += [f"missed {n} times: {reason}" for reason, n in self.misses.most_common()]
        lines += [f"{self.num_trajectories} trajectories"]
        lines += [f"a trajectory began {n} times: {why}" for why, n in self.trajectories.most_common()]
        if self.blocks.any:
            kept, total = map(sum, zip(*self.kept_blocks.values(), strict=True))
            lines += [f"{kept} of {total} blocks of attention kept ({kept / total:.1%})"]
        if self.table_rows:
            lines += [f"{self.table_rows} rows of step tables computed, {self.table_bytes / 2**20:.2f} MiB at most"]
        if self.released_bytes:
            lines += [f"{self.released_bytes / 2**20:.2f} MiB of weights released"]
        lines += [f"step table, {n} times: {why}" for why, n in self.tables.most_common()]
        if self.captures:
            memory = f"{self.graph_bytes / 2**20:.2f} MiB"
            lines += [f"{self.captures} CUDA graphs captured, {self.replays} replays, {memory} with buffers"]
        lines += [f"no CUDA graph, {n} times: {why}" for why, n in self.uncaptured.most_common()]
        lines += [f"stream, {n} times: {why}" for why, n in self.streams.most_common() if n]
        return "\n".join(lines)
