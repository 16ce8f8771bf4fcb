"""Attention strategies on a GPU, by Inductor and Triton kernels, against the naive references on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

pytest.importorskip("diffusers")

import dit_rewrite  # noqa: E402
from dit_rewrite.policy.rules import Policy  # noqa: E402
from tests.end_to_end.test_strategies_inductor import BOTH, STEPS, WINDOWS_AND_BLOCKS  # noqa: E402
from tests.helpers.models import MODELS, output  # noqa: E402

CLOSE = 1e-3  # of the largest element, in fp32


def run(name: str, policy: Policy, device: str, **options: Any) -> tuple[list[Tensor], list[dict[str, str]]]:
    """The model's outputs at each step, on the CPU, and each site's strategies."""
    torch._dynamo.reset()
    case = MODELS[name]
    model = dit_rewrite.compile(case.build().to(device), policy, **options)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), case.inputs(STEPS))
    with torch.no_grad(), model.trajectory(STEPS):
        found = [output(model(**arguments)).cpu() for arguments in inputs]
    return found, [decision.strategies for decision in model.stats().decisions]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("lowering", ["variants", "segments"])
@pytest.mark.parametrize(
    ("name", "policy"),
    [("dit", BOTH), ("sd3", BOTH), ("pixart_alpha", WINDOWS_AND_BLOCKS)],
    ids=["dit", "sd3", "pixart"],
)
def test_on_a_gpu(name: str, policy: Policy, lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default for convolutions
    expected, done = run(name, policy, "cpu", backend="aot_eager")
    found, done_there = run(name, policy, "cuda", lowering=lowering)
    assert done_there == done
    for there, here in zip(found, expected, strict=True):
        assert (there - here).abs().max() < CLOSE * here.abs().max()
