"""Dispatch with hand-written variants: their arguments, the cached values, and aliasing of outputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import DecisionReason, MissReason
from dit_rewrite.runtime.decide import Choice, Choose, SiteSpec
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.runtime.history import Moment
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.segments import Executable, Segment, Wiring
from dit_rewrite.runtime.session import Observation, Session
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Clock

W = torch.tensor([3.0])


def after_first(moment: Moment, *_: object) -> Choice:
    return Choice(moment.step > 0, DecisionReason.RULE if moment.step > 0 else DecisionReason.NO_RULE)


def unmeasured(now: Tensor, before: Tensor) -> Tensor:
    raise AssertionError("nothing is measured here")


class Doubling:
    """A graph ``x, w -> x + x * w`` whose only site is the product; records the compiled variants."""

    time = 0.0

    def __init__(
        self,
        admits: Callable[[Sequence[Any]], bool] | None = None,
        leak: bool = False,
        choose: Choose = after_first,
    ) -> None:
        self.session = Session(Stats())
        self.session.enter(Clock(9))
        self.admits, self.leak = admits, leak
        self.compiled: list[DecisionRow] = []
        site = SiteSpec("product", "mlp", 0, None, choose)
        self.outputs = (2, 3) if leak else (2,)
        wiring = Wiring(2 + len(self.outputs), 2, self.outputs, static=frozenset({1}))
        self.graph = CompiledGraph(0, [site], 1, wiring, [Segment((0,))], self.session, self.compile, 0, unmeasured)

    def compile(self, segment: int, row: DecisionRow) -> Executable:
        assert segment == 0
        self.compiled.append(row)
        if row == (True,):
            return Executable(self.reuse, (0,), ((0, 0),), self.outputs, (), self.admits)
        return Executable(self.compute, (0, 1), (), self.outputs, ((0, 0),))

    def compute(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        value = x * w
        return (x + value, value, value) if self.leak else (x + value, value)

    def reuse(self, x: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (x + value, value) if self.leak else (x + value,)

    def __call__(self, x: float | Tensor, w: Tensor = W) -> list[Tensor]:
        args = [x if isinstance(x, Tensor) else torch.tensor([x]), w]
        self.time -= 1.0
        latent = torch.tensor([100.0 + self.time])  # continues from call to call, as that of a sampler does
        call = self.session.begin(Inputs(latent, self.time, ()))
        outputs = self.graph(args)
        self.session.end(call)
        assert args == [], "the inputs from AOTAutograd are released"
        return list(outputs)


def values(outputs: list[Tensor]) -> list[float]:
    return [output.item() for output in outputs]


def test_compute_then_reuse() -> None:
    run = Doubling()
    assert values(run(1.0)) == [1 + 3]
    assert values(run(10.0)) == [10 + 3]
    assert run.compiled == [(False,), (True,)]
    assert values(run(20.0)) == [20 + 3]
    stats = run.session.stats
    assert run.compiled == [(False,), (True,)]
    assert (stats.late_variants, stats.computed, stats.reused) == (2, 1, 2)


def test_a_state_is_decided_once() -> None:
    """A second trajectory evaluates no rule again, except in a new state: a slot that does not match the inputs."""
    asked: list[int] = []

    def choose(moment: Moment, *_: object) -> Choice:
        asked.append(moment.step)
        return after_first(moment)

    run = Doubling(choose=choose)
    found = [values(run(x)) for x in (1.0, 10.0, 20.0)]
    assert asked == [0, 1, 2]
    run.session.forget()
    assert [values(run(x)) for x in (1.0, 10.0, 20.0)] == found == [[4], [13], [23]]
    assert asked == [0, 1, 2]
    run(torch.tensor([10.0, 20.0]))
    assert asked == [0, 1, 2, 3]
    assert run.session.stats.misses == {MissReason.CHANGED_INPUT: 1}


def test_a_precompiled_variant_is_not_late() -> None:
    run = Doubling()
    run.graph.add_variant(0, (False,))
    run.graph.add_variant(0, (True,))
    run(1.0), run(10.0)
    assert run.compiled == [(False,), (True,)]
    assert run.session.stats.late_variants == 0


def test_another_shape_computes() -> None:
    run = Doubling()
    run(1.0)
    assert run(torch.tensor([10.0, 20.0]))[0].tolist() == [40, 80]
    assert run.session.stats.misses == {MissReason.CHANGED_INPUT: 1}


def test_other_weights_compute() -> None:
    run = Doubling()
    run(1.0)
    assert values(run(10.0, torch.tensor([5.0]))) == [60]
    assert run.session.stats.misses == {MissReason.CHANGED_WEIGHTS: 1}


@pytest.mark.parametrize("fits", [True, False])
def test_a_variant_for_other_sizes_is_not_run(fits: bool) -> None:
    seen: list[list[float]] = []
    run = Doubling(admits=lambda args: (seen.append([a.item() for a in args]), fits)[1])
    run(1.0)
    assert values(run(10.0)) == ([13] if fits else [40])
    assert seen == [[10, 3]]
    assert run.session.stats.misses == ({} if fits else {MissReason.SIZES_NOT_COMPILED: 1})
    (decision,) = run.session.stats.decisions[1:]
    assert decision.strategies == {"product": "reuse" if fits else "compute"}


def test_outputs_may_be_changed_in_place() -> None:
    """An output that is the value of a slot is copied, both when it is computed and when it is reused."""
    run = Doubling(leak=True)
    for x in (1.0, 10.0, 20.0):
        result, value = run(x)
        assert (result.item(), value.item()) == (x + 3, 3)
        value.zero_()
        result.zero_()


def test_an_output_of_its_own_is_not_copied() -> None:
    run = Doubling()
    owned: list[Tensor] = []
    run.graph.segments[0].variants[(False,)] = Executable(
        lambda x, w: (owned.append(x + x * w) or owned[-1], x * w), (0, 1), (), (2,), ((0, 0),)
    )
    assert run(1.0)[0] is owned[0]


def test_outside_of_a_call_everything_is_computed_and_nothing_kept() -> None:
    run = Doubling()
    run(1.0)
    assert values(list(run.graph([torch.tensor([10.0]), W]))) == [40]
    assert run.session.stats.misses == {MissReason.OUTSIDE_CALL: 1}
    assert values(run(20.0)) == [23]


def test_observer() -> None:
    run = Doubling()
    seen: list[Observation] = []
    run.session.observer = seen.append
    run(1.0), run(10.0)
    assert [(o.graph, o.position, o.record.step, o.record.row) for o in seen] == [
        (0, 0, 0, (False,)),
        (0, 0, 1, (True,)),
    ]
    assert [(o.args[0].item(), o.outputs[0].item()) for o in seen] == [(1, 4), (10, 13)]
    first, second = (o.slots[0] for o in seen)
    assert first is not None and second is not None and first[0] is second[0]


class InSegments:
    """``a = x * w; b = a + 1; c = b * w`` in three segments. The values of the first site are a and b, that of the
    second is c. The graph returns c, x and None. The second segment has nothing to run if the first site is reused."""

    time = 0.0

    def __init__(
        self, reuse: Callable[[int, int], bool], admits: Callable[[Sequence[Any]], bool] | None = None
    ) -> None:
        self.session = Session(Stats())
        self.session.enter(Clock(9))
        self.admits = admits
        self.ran: list[str] = []
        sites = [SiteSpec(name, "mlp", 0, None, self.choose(i, reuse)) for i, name in enumerate(("first", "second"))]
        wiring = Wiring(5, 2, (4, 0, (None,)), static=frozenset({1}))
        segments = [Segment((0,), spent=()), Segment((0,), spent=(2,)), Segment((0, 1), spent=(3,))]
        self.graph = CompiledGraph(0, sites, 1, wiring, segments, self.session, self.compile, 0, unmeasured)

    @staticmethod
    def choose(site: int, reuse: Callable[[int, int], bool]) -> Any:
        return lambda moment, *_: Choice(reuse(site, moment.step), DecisionReason.RULE)

    def compile(self, segment: int, row: DecisionRow) -> Executable | None:
        admits = self.admits if True in row else None
        if segment == 0:
            return None if row[0] else self.noted(lambda x, w: (x * w,) * 2, (0, 1), (), (2,), ((0, 0),))
        if segment == 1:
            return None if row[0] else self.noted(lambda a: (a + 1,) * 2, (2,), (), (3,), ((0, 1),))
        if row[1]:
            return self.noted(lambda c: (c.clone(),), (), ((1, 0),), (4,), (), admits)
        inputs, cached = ((1,), ((0, 1),)) if row[0] else ((3, 1), ())
        run = (lambda w, b: (b * w,) * 2) if row[0] else (lambda b, w: (b * w,) * 2)
        return self.noted(run, inputs, cached, (4,), ((1, 0),), admits)

    def noted(self, run: Callable[..., tuple[Tensor, ...]], *more: Any) -> Executable:
        return Executable(lambda *values: (self.ran.append("abc"[more[2][0] - 2]), run(*values))[1], *more)

    __call__ = Doubling.__call__


def test_segments_run_in_order_and_fill_slots_together() -> None:
    """Two segments fill the slot of the first site together; a segment with nothing to run is not called."""
    run = InSegments(lambda site, step: step == 1 or (step == 2 and site == 0))
    seen: list[Observation] = []
    run.session.observer = seen.append
    assert run(1.0)[0].item() == 12
    assert run.ran == ["a", "b", "c"]
    assert [[v.item() for v in held] for held in seen[0].slots if held is not None] == [[3, 4], [12]]
    assert run(10.0)[0].item() == 12, "all are reused"
    assert run.ran[3:] == ["c"]
    assert run(20.0)[0].item() == 12, "the second is computed from the value of the first"
    assert run.ran[4:] == ["c"]
    assert run(100.0)[0].item() == 903
    assert run.ran[5:] == ["a", "b", "c"]
    assert [o.record.row for o in seen] == [(False, False), (True, True), (True, False), (False, False)]


def test_inputs_and_constants_as_outputs() -> None:
    """The graph can return an input or a constant."""
    run = InSegments(lambda *_: False)
    x = torch.tensor([2.0])
    outputs = run(x)
    assert outputs[0].item() == 21
    assert outputs[1] is x
    assert outputs[2] is None


def test_a_late_segment_for_other_sizes_starts_the_call_over() -> None:
    """The results of earlier segments are dropped, and everything is computed."""
    run = InSegments(lambda site, step: step > 0 and site == 1, admits=lambda args: args[0].item() < 5)
    assert run(1.0)[0].item() == 12
    assert run(2.0)[0].item() == 12
    assert run(10.0)[0].item() == 93
    assert run.ran == ["a", "b", "c", "a", "b", "c", "a", "b", "a", "b", "c"]
    assert run.session.stats.misses == {MissReason.SIZES_NOT_COMPILED: 1}
    assert run(3.0)[0].item() == 93, "the slots were filled again"


def test_wires_are_freed_after_their_last_read() -> None:
    """The wires that a segment reads last are freed before the next one runs, and at the end of the call."""
    run = InSegments(lambda *_: False)
    alive: list[list[bool]] = []
    made: list[weakref.ref[Tensor]] = []

    def made_by(value: Tensor) -> tuple[Tensor, Tensor]:
        alive.append([ref() is not None for ref in made])
        made.append(weakref.ref(value))
        return value, torch.zeros(1)

    run.graph.segments[0].variants[(False,)] = Executable(lambda x, w: made_by(x * w), (0, 1), (), (2,), ((0, 0),))
    run.graph.segments[1].variants[(False,)] = Executable(lambda a: made_by(a + 1), (2,), (), (3,), ((0, 1),))
    run.graph.segments[2].variants[(False, False)] = Executable(
        lambda b, w: made_by(b * w), (3, 1), (), (4,), ((1, 0),)
    )
    outputs = run(1.0)
    assert alive == [[], [True], [False, True]]
    assert [ref() is not None for ref in made] == [False, False, True]
    assert outputs[0].item() == 12


class Recording(Doubling):
    """Records at each computation whether the old value of the slot is still alive, and fails on request."""

    def __init__(self) -> None:
        super().__init__(choose=lambda moment, *_: Choice(moment.step % 2 == 1, DecisionReason.RULE))
        self.old: weakref.ref[Tensor] | None = None
        self.alive: list[bool] = []
        self.fails = False

    def compute(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        if self.old is not None:
            self.alive.append(self.old() is not None)
        if self.fails:
            raise RuntimeError("out of memory")
        outputs = super().compute(x, w)
        self.old = weakref.ref(outputs[-1])
        return outputs


def test_the_old_value_is_let_go_before_the_new_one_is_made() -> None:
    run = Recording()
    assert [run(float(x))[0].item() for x in range(1, 6)] == [4, 5, 12, 13, 20]
    assert run.alive == [False, False]


def test_after_a_failure_that_the_model_catches_the_slot_is_a_miss() -> None:
    """The old value was freed, and the failed call stores nothing, so the next step computes."""
    run = Recording()
    run(1.0), run(2.0)
    run.fails = True
    call = run.session.begin(Inputs(torch.tensor([97.5]), run.time - 0.5, ()))
    with pytest.raises(RuntimeError, match="out of memory"):
        run.graph([torch.tensor([3.0]), W])
    run.session.end(call)
    run.fails = False
    assert run(4.0)[0].item() == 16, "the rule asks for reuse, but the slot is empty"
    assert run.session.stats.misses == {MissReason.EMPTY: 1}


def test_peak_bytes_outlive_the_trajectory() -> None:
    run = Doubling()
    run(torch.ones(5)), run(torch.ones(5))
    run.session.forget()
    run(torch.ones(2))
    assert (run.session.cache_bytes(), run.session.stats.peak_bytes) == (8, 20)


class Conditioned(Doubling):
    """The weight is conditioning instead, and the slot is valid for that conditioning only."""

    def __init__(self, conditioned: bool) -> None:
        super().__init__()
        site = SiteSpec("product", "mlp", 0, None, after_first, conditioned=conditioned)
        wiring = Wiring(3, 2, (2,), steady=frozenset({1}))
        self.graph = CompiledGraph(0, [site], 1, wiring, [Segment((0,))], self.session, self.compile, 0, unmeasured)


@pytest.mark.parametrize(("conditioned", "expected"), [(True, [4, 5, 18, 19, 80]), (False, [4, 5, 6, 7, 8])])
def test_conditioned_slots_are_cleared_with_new_conditioning(conditioned: bool, expected: list[float]) -> None:
    """The site computes with another tensor, and with the same tensor after an in-place change."""
    run = Conditioned(conditioned)
    first, second = torch.tensor([3.0]), torch.tensor([5.0])
    found = [run(1.0, first), run(2.0, first), run(3.0, second), run(4.0, second)]
    second.fill_(15.0)
    found.append(run(5.0, second))
    assert [outputs[0].item() for outputs in found] == expected
    assert run.session.stats.misses == ({MissReason.CHANGED_CONDITIONING: 2} if conditioned else {})
