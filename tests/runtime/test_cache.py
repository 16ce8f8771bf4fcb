"""Slots: what fits a call, and what they weigh."""

from __future__ import annotations

import pytest
import torch

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.cache import Bank, stamp_of
from dit_rewrite.runtime.decide import Computed

WEIGHTS = (torch.ones(1), torch.ones(1))


def filled(*inputs: object) -> Bank:
    """A bank of two sites that a call with these inputs filled."""
    bank = Bank(2)
    bank.fit(stamp_of(inputs), WEIGHTS)
    bank.store(0, (torch.ones(3),), Computed(4))
    bank.store(1, (torch.ones(3), torch.ones(2)), Computed(4))
    bank.streak[1] = 2
    return bank


def test_a_new_bank_is_empty() -> None:
    bank = Bank(2)
    assert bank.fit(stamp_of([torch.ones(2, 3)]), WEIGHTS) is Reason.EMPTY
    assert bank.values == [None, None]
    assert bank.fit(stamp_of([torch.ones(2, 3)]), WEIGHTS) is None


def test_what_is_alike_fits() -> None:
    bank = filled(torch.ones(2, 3), 7)
    assert bank.fit(stamp_of([torch.zeros(2, 3), 7]), WEIGHTS) is None
    assert None not in bank.values


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(3, 2), 7),
        (torch.ones(6), 7),
        (torch.ones(2, 3, dtype=torch.float64), 7),
        (torch.ones(2, 3, device="meta"), 7),
        (torch.ones(2, 3), 8),
        (torch.ones(2, 3),),
    ],
    ids=["shape", "rank", "dtype", "device", "size", "count"],
)
def test_another_input_empties_it(other: tuple[object, ...]) -> None:
    bank = filled(torch.ones(2, 3), 7)
    assert bank.fit(stamp_of(other), WEIGHTS) is Reason.CHANGED_INPUT
    assert bank.values == [None, None]
    assert bank.fit(stamp_of(other), WEIGHTS) is None, "the new stamp is the bank's from now on"


def test_other_weights_empty_it() -> None:
    bank = filled(1)
    equal = (WEIGHTS[0], WEIGHTS[1].clone())
    assert bank.fit(stamp_of([1]), equal) is Reason.CHANGED_WEIGHTS
    assert bank.values == [None, None]
    assert bank.fit(stamp_of([1]), equal) is None


def test_store_begins_a_new_age_and_streak() -> None:
    bank = filled(1)
    value = torch.zeros(2)
    bank.store(1, (value,), Computed(9))
    assert bank.values[1] is not None and bank.values[1][0] is value
    assert ([past.age(9) for past in bank.past], bank.streak) == ([5, 0], [0, 0])


def test_bytes_count_shared_storage_once_and_whole() -> None:
    bank = Bank(3)
    assert bank.bytes == 0
    whole = torch.ones(10, dtype=torch.float32)
    bank.store(0, (whole[:2], whole[5:]), Computed(0))
    assert bank.bytes == 40, "views keep all of their storage alive"
    bank.store(1, (torch.ones(3, dtype=torch.float16),), Computed(0))
    assert bank.bytes == 46
    bank.clear()
    assert bank.bytes == 0


def test_a_history_keeps_the_newest_values_and_when_they_were_computed() -> None:
    bank = Bank(1)
    values = [torch.full((2,), float(i)) for i in range(4)]
    for step, value in enumerate(values):
        bank.release(0, width=1, depth=3)
        bank.store(0, (value,), Computed(10 * step), depth=3)
    held = bank.values[0]
    assert (
        held is not None and [tensor is value for tensor, value in zip(held, values[:0:-1], strict=True)] == [True] * 3
    )
    assert [computed.step for computed in bank.past[0].computed] == [30, 20, 10]
    assert bank.bytes == 3 * 8


def test_a_value_of_weight_0_is_not_read() -> None:
    """It may be missing, or poison: the newest stands in its place, and nothing times 0 is added."""
    bank = Bank(1)
    poison, newest = torch.full((2,), float("nan")), torch.ones(2)
    for step, value in enumerate((poison, newest)):
        bank.store(0, (value,), Computed(step), depth=3)
    *values, weights = bank.weighted(0, (1.0, 0.0, 0.0), width=1)
    assert all(value is newest for value in values)
    assert weights.tolist() == [1, 0, 0] and weights.dtype is torch.float32
    both = bank.weighted(0, (2.0, -1.0, 0.0), width=1)
    assert both[1] is poison and both[2] is newest


def test_another_shape_forgets_the_history() -> None:
    bank = Bank(1)
    bank.fit(stamp_of([torch.ones(2)]), WEIGHTS)
    bank.store(0, (torch.ones(2),), Computed(0), depth=2)
    assert bank.fit(stamp_of([torch.ones(3)]), WEIGHTS) is Reason.CHANGED_INPUT
    bank.store(0, (torch.ones(3),), Computed(5), depth=2)
    assert bank.values[0] is not None and len(bank.values[0]) == 1
    assert [computed.step for computed in bank.past[0].computed] == [5]
