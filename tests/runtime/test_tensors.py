"""Comparison of tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_rewrite.runtime.tensors import checksum, relative_change

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "an element": lambda t: t.view(-1)[3].add_(1),
    "the sign": lambda t: t.neg_(),
    "the order of the elements": lambda t: t.copy_(t.flip(0).clone()),
    "two elements that cancel": lambda t: t.view(-1)[:2].copy_(torch.tensor([5, -5], dtype=t.dtype) + t.view(-1)[:2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_checksum_notices_a_change(change: Callable[[Tensor], object], dtype: torch.dtype) -> None:
    tensors = [torch.randn(4, 8).to(dtype) for _ in range(2)]
    before = checksum(tensors)
    assert torch.equal(before, checksum([tensor.clone() for tensor in tensors]))
    change(tensors[1])
    assert not torch.equal(before, checksum(tensors))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
def test_the_checksum_of_other_dtypes(dtype: torch.dtype) -> None:
    tensor = torch.arange(8).to(dtype)
    before = checksum([tensor])
    tensor[0] = 1
    assert not torch.equal(before, checksum([tensor]))


def test_the_checksum_of_nothing() -> None:
    assert checksum([]).numel() == 0


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
