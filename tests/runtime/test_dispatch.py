"""Dispatch with variants written by hand: what each is given, what is stored, and what never leaves the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.decide import SiteSpec
from dit_rewrite.runtime.dispatch import Executable, Graph
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.session import Observation, Session
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Told

W = torch.tensor([3.0])


def after_first(step: int, *_: object) -> tuple[bool, Reason]:
    return step > 0, Reason.RULE if step > 0 else Reason.NO_RULE


class Doubling:
    """A graph ``x, w -> x + x * w`` whose only site is the product, and who compiled and ran what."""

    def __init__(self, admits: Callable[[Sequence[Any]], bool] | None = None, leak: bool = False) -> None:
        self.session = Session(Stats())
        self.session.tell(Told(9, None))
        self.admits, self.leak = admits, leak
        self.compiled: list[tuple[bool, ...]] = []
        site = SiteSpec("product", "mlp", 0, None, 1, after_first)
        self.graph = Graph(0, [site], 1, frozenset({1}), 2, self.session, self.compile)

    def compile(self, row: tuple[bool, ...]) -> Executable:
        self.compiled.append(row)
        if row == (True,):
            return Executable(self.reuse, (0,), ((0, 0),), (), self.admits)
        return Executable(self.compute, (0, 1), (), ((0, 0),))

    def compute(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        value = x * w
        return (x + value, value, value) if self.leak else (x + value, value)

    def reuse(self, x: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (x + value, value) if self.leak else (x + value,)

    def __call__(self, x: float | Tensor, w: Tensor = W) -> list[Tensor]:
        args = [x if isinstance(x, Tensor) else torch.tensor([x]), w]
        call = self.session.begin(Inputs(args[0], 0.0, ()))
        outputs = self.graph(args)
        self.session.end(call)
        assert args == [], "AOTAutograd's inputs are let go"
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
    assert (stats.variants, stats.late_variants, stats.computed, stats.reused) == (2, 2, 1, 2)


def test_a_foreseen_variant_is_not_late() -> None:
    run = Doubling()
    run.graph.add_variant((False,))
    run.graph.add_variant((True,))
    run(1.0), run(10.0)
    assert (run.session.stats.variants, run.session.stats.late_variants) == (2, 0)


def test_another_shape_computes() -> None:
    run = Doubling()
    run(1.0)
    assert run(torch.tensor([10.0, 20.0]))[0].tolist() == [40, 80]
    assert run.session.stats.misses == {Reason.CHANGED_INPUT: 1}


def test_other_weights_compute() -> None:
    run = Doubling()
    run(1.0)
    assert values(run(10.0, torch.tensor([5.0]))) == [60]
    assert run.session.stats.misses == {Reason.CHANGED_WEIGHTS: 1}


@pytest.mark.parametrize("fits", [True, False])
def test_a_variant_for_other_sizes_is_not_run(fits: bool) -> None:
    seen: list[list[float]] = []
    run = Doubling(admits=lambda args: (seen.append([a.item() for a in args]), fits)[1])
    run(1.0)
    assert values(run(10.0)) == ([13] if fits else [40])
    assert seen == [[10, 3]]
    assert run.session.stats.misses == ({} if fits else {Reason.SIZES_NOT_COMPILED: 1})
    (decision,) = run.session.stats.decisions[1:]
    assert decision.strategies == {"product": "reuse" if fits else "compute"}


def test_outputs_may_be_changed_in_place() -> None:
    """An output that is a slot's value is copied: at the step that computed it, and at each that reuses it."""
    run = Doubling(leak=True)
    for x in (1.0, 10.0, 20.0):
        result, value = run(x)
        assert (result.item(), value.item()) == (x + 3, 3)
        value.zero_()
        result.zero_()


def test_an_output_of_its_own_is_not_copied() -> None:
    run = Doubling()
    owned: list[Tensor] = []
    run.graph.variants[(False,)] = Executable(
        lambda x, w: (owned.append(x + x * w) or owned[-1], x * w), (0, 1), (), ((0, 0),)
    )
    assert run(1.0)[0] is owned[0]


def test_outside_of_a_call_everything_is_computed_and_nothing_kept() -> None:
    run = Doubling()
    run(1.0)
    assert values(list(run.graph([torch.tensor([10.0]), W]))) == [40]
    assert run.session.stats.misses == {Reason.OUTSIDE_CALL: 1}
    assert values(run(20.0)) == [23]


def test_what_an_observer_sees() -> None:
    run = Doubling()
    seen: list[Observation] = []
    run.session.observer = seen.append
    run(1.0), run(10.0)
    assert [(o.graph, o.position, o.record.step, o.record.row) for o in seen] == [
        (0, 0, 0, (False,)),
        (0, 0, 1, (True,)),
    ]
    assert [(o.args[0].item(), o.outputs[0].item()) for o in seen] == [(1, 4), (10, 13)]
    first, second = (o.held[0] for o in seen)
    assert first is not None and second is not None and first[0] is second[0]
