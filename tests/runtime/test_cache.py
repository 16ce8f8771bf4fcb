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
