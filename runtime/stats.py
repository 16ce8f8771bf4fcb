"""What was counted while a rewritten model ran."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from dit_rewrite.errors import Reason


@dataclass(frozen=True)
class Decision:
    """One call of one graph: a row of `Stats.decisions`.

    ``strategies`` maps each guarded site to "compute" or "reuse" (what only holds something for another: "fill" or
    "leave" its slot), ``reasons`` to why.
    """

    trajectory: int
    step: int
    stream: Hashable
    occurrence: int
    strategies: dict[str, str]
    reasons: dict[str, Reason]


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

    def decision(self) -> Decision:
        done = zip(self.names, self.row, self.reasons, strict=True)
        strategies = {name: _SLOTS.get(reason, "reuse" if reused else "compute") for name, reused, reason in done}
        return Decision(
            self.trajectory,
            self.step,
            self.stream,
            self.occurrence,
            strategies,
            dict(zip(self.names, self.reasons, strict=True)),
        )


@dataclass
class Stats:
    """Counts since the model was compiled.

    ``calls`` of the model; ``computed`` and ``reused`` site decisions; ``variants`` compiled, of which
    ``late_variants`` during a trajectory; ``recompiles`` and ``graph_breaks`` that Dynamo made; ``cache_bytes`` held
    now; ``hoists``, how often what is computed once per trajectory was computed; ``misses`` by reason: a rule would
    have reused and no value fitted; ``trajectories`` by the reason they began.
    """

    calls: int = 0
    computed: int = 0
    reused: int = 0
    variants: int = 0
    late_variants: int = 0
    recompiles: int = 0
    graph_breaks: int = 0
    cache_bytes: int = 0
    hoists: int = 0
    misses: Counter[Reason] = field(default_factory=Counter)
    trajectories: Counter[Reason] = field(default_factory=Counter)
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=10_000), repr=False)

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
        self.reused += reused - record.reasons.count(Reason.UNREAD)
        self.computed += len(record.row) - reused - record.reasons.count(Reason.WILL_BE_READ)
        if misses:
            self.misses.update(misses)
        self.records.append(record)

    def __str__(self) -> str:
        lines = [
            f"{self.calls} calls: {self.reused} values reused, {self.computed} computed "
            f"(Recomp {self.recomputed_fraction:.1%})",
            f"{self.variants} variants ({self.late_variants} compiled late), {self.recompiles} recompiles, "
            f"{self.graph_breaks} graph breaks, {self.cache_bytes / 2**20:.2f} MiB cached",
        ]
        lines += [f"missed {n} times: {reason}" for reason, n in self.misses.most_common()]
        return "\n".join(lines)
