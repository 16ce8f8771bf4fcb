"""Fitted weights: valid only for the placement that they were fitted to, and saved with the policy."""

from __future__ import annotations

import pytest
import torch

from dit_rewrite.errors import BadParameter, MissReason
from dit_rewrite.policies import StepMask
from dit_rewrite.policy.fitted import Fitted
from dit_rewrite.policy.serialise import from_json, to_json
from tests.helpers import tiny

ROWS = ((), (0.9,), (), (1.5, -0.6), (), (2.0, -1.5, 0.4))


def test_weights_are_those_of_the_step() -> None:
    basis = Fitted(ROWS)
    assert basis.computed == (0, 2, 4) and basis.history(1) == 3 and Fitted(((), (0.9,))).history(1) == 2
    assert basis.weights([0], 1, 0) == [0.9]
    assert basis.weights([4, 2, 0], 5, 2) == [2.0, -1.5, 0.4]


@pytest.mark.parametrize(
    ("places", "place"),
    [([1, 0], 3), ([2], 3), ([2, 1], 3), ([1, 0], 2), ([4, 2, 0], 6), ([2, 0], 3.5)],
    ids=["newer", "missing", "other", "computed", "beyond", "between"],
)
def test_other_values_have_no_weights(places: list[int], place: float) -> None:
    with pytest.raises(ValueError, match="no weights"):
        Fitted(ROWS).weights(places, place, 1)


@pytest.mark.parametrize("rows", [(), ((0.5,),), ((), (1.0, 2.0)), ((), ("a",)), [(), (1.0,)]])
def test_invalid_tables_are_refused(rows: object) -> None:
    with pytest.raises(BadParameter):
        Fitted(rows)  # type: ignore[arg-type]


def test_a_policy_forecasts_by_the_table_and_is_saved() -> None:
    policy = StepMask(computed=(0, 2, 4), num_steps=6, order=2, basis=Fitted(ROWS))
    again = from_json(to_json(policy))
    assert again == policy
    model, inputs = tiny.build(), tiny.calls(6)
    compiled = tiny.rewritten(model, again)
    with compiled.trajectory(6):
        found = tiny.outputs(compiled, inputs)
    true = tiny.outputs(model, inputs)
    for step, row in enumerate(ROWS):
        anchors = [true[i] for i in Fitted(ROWS).computed_before(step)]
        expected = sum(w * v for w, v in zip(row, anchors, strict=False)) if row else true[step]
        torch.testing.assert_close(found[step], expected)


def test_a_table_for_other_computed_steps_computes() -> None:
    """The policy computes at step 1 and the table does not, so step 2 has no weights."""
    policy = StepMask(computed=(0, 1), num_steps=3, order=1, basis=Fitted(((), (0.9,), (0.8,))))
    compiled = tiny.rewritten(tiny.build(), policy)
    with compiled.trajectory(3):
        tiny.outputs(compiled, tiny.calls(3))
    assert tiny.row(compiled, 3) == "CCC"
    assert compiled.stats().misses[MissReason.NO_WEIGHTS] == 1
