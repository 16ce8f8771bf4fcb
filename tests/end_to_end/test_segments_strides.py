"""Segments of a model whose stream has a non-contiguous memory layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.policies import FORA
from tests.helpers.tracing import tokens

WIDTH = 32


class Block(nn.Module):
    """An MLP behind a norm, with an optional norm behind the sum."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.norm, self.after = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH) if post else nn.Identity()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.ff(self.norm(x)))


class Audio(nn.Module):
    """A convolution embeds the samples of a waveform; its transposed output is the stream."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv1d(4, WIDTH, 2, stride=2), nn.Conv1d(WIDTH, 4, 1)
        self.blocks = nn.ModuleList(Block(post) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.leave(x.transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("post", [False, True], ids=["pre-norm", "post-norm"])
def test_reuse_0_of_a_transposed_stream(post: bool) -> None:
    """A cut keeps the strides of the stream: a mean over a copy with other strides would round differently."""
    calls: list[dict[str, Any]] = [{"x": tokens(0, 2, 4, 16) + 0.1 * i * tokens(1, 2, 4, 16)} for i in range(3)]
    model = Audio(post).eval().requires_grad_(False)
    found = dit_rewrite.verify(copy.deepcopy(model), calls, FORA(2), backend="aot_eager", lowering="segments")
    assert found.exact, found
    assert found.reused == 3
