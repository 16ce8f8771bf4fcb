"""One captured variant: the devices, states, views and layouts of its inputs, and the buffers that it reads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from dit_rewrite.errors import GraphReason
from dit_rewrite.runtime import captured
from dit_rewrite.runtime.cuda_capture import CudaDevice
from dit_rewrite.runtime.static_buffers import Buffer, Layout, duplicates, fill
from tests.helpers.chains import Lone


def test_tensors_on_two_devices() -> None:
    lone = Lone(lambda x, y: (x + 1,), 2)
    for _ in range(4):
        assert lone(torch.zeros(2), torch.zeros(2, device="meta"))[0].tolist() == [1, 1]
    assert lone.stats.uncaptured == Counter({GraphReason.MIXED_DEVICES: 4})


def test_the_device_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that comes as a tensor on the CPU, as the time may, is not where the model is."""
    lone, asked = Lone(lambda t, x: (x + 1,), 2), []
    monkeypatch.setattr(lone.device, "queue", asked.append)
    lone(torch.tensor(0.5), torch.zeros(2, device="meta"))
    lone(torch.tensor(0.5), torch.zeros(2))
    assert [device.type for device in asked] == ["meta", "cpu"]


def test_a_state_that_is_updated_in_place() -> None:
    def count(x: Tensor, counters: Tensor) -> tuple[Tensor]:
        return (x + counters.add_(1),)

    lone = Lone(count, 1, cached=1, counters=0)
    lone.cache.values[0] = (torch.zeros(1),)
    assert [lone(torch.zeros(1))[0].item() for _ in range(4)] == [1, 2, 3, 4]
    assert lone.stats.uncaptured == Counter({GraphReason.STATE_IN_PLACE: 4})


def test_a_value_of_the_slot_that_the_graph_fills() -> None:
    """A result that is a view of the old value is copied before the new one is written over it."""

    def swap(x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        return old.view(-1), x * 2

    lone = Lone(swap, 1, cached=1, fresh=1)
    lone.cache.values[0] = (torch.zeros(1, 1),)
    before = 0.0
    for i in range(1, 7):
        old, new = lone(torch.full((1, 1), float(i)))
        assert old.item() == before
        held, before = new, 2.0 * i
        assert held.item() == before
        lone.cache.values[0] = (held.clone(),)
    assert lone.stats.replays == 4


def test_hoisted_values_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody changes a hoisted value, so its buffer is filled when there is another one. An input is always copied."""
    counts: list[int] = []
    monkeypatch.setattr(captured, "fill", lambda to, values: (counts.append(len(to)), fill(to, values)))
    lone, given, hoisted = Lone(lambda x, hoisted: (x + hoisted,), 2, hoisted=1), torch.zeros(1), torch.zeros(1)
    for i in range(8):
        hoisted = torch.full((1,), 5.0) if i == 5 else hoisted
        assert lone(given.fill_(i), hoisted)[0].item() == i + (5 if i >= 5 else 0)
    assert [count for count in counts if count] == [2, 1, 1, 2, 1, 1]


def test_repeated_memory() -> None:
    """An expanded tensor is kept expanded. A graph that was captured for one does not run on others."""
    lone = Lone(lambda x: (x.sum() + 0 * x,), 1)
    for i in range(1, 5):
        assert lone(torch.full((2, 1), float(i)).expand(2, 3))[0][0, 0] == 6 * i
    assert lone.stats.replays == 2
    assert lone(torch.arange(6.0).view(2, 3))[0][0, 0] == 15
    assert lone.stats.uncaptured[GraphReason.CHANGED_LAYOUT] == 1


def test_buffers() -> None:
    value = torch.randn(3, 4).T
    buffer = Buffer(Layout.of(value))
    assert buffer.tensor.stride() == value.stride() and not buffer.is_copy_of(value)
    fill([buffer], [value])
    assert torch.equal(buffer.tensor, value)
    buffer.note_source(value)
    assert buffer.is_copy_of(value) and not buffer.is_copy_of(value.clone())
    assert buffer.fits(value.contiguous())
    for other in (value[:3], value.double(), 3):
        assert not buffer.fits(other)
    (copied,) = duplicates([value], [buffer.layout])
    assert torch.equal(copied, value) and copied.stride() == value.stride()


def test_a_cpu_has_no_graphs() -> None:
    assert CudaDevice().queue(torch.device("cpu")) is GraphReason.NO_GPU
