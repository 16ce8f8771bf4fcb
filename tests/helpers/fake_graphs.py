"""CUDA graphs on a CPU: a replay runs the function again, into the memory of its first run.

Before each replay, all that any graph of the pool has returned becomes NaN, as another graph may use its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite.compiler.backend as backend
from dit_rewrite.errors import GraphReason
from dit_rewrite.runtime.static_buffers import Layout


class FakePool:
    """A pool, and the numbers of its captures and replays."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []
        self.captures, self.replays = 0, 0
        self.fails = False

    def capture(self, body: Callable[[], Sequence[Tensor]]) -> FakeReplay:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        return FakeReplay(self, body)

    def poison(self) -> None:
        for tensor in self.memory:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)


class FakeReplay:
    """A captured function. It runs when it is replayed, and not before."""

    bytes = 1000

    def __init__(self, pool: FakePool, body: Callable[[], Sequence[Tensor]]) -> None:
        self._pool, self._body = pool, body
        self.outputs: list[Tensor] = []

    def __call__(self) -> None:
        self._pool.poison()
        self._pool.replays += 1
        found = self._body()
        if not self.outputs:
            with torch.inference_mode(False):
                self.outputs = [Layout.of(tensor).allocate() for tensor in found]
            self._pool.memory += self.outputs
        for output, tensor in zip(self.outputs, found, strict=True):
            output.copy_(tensor)


class FakeDevice:
    """Captures on a CPU. ``current`` is the current queue, or a reason why nothing can be captured."""

    def __init__(self) -> None:
        self.current: Hashable | GraphReason = 0
        self.pools: list[FakePool] = []

    def queue(self, device: torch.device) -> Hashable | GraphReason:
        return self.current

    def pool(self, device: torch.device) -> FakePool:
        self.pools.append(FakePool())
        return self.pools[-1]

    def poison(self) -> None:
        """Overwrite all memory that belongs to no buffer."""
        for pool in self.pools:
            pool.poison()


def install(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Let models that are compiled with ``cuda_graphs=True`` capture on a CPU."""
    device = FakeDevice()
    monkeypatch.setattr(backend, "CudaDevice", lambda: device)
    return device


def run(model: Any, inputs: list[dict[str, Any]], device: FakeDevice) -> list[Tensor]:
    """Return the outputs of each call themselves, after the memory of all graphs was overwritten behind each call."""
    found = []
    with torch.no_grad():
        for arguments in inputs:
            found.append(model(**arguments))
            device.poison()
    return found
