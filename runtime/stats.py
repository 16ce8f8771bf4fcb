"""What was counted while a rewritten model ran."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dit_rewrite.errors import Reason


@dataclass(frozen=True)
class Decision:
    """One call of one graph: a row of `Stats.decisions`.

    ``strategies`` maps each guarded site to "compute", "reuse" or "forecast" (what only holds something for another:
    "fill" or "leave" its slot), ``reasons`` to why; ``measured`` each site whose guard read measurements to these, by
    symbol.
    """

    trajectory: int
    step: int
    stream: Hashable
    occurrence: int
    strategies: dict[str, str]
    reasons: dict[str, Reason]
    measured: dict[str, dict[str, float]]


_SLOTS = {Reason.WILL_BE_READ: "fill", Reason.UNREAD: "leave"}  # of what only holds something for another site


@dataclass(frozen=True)
class Record:
    """A Decision as it is noted during a call: tuples, put into words only when somebody looks."""

    trajectory: int
    step: int
    stream: Hashable
    graph: int
    occurrence: int
    names: tuple[str, ...]
    row: tuple[bool, ...]
    reasons: tuple[Reason, ...]
    weights: tuple[tuple[float, ...] | None, ...] = ()
    measured: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

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
    """Counts since the model was compiled.

    ``calls`` of the model; ``computed`` and ``reused`` site decisions; ``variants`` compiled, of which
    ``late_variants`` during a trajectory; ``recompiles`` and ``graph_breaks`` that Dynamo made; ``cache_bytes`` held
    now, ``peak_bytes`` at most so far by all streams of a thread; ``hoists``, how often values that are computed once
    per trajectory were computed; ``misses`` by reason: a rule would have reused and no value fitted;
    ``num_trajectories`` in all, ``trajectories`` by the reason they began where the caller did not mark them;
    ``streams`` that have no values of their own, or none any more, by the reason. Threads share them.
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
    trajectories: Counter[Reason] = field(default_factory=Counter)
    streams: Counter[Reason] = field(default_factory=Counter)
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=10_000), repr=False)
    records_seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def recomputed_fraction(self) -> float:
        """Computed site decisions over all of them: FORA's Recomp% (table 1), as a fraction."""
        total = self.computed + self.reused
        return self.computed / total if total else 1.0

    @property
    def decisions(self) -> list[Decision]:
        """A row per call of a captured graph, the last 10,000."""
        return [record.decision() for record in self.records]

    def count(self, record: Record, misses: tuple[Reason, ...]) -> None:
        """Note the decisions of one call of a graph."""
        reused = sum(record.row)
        with self.lock:
            self.reused += reused - record.reasons.count(Reason.UNREAD)
            self.computed += len(record.row) - reused - record.reasons.count(Reason.WILL_BE_READ)
            if misses:
                self.misses.update(misses)
            self.records.append(record)
            self.records_seen += 1

    def called(self) -> None:
        """Count a call of the model."""
        with self.lock:
            self.calls += 1

    def miss(self, reason: Reason) -> None:
        """Note that no value could be used, for a reason that concerns a whole graph."""
        with self.lock:
            self.misses[reason] += 1

    def begin(self, why: Reason | None) -> None:
        """A trajectory begins; `why` is None where the caller marked it."""
        with self.lock:
            self.num_trajectories += 1
            if why is not None:
                self.trajectories[why] += 1

    def add(self, name: str, count: int = 1) -> None:
        """Add to one of the counts."""
        with self.lock:
            setattr(self, name, getattr(self, name) + count)

    def since(self, earlier: Stats) -> Stats:
        """What was counted since `earlier`, a copy; `cache_bytes` is of now."""
        numbers = ["calls", "computed", "reused", "variants", "late_variants", "recompiles", "graph_breaks", "hoists"]
        numbers += ["num_trajectories"]
        changes: dict[str, Any] = {name: getattr(self, name) - getattr(earlier, name) for name in numbers}
        for name in ("misses", "trajectories", "streams"):
            changes[name] = getattr(self, name) - getattr(earlier, name)
        calls = self.records_seen - earlier.records_seen
        return replace(self, **changes, records=deque(list(self.records)[max(len(self.records) - calls, 0) :]))

    def copy(self, **changes: Any) -> Stats:
        """The counts so far; the rows of decisions are shared."""
        with self.lock:
            counters = {name: getattr(self, name).copy() for name in ("misses", "trajectories", "streams")}
            return replace(self, **counters, **changes)

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
        lines += [f"stream, {n} times: {why}" for why, n in self.streams.most_common() if n]
        return "\n".join(lines)
