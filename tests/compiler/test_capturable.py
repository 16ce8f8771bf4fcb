"""Graphs that cannot be captured as CUDA graphs, by what is in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dit_rewrite.compiler.capturable import refusal
from dit_rewrite.errors import GraphReason


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x: x[torch.zeros(2, dtype=torch.int64)] + 1, None),
        (lambda x: x[x > 0].sum(), GraphReason.READS_DEVICE),
        (lambda x: x.nonzero(), GraphReason.READS_DEVICE),
        (lambda x: x.sum().item(), GraphReason.READS_DEVICE),
        (lambda x: x + torch.ones(3, device="meta").to("cpu").sum(), GraphReason.MIXED_DEVICES),
    ],
    ids=["index", "mask", "nonzero", "item", "devices"],
)
def test_refusals(run: Callable[[Tensor], Tensor], why: GraphReason | None) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        assert refusal(make_fx(run, tracing_mode="symbolic")(torch.randn(3))) is why
