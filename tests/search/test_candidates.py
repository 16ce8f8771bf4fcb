"""The candidates of a site, in ascending cost."""

from __future__ import annotations

import pytest
import torch

from dit_rewrite.policy.plan import SHARED, WINDOWED, Choice, PlanRow
from dit_rewrite.search.candidates import Candidates
from dit_rewrite.search.segment_runner import SegmentRunner, greedy_plan
from tests.helpers import tiny
from tests.helpers.searches import (
    SETTINGS,
    sampling,
)

WINDOW = 0.125


def spent(tokens: int, choice: Choice) -> int:
    """FLOPs of one attention of the tiny model at batch two: projections and core, by the paper's formulas."""
    width = tiny.WIDTH
    reach = int(WINDOW * tokens)
    pairs = tokens * (2 * reach + 1) - reach * (reach + 1) if choice in WINDOWED else tokens**2
    halves = 0 if choice is Choice.AST else 1 if choice in SHARED else 2
    return halves * (8 * tokens * width**2 + 4 * width * pairs)


@pytest.mark.parametrize(("tokens", "last"), [(8, (Choice.ASC, Choice.WA_RS)), (128, (Choice.WA_RS, Choice.ASC))])
def test_the_cheapest_candidate_comes_first(monkeypatch: pytest.MonkeyPatch, tokens: int, last: PlanRow) -> None:
    """By their FLOPs at these sizes: half of the batch is cheaper than a window with few tokens, but not with many. No
    candidate passes a threshold of zero, so all are tried."""
    seen: list[Candidates] = []
    orders = Candidates.orders
    monkeypatch.setattr(Candidates, "orders", lambda self, by_cost: seen.append(self) or orders(self, by_cost))
    attempts: list[tuple[int, Choice]] = []
    attempt = SegmentRunner.attempt
    monkeypatch.setattr(SegmentRunner, "attempt", lambda *a: attempts.append(a[1:]) or attempt(*a))
    settings = {**SETTINGS, "steps": 2, "window": WINDOW}
    plan = greedy_plan(tiny.build(), [sampling(tiny.calls(2, tokens=tokens), 2)], 0.0, **settings)
    assert plan.evaluations == 2 * 4
    assert attempts == [(i, c) for i in (0, 1) for c in (Choice.AST, Choice.WA_RS_ASC, *last)]
    (candidates,) = seen
    for place in candidates.places:
        full = candidates.cost(place, Choice.FULL)
        for choice in Choice:
            saved = spent(tokens, Choice.FULL) - spent(tokens, choice)
            assert full - candidates.cost(place, choice) == saved


def test_an_order_that_is_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is tried in its order; a set by cost."""
    attempts: list[Choice] = []
    attempt = SegmentRunner.attempt
    monkeypatch.setattr(SegmentRunner, "attempt", lambda *a: attempts.append(a[2]) or attempt(*a))
    given = (Choice.WA_RS, Choice.ASC, Choice.AST)
    for strategies, expected in ((given, given), (set(given), (Choice.AST, Choice.ASC, Choice.WA_RS))):
        torch.compiler.reset()
        attempts.clear()
        settings = {**SETTINGS, "steps": 2, "strategies": strategies}
        greedy_plan(tiny.build(), [sampling(tiny.calls(2), 2)], 0.0, **settings)
        assert attempts == [*expected, *expected]


def test_what_saves_nothing_is_no_candidate() -> None:
    """A window of all tokens costs what full attention does."""
    settings = {**SETTINGS, "steps": 2, "strategies": [Choice.WA_RS], "window": (7,)}
    plan = greedy_plan(tiny.build(), [sampling(tiny.calls(2), 2)], 100.0, **settings)
    assert (plan.evaluations, plan.counts[Choice.WA_RS]) == (0, 0)
    torch.compiler.reset()
    plan = greedy_plan(tiny.build(), [sampling(tiny.calls(2), 2)], 100.0, **{**settings, "window": (6,)})
    assert (plan.evaluations, plan.counts[Choice.WA_RS]) == (2, 2)
