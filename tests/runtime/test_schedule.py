"""The timesteps of a schedule, in the form in which a pipeline passes them to the model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dit_rewrite.runtime.schedule import OnHost, Schedule, on_host

FLOATS = torch.tensor([999.0, 750.5, 333.3, 0.125])
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda t: t.expand(2),
    "divided": lambda t: (t / 1000).expand(2),
    "reversed": lambda t: 1 - t.expand(2) / 1000,
    "divided in bfloat16": lambda t: t.expand(2).to(torch.bfloat16) / 1000,
    "divided, then bfloat16": lambda t: (t / 1000).to(torch.bfloat16).expand(2),
    "a double": lambda t: t.to(torch.float64)[None] / 1000,
}


def schedule(times: Tensor) -> Schedule:
    return Schedule(SimpleNamespace(timesteps=times, config=SimpleNamespace(num_train_timesteps=1000)), noise=False)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_timesteps_are_bitwise_those_that_the_pipeline_passes(form: Callable[[Tensor], Tensor]) -> None:
    """The first timestep may fit several forms, the second one tells them apart."""
    found = schedule(FLOATS)
    assert torch.equal(found.given(form(FLOATS[0]), 0)[0], form(FLOATS[0]))
    for entry in range(1, 4):
        given = found.given(form(FLOATS[entry]), entry)
        assert all(torch.equal(a, form(b)) for a, b in zip(given, FLOATS, strict=True))


def test_a_wrong_form_is_excluded_by_the_next_call() -> None:
    """The first timestep fits two forms: rounded to bfloat16 before the division, and after it."""
    found, early, late = schedule(FLOATS), FORMS["divided in bfloat16"], FORMS["divided, then bfloat16"]
    assert torch.equal(early(FLOATS[0]), late(FLOATS[0]))
    assert not torch.equal(early(FLOATS[1]), late(FLOATS[1]))
    assert torch.equal(found.given(early(FLOATS[0]), 0)[1], late(FLOATS[1]))
    assert torch.equal(found.given(early(FLOATS[1]), 1)[1], early(FLOATS[1]))


def test_a_form_that_is_not_known() -> None:
    assert schedule(FLOATS).given(FLOATS[0].expand(2) * 3, 0) == []
    assert schedule(FLOATS).given(torch.stack([FLOATS[0], FLOATS[1]]), 0) == []  # samples at different steps


def test_a_timestep_that_is_listed_twice_comes_once() -> None:
    """Second-order solvers call the denoiser twice at a timestep."""
    given = schedule(torch.tensor([9, 5, 5, 1])).given(torch.tensor([9]), 0)
    assert [int(t) for t in given] == [9, 5, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000])
def test_a_first_timestep_that_fits_several_units(unit: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Divided by 1000, the first timestep equals the last one undivided: flow matching from 1000 down to 1. Reversed,
    one of DDIM's equals another divided. The first entry is the likely one, and later calls tell."""
    for times in ([1000.0, 750.0, 500.0, 1.0], [999.0, 666.0, 1.0]):
        found, last = schedule(torch.tensor(times)), None
        for entry, time in enumerate(times):
            timestep = unit(torch.tensor(time)).to(dtype)
            last = found.entry(timestep, float(timestep), last)
            assert last == entry


def test_a_first_timestep_that_fits_several_units_begins_where_the_scheduler_says() -> None:
    found = schedule(torch.tensor([1000.0, 750.0, 500.0, 1.0]))
    found.scheduler.begin_index = 3
    assert found.entry(torch.tensor(1.0), 1.0, None) == 3


@pytest.mark.parametrize(
    ("timestep", "value", "uneven"),
    [
        (7, 7.0, False),
        (torch.tensor(7), 7.0, False),
        (torch.tensor(7.0).expand(3), 7.0, False),
        (torch.tensor([7.0, 7.0]), 7.0, False),
        (torch.tensor([0.0, 7.0]), 7.0, False),  # a clean frame
        (torch.tensor([5.0, 7.0]), 6.0, True),
        (torch.tensor([]), None, False),
        (None, None, False),
    ],
)
def test_a_timestep_on_the_host(timestep: Tensor | float | None, value: float | None, uneven: bool) -> None:
    numbers = timestep.flatten().tolist() if isinstance(timestep, Tensor) and timestep.numel() else None
    assert on_host(timestep) == OnHost(value, uneven, numbers)


def test_a_schedule_that_the_sampler_divides_in_place() -> None:
    """A view of it no longer has the value that was read."""
    found = schedule(FLOATS.clone())
    first = found.tensor[0]
    assert found.place(first) == 0
    first /= 1000
    assert found.place(first) is None
    assert found.entry(first, float(first), None) == 0


def test_timesteps_that_a_property_computes() -> None:
    """Another tensor with the same timesteps does not count as set again."""

    class Computing:
        num_steps = 4

        @property
        def timesteps(self) -> Tensor:
            return torch.linspace(999, 0, self.num_steps)

    scheduler = Computing()
    found = Schedule(scheduler, noise=False)
    assert found.is_current
    scheduler.num_steps = 5
    assert not found.is_current


def test_timesteps_that_are_no_tensor() -> None:
    found = Schedule(SimpleNamespace(timesteps=FLOATS.double().numpy()), noise=False)
    assert [t.item() for t in found.given(FLOATS[1], 1)] == FLOATS.tolist()
