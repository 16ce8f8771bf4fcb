"""Released weights: exactly their bytes are freed, they can be read and written, and what is shared stays."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dit_rewrite.errors import TableReason
from dit_rewrite.runtime.released import Weights
from dit_rewrite.runtime.stats import Stats

SHAPES = ((7,), (300, 5), (64, 33))
BYTES = sum(torch.Size(shape).numel() for shape in SHAPES) * 4


def parameters() -> list[nn.Parameter]:
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]
    return [nn.Parameter(tensor, requires_grad=False) for tensor in drawn]


@pytest.fixture
def weights() -> Weights:
    return Weights(Stats())


def test_exactly_the_bytes_of_the_weights_are_freed(weights: Weights) -> None:
    """As torch's allocator counts them; it knows blocks that were allocated while it is watched."""
    held: list[nn.Parameter] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.profiler.record_function("allocate"):
            held += parameters()
        with torch.profiler.record_function("release"):
            weights.release(held)
        with torch.profiler.record_function("bring back"):
            weights.bring_back()
    changes = {event.name: event.cpu_memory_usage for event in profiled.events()}
    assert (changes["allocate"], changes["release"], changes["bring back"]) == (BYTES, -BYTES, BYTES)


def test_a_released_weight_is_the_same_object_with_the_same_metadata(weights: Weights) -> None:
    weight = nn.Parameter(torch.randn(6, 4).t())
    before, values = (weight.shape, weight.stride(), weight.dtype, weight.device, weight._version), weight.tolist()
    for act in (lambda: weights.release([weight]), weights.bring_back):
        act()
        assert (weight.shape, weight.stride(), weight.dtype, weight.device, weight._version) == before
        assert weight.requires_grad
        assert weight.tolist() == values
    assert weight.untyped_storage().resizable()


def test_inference_mode(weights: Weights) -> None:
    """A trajectory in inference mode leaves weights that can be changed, with a version counter."""
    weight = parameters()[1]
    for act in (lambda: weights.release([weight]), weights.bring_back):
        with torch.inference_mode():
            act()
        assert not weight.is_inference()
        before = weight._version
        weight.mul_(2)
        assert weight._version == before + 1


def test_bytes(weights: Weights) -> None:
    held = parameters()
    weights.release(held)
    assert weights.bytes == BYTES
    del held[2]
    assert weights.bytes == BYTES - 64 * 33 * 4
    weights.bring_back()
    assert weights.bytes == 0


def test_released_weights_can_be_copied_and_saved(weights: Weights) -> None:
    model = nn.Linear(5, 3)
    plain = copy.deepcopy(model)
    weights.release(list(model.parameters()))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for state in (model.state_dict(), copy.deepcopy(model).state_dict(), torch.load(buffer)):
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert all(p.untyped_storage().resizable() for p in copy.deepcopy(model).parameters())


def test_a_weight_that_was_written_is_in_memory_until_it_is_released_again(weights: Weights) -> None:
    weight, other = held = parameters()[1:]
    weights.release(held)
    expected = weight * 2
    weight.mul_(2)
    assert weights.bytes == other.nbytes
    weights.release(held)
    assert weights.bytes == weight.nbytes + other.nbytes
    weights.bring_back()
    assert torch.equal(weight, expected)


def test_releasing_again_moves_nothing(weights: Weights) -> None:
    held = parameters()
    weights.release(held)
    addresses = [weight.data_ptr() for weight in held]
    weights.release(held)
    assert [weight.data_ptr() for weight in held] == addresses


def test_a_weight_with_another_storage_is_not_overwritten(weights: Weights) -> None:
    """As after `model.to`, or after a checkpoint was assigned."""
    (weight, *_) = held = parameters()
    weights.release(held)
    weight.data = torch.full((7,), 3.0)
    weights.bring_back()
    assert weight.tolist() == [3.0] * 7


def test_files_have_no_name(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing is left behind when the process ends, however it ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    weights.release(parameters())
    assert not list(tmp_path.iterdir())


def view(weight: Tensor) -> Tensor:
    return weight.view(-1)


@pytest.mark.parametrize("other", [view, torch.Tensor.detach], ids=["view", "state_dict"])
def test_a_storage_that_another_tensor_has_stays(weights: Weights, other: Callable[[Tensor], Tensor]) -> None:
    weight = parameters()[1]
    also = other(weight)
    weights.release([weight])
    assert weights._stats.tables == {TableReason.SHARED_STORAGE: 1}
    also.zero_()
    assert not weight.any()
    del also
    weights.release([weight])
    assert weights.bytes == weight.nbytes


class Labelled(Tensor):
    """A subclass, which may keep its data elsewhere."""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(4, 4)[1:], TableReason.SHARED_STORAGE),
        (lambda: torch.zeros(4, 4)[:2], TableReason.SHARED_STORAGE),
        (lambda: torch.zeros(4, 1).expand(4, 4), TableReason.SHARED_STORAGE),
        (lambda: torch.zeros(3).as_subclass(Labelled), TableReason.NOT_PLAIN),
        (lambda: torch.zeros(3, device="meta"), TableReason.OFF_CPU),
    ],
)
def test_refused(weights: Weights, make: Callable[[], Tensor], why: TableReason) -> None:
    weights.release([make()])
    assert weights._stats.tables == {why: 1}
    assert weights.bytes == 0


def test_files_in_memory_are_of_no_use(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tmpfs /dev/shm tmpfs" not in Path("/proc/mounts").read_text():
        pytest.skip("no file system in memory")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    weights.release(parameters()[:1])
    assert weights._stats.tables == {TableReason.FILES_IN_MEMORY: 1}


def test_without_a_folder_that_can_be_written_weights_stay(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    weights.release(parameters())
    assert weights._stats.tables == {TableReason.NO_SPACE: len(SHAPES)}
    assert weights.bytes == 0


def test_without_space_weights_stay(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    held = parameters()
    weights.release(held)
    assert weights._stats.tables == {TableReason.NO_SPACE: len(held)}
    assert all(weight.untyped_storage().resizable() for weight in held)
