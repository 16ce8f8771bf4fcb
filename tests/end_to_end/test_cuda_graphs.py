"""CUDA graphs with a live cache, on whole models: each run equals the same run without graphs, bit for bit.

On a CPU a fake replays; test_cuda_graphs_cuda.py does the same on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite
from dit_rewrite.errors import BadArgument, GraphReason
from dit_rewrite.module import RewrittenModule
from tests.helpers import fake_graphs, tiny
from tests.helpers.fake_graphs import FakeDevice
from tests.helpers.tiny import calls, same

LOWERINGS = pytest.mark.parametrize("lowering", ["variants", "segments"])
STEPS = 9


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return fake_graphs.install(monkeypatch)


def pair(policy: Any = None, **options: Any) -> tuple[RewrittenModule, RewrittenModule]:
    """The same model without and with graphs."""
    model = tiny.build()
    return tiny.rewritten(model, policy, **options), tiny.rewritten(model, policy, cuda_graphs=True, **options)


@LOWERINGS
def test_trajectories(device: FakeDevice, lowering: str) -> None:
    """Outputs that the caller keeps stay as they are; a second trajectory captures nothing again."""
    plain, captured = pair(lowering=lowering)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for seed in range(3):
        with plain.trajectory(STEPS), captured.trajectory(STEPS):
            expected += tiny.outputs(plain, calls(STEPS, seed))
            found += fake_graphs.run(captured, calls(STEPS, seed), device)
        if seed == 1:
            before = captured.stats()
    assert same(found, expected)
    stats = captured.stats()
    segments = 1 if lowering == "variants" else 3
    print(stats)
    assert stats.captures == before.captures
    assert stats.replays > 0
