"""The cache: validation against a call's inputs, weighted values, and size."""

from __future__ import annotations

import weakref

import pytest
import torch

from dit_rewrite.errors import DecisionReason, MissReason
from dit_rewrite.runtime.cache import Cache, stamp_of
from dit_rewrite.runtime.decide import Decisions, SiteSpec
from dit_rewrite.runtime.history import Computed, Moment
from dit_rewrite.runtime.slots import Transition
from dit_rewrite.runtime.step_tables import Table
from dit_rewrite.runtime.tensors import Memoized

WEIGHTS = (torch.ones(1), torch.ones(1))


def filled(*inputs: object) -> Cache:
    """A cache of two sites that a call with these inputs filled."""
    cache = Cache(2)
    cache.fit(stamp_of(inputs), WEIGHTS)
    cache.update(0, Transition.FILL, (torch.ones(3),), Computed(4))
    cache.update(1, Transition.FILL, (torch.ones(3), torch.ones(2)), Computed(4))
    cache.streak[1] = 2
    return cache


def test_a_new_bank_is_empty() -> None:
    cache = Cache(2)
    assert cache.fit(stamp_of([torch.ones(2, 3)]), WEIGHTS) is MissReason.EMPTY
    assert cache.values == [None, None]
    assert cache.fit(stamp_of([torch.ones(2, 3)]), WEIGHTS) is None


def test_matching_inputs_fit() -> None:
    cache = filled(torch.ones(2, 3), 7)
    assert cache.fit(stamp_of([torch.zeros(2, 3), 7]), WEIGHTS) is None
    assert None not in cache.values


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
    cache = filled(torch.ones(2, 3), 7)
    assert cache.fit(stamp_of(other), WEIGHTS) is MissReason.CHANGED_INPUT
    assert cache.values == [None, None]
    assert cache.fit(stamp_of(other), WEIGHTS) is None, "the cache takes the new stamp"


def test_other_weights_empty_it() -> None:
    cache = filled(1)
    equal = (WEIGHTS[0], WEIGHTS[1].clone())
    assert cache.fit(stamp_of([1]), equal) is MissReason.CHANGED_WEIGHTS
    assert cache.values == [None, None]
    assert cache.fit(stamp_of([1]), equal) is None


def test_store_begins_a_new_age_and_streak() -> None:
    cache = filled(1)
    value = torch.zeros(2)
    cache.update(1, Transition.FILL, (value,), Computed(9))
    assert cache.values[1] is not None and cache.values[1][0] is value
    assert ([past.age(9) for past in cache.past], cache.streak) == ([5, 0], [0, 0])


def test_bytes_count_shared_storage_once_and_whole() -> None:
    cache = Cache(3)
    assert cache.bytes == 0
    whole = torch.ones(10, dtype=torch.float32)
    cache.update(0, Transition.FILL, (whole[:2], whole[5:]), Computed(0))
    assert cache.bytes == 40, "views keep their whole storage alive"
    cache.update(1, Transition.FILL, (torch.ones(3, dtype=torch.float16),), Computed(0))
    assert cache.bytes == 46
    cache.clear()
    assert cache.bytes == 0


def test_a_history_keeps_the_newest_values_and_when_they_were_computed() -> None:
    cache = Cache(1)
    values = [torch.full((2,), float(i)) for i in range(4)]
    for step, value in enumerate(values):
        cache.release(0, width=1, depth=3)
        cache.update(0, Transition.FILL, (value,), Computed(10 * step), depth=3)
    held = cache.values[0]
    assert (
        held is not None and [tensor is value for tensor, value in zip(held, values[:0:-1], strict=True)] == [True] * 3
    )
    assert [computed.step for computed in cache.past[0].computed] == [30, 20, 10]
    assert cache.bytes == 3 * 8


@pytest.mark.parametrize(("device", "kept"), [("cpu", [1]), ("meta", [])])
def test_all_memory_but_the_highest_is_freed_before_the_sites_compute(device: str, kept: list[int]) -> None:
    """glibc returns memory behind the last object in use to the system. Other devices have other allocators."""
    sites = [SiteSpec(str(i), "mlp", i, None, lambda *_: None) for i in range(3)]  # type: ignore[arg-type,return-value]
    memory = torch.zeros(30, device=device)
    cache, moment = Cache(3), Moment(0, 9)
    decided = Decisions((False,) * 3, (DecisionReason.NO_RULE,) * 3, ())
    values = [memory[10:20], memory[20:], memory[:10]]
    alive = [weakref.ref(value) for value in values]
    cache.commit(sites, [((i, 0), value) for i, value in enumerate(values)], moment, decided)
    values.clear()
    for i in range(3):
        cache.release(i, width=1, depth=1)
    assert cache.values == [None] * 3, "no step can read the old values"
    assert [i for i, value in enumerate(alive) if value() is not None] == kept
    cache.commit(sites, [((i, 0), torch.zeros(10)) for i in range(3)], moment, decided)
    assert all(value() is None for value in alive)


def test_a_value_of_weight_0_is_not_read() -> None:
    """A value of weight 0 may be missing or NaN; the newest value replaces it."""
    cache = Cache(1)
    poison, newest = torch.full((2,), float("nan")), torch.ones(2)
    for step, value in enumerate((poison, newest)):
        cache.update(0, Transition.FILL, (value,), Computed(step), depth=3)
    *values, weights = cache.weighted(0, (1.0, 0.0, 0.0), width=1)
    assert all(value is newest for value in values)
    assert weights.tolist() == [1, 0, 0] and weights.dtype is torch.float32
    both = cache.weighted(0, (2.0, -1.0, 0.0), width=1)
    assert both[1] is poison and both[2] is newest


def test_another_shape_forgets_the_history() -> None:
    cache = Cache(1)
    cache.fit(stamp_of([torch.ones(2)]), WEIGHTS)
    cache.update(0, Transition.FILL, (torch.ones(2),), Computed(0), depth=2)
    assert cache.fit(stamp_of([torch.ones(3)]), WEIGHTS) is MissReason.CHANGED_INPUT
    cache.update(0, Transition.FILL, (torch.ones(3),), Computed(5), depth=2)
    assert cache.values[0] is not None and len(cache.values[0]) == 1
    assert [computed.step for computed in cache.past[0].computed] == [5]


def test_weights_that_are_changed_in_place_empty_it() -> None:
    """The step table too, which is then found again by its weights."""
    weights = (torch.ones(1), torch.ones(1))
    cache = Cache(1)
    cache.fit((), weights)
    table = Table(Memoized.of(weights, ()), torch.zeros(0), Memoized.of((), ()), None)
    cache.bookmark.table = table
    assert cache.fit((), weights) is None
    assert cache.bookmark.table is table
    weights[1].add_(1)
    assert cache.fit((), weights) is MissReason.CHANGED_WEIGHTS
    assert cache.bookmark.table is None
    assert cache.fit((), weights) is None


def test_an_attribute_whose_data_are_replaced_empties_it() -> None:
    """The version counter stays, and the old data are kept, so that no others get their address."""
    held = torch.ones(1)
    cache = Cache(1)
    cache.fit((), (), [held])
    for value in range(3):
        assert cache.fit((), (), [held]) is None
        held.data = torch.full((1,), float(value))
        assert cache.fit((), (), [held]) is MissReason.CHANGED_ATTRIBUTE


def test_tensors_of_unknown_origin() -> None:
    """One that is made in each call is data; another one of several that exist may be another condition."""
    cache = Cache(1)
    cache.fit((), (), (), [torch.ones(1)])
    assert cache.fit((), (), (), [torch.ones(1)]) is None
    kept, other = torch.ones(1), torch.ones(1)
    assert cache.fit((), (), (), [kept]) is None
    assert cache.fit((), (), (), [kept]) is None
    assert cache.fit((), (), (), [other]) is MissReason.CHANGED_UNKNOWN
    other.add_(1)
    assert cache.fit((), (), (), [other]) is MissReason.CHANGED_UNKNOWN
