"""Comparison of tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_rewrite.runtime.tensors import checksum, relative_change

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "an element": lambda t: t.view(-1)[3].add_(1),
    "the last element": lambda t: t.view(-1)[-1].add_(1),
    "the last bit of an element": lambda t: t.view(-1)[:1].view(torch.uint8)[0].bitwise_xor_(1),
    "the sign": lambda t: t.neg_(),
    "the order of the rows": lambda t: t.copy_(t.flip(0).clone()),
    "the order of the columns": lambda t: t.copy_(t.flip(1).clone()),
    "two elements that cancel": lambda t: t.view(-1)[:2].copy_(torch.tensor([5, -5], dtype=t.dtype) + t.view(-1)[:2]),
}
SHAPES = {"copied": (4, 8), "summed": (64, 2000), "summed, of odd size": (63, 2001)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_checksum_notices_a_change(
    change: Callable[[Tensor], object], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    tensors = [torch.randn(shape).to(dtype) for _ in range(2)]
    before = checksum(tensors)
    assert torch.equal(before, checksum([tensor.clone() for tensor in tensors]))
    change(tensors[1])
    assert not torch.equal(before, checksum(tensors))


def test_the_checksum_of_a_large_tensor_is_small() -> None:
    assert checksum([torch.randn(64, 2000)]).nbytes == 64 * 2000 * 4 // 64


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
def test_the_checksum_of_other_dtypes(dtype: torch.dtype) -> None:
    tensor = torch.arange(8).to(dtype)
    before = checksum([tensor])
    tensor[0] = 1
    assert not torch.equal(before, checksum([tensor]))


@pytest.mark.parametrize("offset", range(5))
def test_the_checksum_of_a_view_depends_on_its_elements_alone(offset: int) -> None:
    memory = torch.randn(128, 100).bfloat16().flatten()
    view = memory[offset : offset + 12000]
    before = checksum([view])
    memory[offset + 12000 :] = 0
    assert torch.equal(before, checksum([view]))
    assert torch.equal(checksum([view.view(100, 120).t()]), checksum([view.view(100, 120).t().contiguous()]))
    view[-1] = 7
    assert not torch.equal(before, checksum([view]))


def test_the_checksum_of_nothing() -> None:
    assert checksum([]).numel() == 0 and checksum([torch.zeros(0, 3)]).numel() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_tokens_are_compared_as_one_hot_vectors(dtype: torch.dtype) -> None:
    before = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1]).to(dtype)
    now = before.clone()
    assert relative_change(now, before) == 0
    now[0] = 1
    one_hot = [torch.nn.functional.one_hot(t.long(), 2).double() for t in (now, before)]
    assert relative_change(now, before) == torch.linalg.vector_norm(one_hot[0] - one_hot[1]) / one_hot[1].norm()


def test_the_change_of_a_batch_is_the_largest_of_a_sample() -> None:
    before = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    now = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.5]])
    assert relative_change(now, before) == 0.5, "a sample of zeros stays one"
    assert relative_change(now.to(torch.complex64), before.to(torch.complex64).conj()) == 0.5
    assert relative_change(now[2], before[2]) == 0.5, "one dimension is one sample"
    assert relative_change(now + torch.tensor([[0.0], [1.0], [0.0]]), before) == torch.inf
    assert relative_change(torch.zeros(3), torch.zeros(3)).isnan()
