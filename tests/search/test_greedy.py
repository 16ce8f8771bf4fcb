"""The search of a plan, against algorithm 1 of DiTFastAttn in plain Python, on models of exactly known losses."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_rewrite.errors import BadParameter
from dit_rewrite.policy.plan import Choice, PlanRow
from dit_rewrite.search.greedy import DELTAS, STRATEGIES, Found, greedy, loss
from dit_rewrite.search.metrics import relative_error
from tests.search.known_losses import ASC, AST, FULL, LARGE, WA_RS, WA_RS_ASC, Fake, algorithm_1, drawn, listed, names

# --- the algorithm ----------------------------------------------------------------------------------------------------


def test_by_hand():
    """Two sites, delta 1/8: thresholds 1/16 and 1/8. The first takes WA-RS (1/32), which leaves the second 3/32."""
    n = 32
    losses = {
        AST: [Fraction(3, n), Fraction(3, n)],
        WA_RS_ASC: [Fraction(2, n), Fraction(2, n)],
        WA_RS: [Fraction(1, n), Fraction(0)],
        ASC: [Fraction(0), Fraction(0)],
    }
    fake = Fake(listed(losses), sites=2)
    found = greedy(fake, names(2), 3, 0.125)
    assert found.table == ((FULL, FULL), (WA_RS, WA_RS_ASC), (WA_RS, WA_RS_ASC))
    one_step = [(0, AST), (0, WA_RS_ASC), (0, WA_RS), (1, AST), (1, WA_RS_ASC)]
    assert fake.attempts == [(step, *tried) for step in (1, 2) for tried in one_step]
    assert fake.replayed == [(FULL, FULL)]
    assert fake.begun == [1, 2]
    assert found.evaluations == 10
    assert found.work == 1 + 2 * (1 + 3 * 1 + 2 * 0.5 + 1)  # step 0; reference, candidates, the step itself
    assert found.share(4) == found.work / (3 * 4 * 2)


def test_a_loss_at_the_threshold_does_not_pass():
    """Two sites, delta 1/8: 1/16 at the first is refused, and so is 1/8 at the last; a hair below passes."""
    border, hair = [Fraction(1, 16), Fraction(1, 8)], Fraction(1, 2**20)
    below = [loss - hair for loss in border]
    assert greedy(Fake(listed({AST: border}), 2), names(2), 2, 0.125, [AST]).table[1] == (FULL, FULL)
    first = {AST: [below[0], border[1]]}
    assert greedy(Fake(listed(first), 2), names(2), 2, 0.125, [AST]).table[1] == (AST, FULL)
    last = {AST: [border[0], below[1]]}
    assert greedy(Fake(listed(last), 2), names(2), 2, 0.125, [AST]).table[1] == (FULL, AST)


def test_candidates_are_tried_in_the_order_given():
    """The first candidate that passes is taken, even where a later one is closer."""
    losses = listed({choice: [Fraction(n, 64)] for n, choice in enumerate((ASC, WA_RS, AST))})
    for order in ([AST, WA_RS, ASC], [ASC, WA_RS, AST], [WA_RS]):
        found = greedy(Fake(losses, 1), ["attn"], 2, 0.125, order)
        assert (found.table[1], found.evaluations) == ((order[0],), 1)


def test_the_paper_tries_the_cheapest_first():
    assert STRATEGIES == (AST, WA_RS_ASC, WA_RS, ASC)
    assert list(DELTAS) == ["D1", "D2", "D3", "D4", "D5", "D6"]
    assert list(DELTAS.values()) == [0.025, 0.05, 0.075, 0.1, 0.125, 0.15]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([Fraction(0), Fraction(1, 32), Fraction(1, 16), Fraction(1, 8), Fraction(1, 4)]),
    st.permutations(STRATEGIES).flatmap(lambda order: st.integers(1, 4).map(lambda n: tuple(order[:n]))),
)
@example(0, 4, 1, Fraction(1, 8), STRATEGIES)
def test_tables_are_those_of_algorithm_1(seed: int, sites: int, steps: int, delta: Fraction, choices: PlanRow):
    losses = drawn(seed)
    fake = Fake(losses, sites)
    found = greedy(fake, names(sites), steps, float(delta), choices)
    assert (found.table, found.evaluations) == algorithm_1(losses, sites, steps, delta, choices)
    assert found.table[0] == (FULL,) * sites
    assert found.evaluations == len(fake.attempts)
    if steps > 1:
        assert found.table == fake.history
        assert found.work == pytest.approx(float(fake.work))


def test_the_drawn_losses_reach_every_case():
    """Each choice, a loss exactly at a threshold, and an effect of the step before occur in some of the tables
    above."""
    rows = [algorithm_1(drawn(seed), 4, 3, Fraction(1, 8), STRATEGIES)[0] for seed in range(50)]
    assert {choice for table in rows for row in table for choice in row} == set(Choice)
    assert any(drawn(seed)(((FULL,) * 4,), (AST, FULL, FULL, FULL)) == Fraction(1, 32) for seed in range(50))
    assert drawn(1)(((AST,),), (AST,)) != drawn(1)(((ASC,),), (AST,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_passes_on_a_broken_output(value: float):
    """An output that is not finite proves nothing, whether it is the candidate's or the reference's."""
    for broken in ("attempt", "reference", "both"):

        class Broken(Fake):
            def outputs(self, row: PlanRow, broken: str = broken) -> list[Tensor]:
                outputs = super().outputs(row)
                is_reference = all(choice is FULL for choice in row)
                if broken == "both" or is_reference == (broken == "reference"):
                    outputs[0][0, 0] = value
                return outputs

        found = greedy(Broken(listed({AST: [Fraction(0)]}), 1), ["attn"], 2, 1.0, [AST])
        assert found.table == ((FULL,), (FULL,))
    assert greedy(Fake(listed({AST: [Fraction(0)]}), 1), ["attn"], 2, 1.0, [AST]).table == ((FULL,), (AST,))


def test_one_step_needs_no_model():
    fake = Fake(listed({}), 2)
    assert greedy(fake, names(2), 1, 0.1) == Found(((FULL, FULL),), 0, 0.0)
    assert fake.work == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": []}, r"sites=\(\)"),
        ({"sites": ["a", "a"]}, "names, each once"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"delta": -0.1}, "delta=-0.1"),
        ({"delta": math.nan}, "delta=nan"),
        ({"choices": []}, r"choices=\(\)"),
        ({"choices": [AST, FULL]}, "without Choice.FULL"),
        ({"choices": [AST, AST]}, "each once"),
        ({"choices": ["AST"]}, r"choices=\('AST',\)"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], says: str):
    arguments: dict[str, Any] = {"sites": ["a"], "steps": 2, "delta": 0.1} | changes
    with pytest.raises(BadParameter, match=f"search: .*{says}"):
        greedy(Fake(listed({}), 1), **arguments)


# --- the loss ------------------------------------------------------------------------------------------------------


def test_a_loss_is_over_the_elements_of_all_trajectories():
    """One element that is wrong by half and three that are right: 1/8, and not the mean of 1/2 and 0."""
    reference = [torch.full((1,), LARGE), torch.full((3,), LARGE)]
    assert loss(reference, [reference[0] / 2, reference[1]]) == 1 / 8
    assert loss(reference, reference) == 0


def test_shapes_must_be_those_of_the_reference():
    with pytest.raises(BadParameter, match=r"output.shape=\(1, 2\)"):
        relative_error(torch.ones(2, 2), torch.ones(1, 2))
    for other in ([torch.ones(4)], [torch.ones(2, 2), torch.ones(1)], []):
        with pytest.raises(BadParameter, match="loss: shapes=.*those of the reference"):
            loss([torch.ones(2, 2)], other)
