"""Session and statistics: calls that return or raise, occurrences, layers, trajectories."""

from __future__ import annotations

import threading

import pytest
import torch

from dit_rewrite.errors import BadTrajectory, DecisionReason, MissReason, TrajectoryReason
from dit_rewrite.runtime.history import Computed, Moment
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.session import Call, Session
from dit_rewrite.runtime.slots import Transition
from dit_rewrite.runtime.stats import Record, Stats
from dit_rewrite.runtime.trajectory import Clock, Named, Stream, Trajectory

C = torch.zeros(1)


def call(stream: Stream | None = None) -> Call:
    return Call(Trajectory(None, step=4), stream or Stream("main"), given(0.0, 0.0))


def given(x: float, time: float) -> Inputs:
    return Inputs(torch.tensor([1.0, x]), time, (C,))


def ran(session: Session, *graphs: int, layers: int = 0) -> list[MissReason | None]:
    """Call the model so that it runs these graphs; return why the slots of each cannot be used."""
    ran.time -= 1.0  # type: ignore[attr-defined]
    under_way = session.begin(given(0.0, ran.time))  # type: ignore[attr-defined]
    reasons = [under_way.enter(graph, 1)[2] for graph in graphs]
    under_way.layers = layers
    session.end(under_way)
    return reasons


ran.time = 0.0  # type: ignore[attr-defined]


def explicit() -> Session:
    session = Session(Stats())
    session.enter(Clock(9))
    return session


def test_occurrences_have_banks_of_their_own() -> None:
    under_way = call()
    entered = [under_way.enter(graph, 2) for graph in (0, 1, 1, 0, 1)]
    assert [occurrence for occurrence, _, _ in entered] == [0, 0, 1, 1, 2]
    assert len({id(cache) for _, cache, _ in entered}) == 5
    again = Call(under_way.trajectory, under_way.stream, under_way.inputs)
    assert [again.enter(graph, 2)[1] for graph in (0, 1, 1, 0, 1)] == [cache for _, cache, _ in entered]


def test_without_an_order_other_graphs_between_are_no_miss() -> None:
    """The order itself is still noted, and counts for the callers that ask for it."""
    session = explicit()
    for graphs in ((0, 1, 0), (0, 2, 3, 0)):
        ran.time -= 1.0  # type: ignore[attr-defined]
        under_way = session.begin(given(0.0, ran.time))  # type: ignore[attr-defined]
        entered = [under_way.enter(graph, 1, ordered=False) for graph in graphs]
        assert [reason for _, _, reason in entered] == [None] * len(graphs)
        caches = [cache for graph, (_, cache, _) in zip(graphs, entered, strict=True) if graph == 0]
        assert len(caches) == 2 and all(cache.values == [None] for cache in caches)
        session.end(under_way)
    assert ran(session, 0, 1)[1] is MissReason.CHANGED_GRAPH


def test_another_graph_at_a_place_is_a_miss_from_there_on() -> None:
    session = explicit()
    assert ran(session, 0, 1, 1) == [None] * 3
    assert ran(session, 0, 1, 1) == [None] * 3
    assert ran(session, 0, 2, 1) == [None, MissReason.CHANGED_GRAPH, None]
    assert ran(session, 0, 1, 1) == [None, MissReason.CHANGED_GRAPH, None]
    assert ran(session, 0, 1) == [None] * 2
    assert ran(session, 0, 1, 1) == [None, None, MissReason.CHANGED_GRAPH]


def test_a_changed_place_is_emptied() -> None:
    session = explicit()
    under_way = session.begin(given(0.0, 0.0))
    _, cache, _ = under_way.enter(0, 1)
    cache.fit((), ())
    cache.update(0, Transition.FILL, (C,), Computed(0))
    session.end(under_way)
    ran(session, 1)
    under_way = session.begin(given(0.0, ran.time - 1))  # type: ignore[attr-defined]
    assert under_way.enter(0, 1) == (0, cache, MissReason.CHANGED_GRAPH)
    assert (cache.values, cache.stamp) == ([None], None)


def test_a_call_that_raised_leaves_nothing() -> None:
    session = explicit()
    ran(session, 0, 1)
    under_way = session.begin(given(0.0, 0.0))
    under_way.enter(0, 1)
    session.abandon(under_way)
    assert session.call is None
    assert (under_way.stream.caches, under_way.stream.sequence) == ({}, None)
    assert session.stats.calls == 1
    assert ran(session, 1) == [None], "the sequence was forgotten"


def test_layers_are_counted_over_the_graphs_of_a_call() -> None:
    session = explicit()
    under_way = session.begin(given(0.0, 0.0))
    stream = under_way.stream.name
    assert under_way.moment == Moment(0, 9, 0, None, stream=stream)
    under_way.layers = 6
    session.end(under_way)
    under_way = session.begin(given(0.0, -1.0))
    assert under_way.moment == Moment(1, 9, 0, 6, stream=stream)
    under_way.layers = 2
    assert under_way.moment == Moment(1, 9, 2, 6, stream=stream)


def test_a_call_without_any_graph_is_counted() -> None:
    session = explicit()
    ran(session)
    ran(session, 0)
    assert session.stats.calls == 2
    assert session.stats.misses == {MissReason.NOT_CAPTURED: 1}
    assert session.ran == (0,)


def test_trajectories_are_counted_by_why_they_began() -> None:
    session = Session(Stats())
    for x, time in ((0.0, 9.0), (0.1, 8.0), (0.2, 9.0), (0.3, 8.0)):
        session.end(session.begin(given(x, time)))
    assert session.stats.trajectories == {TrajectoryReason.FIRST_CALL: 1, TrajectoryReason.TIMESTEP_TURNED: 1}
    session.enter(Clock(2))
    session.end(session.begin(given(0.0, 9.0)))
    assert session.stats.trajectories == {TrajectoryReason.FIRST_CALL: 1, TrajectoryReason.TIMESTEP_TURNED: 1}, (
        "explicit ones have none"
    )


def test_telling_twice() -> None:
    session = explicit()
    with pytest.raises(BadTrajectory, match="inside another. Leave the outer context first"):
        session.enter(Clock(2))


def test_a_run_interrupts_another_run() -> None:
    """A preview of the same prompt begins at the first timestep again, and is cut short. The outer run goes on."""
    session = Session(Stats())
    outer = session.enter(Clock(9), of_run=True)
    session.end(session.begin(given(0.0, 9.0)))
    stream = outer.trajectory.streams.all[0]
    inner = session.enter(Clock(9), of_run=True)
    assert session.begin(given(0.0, 9.0)).stream is not stream
    with pytest.raises(BadTrajectory):
        session.enter(Clock(9))
    session.leave(inner)
    after = session.begin(given(0.1, 8.0))
    assert (after.stream, after.trajectory.step) == (stream, 1)
    session.leave(outer)
    assert session.explicit is None


def test_a_trajectory_that_another_thread_closes() -> None:
    """Web servers run the steps of a generator in different threads."""
    session = Session(Stats())
    trajectory = session.enter(Clock(9))
    thread = threading.Thread(target=session.leave, args=(trajectory,))
    thread.start()
    thread.join()
    assert session.explicit is None
    assert session.enter(Clock(2)) is session.explicit


@pytest.mark.parametrize("mode", ["explicit", "inferred"])
def test_forgetting(mode: str) -> None:
    session = explicit() if mode == "explicit" else Session(Stats())
    for x in (0.0, 0.1):
        under_way = session.begin(given(x, 9.0 - x))
        _, cache, _ = under_way.enter(0, 1)
        cache.update(0, Transition.FILL, (torch.zeros(5),), Computed(0))
        session.end(under_way)
    assert (under_way.trajectory.step, session.cache_bytes()) == (1, 20)
    session.forget()
    assert session.cache_bytes() == 0
    after = session.begin(given(0.2, 8.8))
    assert (after.trajectory.step, after.stream.caches) == (0, {})
    assert after.trajectory.num_steps == (9 if mode == "explicit" else None)


def test_bytes_are_those_of_all_streams() -> None:
    session = explicit()
    for name in ("cond", "uncond"):
        session.named = Named(name)
        under_way = session.begin(given(0.0, 0.0))
        under_way.enter(0, 1)[1].update(0, Transition.FILL, (torch.zeros(5),), Computed(0))
        session.end(under_way)
    assert session.cache_bytes() == 40


# --- counts -----------------------------------------------------------------------------------------------------------


def record(row: tuple[bool, ...], step: int = 3) -> Record:
    return Record(
        2,
        step,
        "cond",
        0,
        1,
        ("a", "b", "c"),
        row,
        (DecisionReason.RULE, DecisionReason.NO_RULE, DecisionReason.COVERED),
    )


def test_counting() -> None:
    stats = Stats()
    assert stats.recomputed_fraction == 1.0, "nothing was reused"
    stats.count(record((True, False, True)), (), (1, 2))
    stats.count(record((False, False, False)), (MissReason.EMPTY, MissReason.EMPTY, MissReason.BEYOND_END), (3, 0))
    assert (stats.computed, stats.reused) == (4, 2)
    assert stats.recomputed_fraction == pytest.approx(4 / 6)
    assert stats.misses == {MissReason.EMPTY: 2, MissReason.BEYOND_END: 1}


def test_decisions_are_rows_in_words() -> None:
    stats = Stats()
    stats.count(record((True, False, True)), (), (1, 2))
    (row,) = stats.decisions
    assert (row.trajectory, row.step, row.stream, row.occurrence) == (2, 3, "cond", 1)
    assert row.strategies == {"a": "reuse", "b": "compute", "c": "reuse"}
    assert row.reasons == {"a": DecisionReason.RULE, "b": DecisionReason.NO_RULE, "c": DecisionReason.COVERED}


def test_the_last_ten_thousand_decisions_are_kept_and_all_are_counted() -> None:
    stats = Stats()
    for step in range(10_001):
        stats.count(record((True, False, True), step), (), (1, 2))
    assert (len(stats.decisions), stats.decisions[0].step, stats.reused) == (10_000, 1, 20_002)


def test_stats_print() -> None:
    stats = Stats(calls=2, variants=3, late_variants=1, cache_bytes=2**20)
    stats.count(record((True, False, False)), (MissReason.BEYOND_END,), (2, 1))
    text = str(stats)
    assert "2 calls: 1 values reused, 2 computed (Recomp 66.7%)" in text
    assert "3 variants (1 compiled late), 0 recompiles, 0 graph breaks, 0.00 MiB cached at most" in text
    assert f"missed 1 times: {MissReason.BEYOND_END}" in text
