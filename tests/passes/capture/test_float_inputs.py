"""Ops that fill a tensor with a float argument keep it as a graph input, give the same values, and compile once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dit_rewrite.passes.capture.float_inputs import keep_floats

X = torch.arange(8.0).view(2, 4)

FILLS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "full": lambda x, t: torch.full((2,), t),
    "full of a dtype": lambda x, t: torch.full((2, 3), fill_value=t, dtype=torch.float64),
    "full_like": lambda x, t: torch.full_like(x, t),
    "full_like of a dtype": lambda x, t: torch.full_like(x, t, dtype=torch.bfloat16),
    "new_full": lambda x, t: x.new_full((3,), t),
    "tensor": lambda x, t: torch.tensor(t),
    "tensor of a list": lambda x, t: torch.tensor([[t]]),
}


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS.keys())
def test_fills(fill: Callable[[Tensor, float], Tensor]) -> None:
    graphs: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(keep_floats(gm))
        return torch._dynamo.backends.debugging.aot_eager(gm, example_inputs)

    compiled = torch.compile(fill, backend=backend)
    for t in (999.5, 0.1, 1e-30, 3.0):
        found, expected = compiled(X, t), fill(X, t)
        assert torch.equal(found, expected)
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    assert graphs == [0, 1], "the first call has a constant, and all others share a graph"


def test_other_uses_are_left() -> None:
    def f(x: Tensor, t: float) -> Tensor:
        return x * t + torch.full((4,), 2 * t) + torch.full((4,), t, dtype=torch.int64)

    counts = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        counts.append(keep_floats(gm))
        return gm.forward

    compiled = torch.compile(f, backend=backend)
    for t in (3.5, 2.5):
        assert torch.equal(compiled(X, t), f(X, t))
    assert counts == [0, 0]
