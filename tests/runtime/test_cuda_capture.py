"""Captures by torch, with a fake in the place of `torch.cuda`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dit_rewrite.runtime.cuda_capture import CudaPool


class FakeCuda:
    """The current stream, and the number of captures that are underway. As in torch, a capture that cannot end leaves
    its stream current."""

    def __init__(self) -> None:
        self.current, self.underway, self.fails = "caller's", 0, False

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, pool: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert not self.underway
        self.underway += 1
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.underway -= 1
            if self.fails:
                raise RuntimeError("capture_end")
            self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    replaced: dict[str, Any] = {
        "stream": fake.stream,
        "graph": fake.graph,
        "CUDAGraph": object,
        "Stream": lambda device: "pool's",
        "graph_pool_handle": object,
        "memory_reserved": lambda device: 0,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return fake


def test_a_capture(cuda: FakeCuda) -> None:
    pool, seen = CudaPool(torch.device("cuda")), []
    pool.capture(lambda: (seen.append(cuda.current), ())[1])
    assert seen == ["pool's"] and cuda.current == "caller's"


def test_a_capture_that_cannot_end(cuda: FakeCuda) -> None:
    """The call goes on without a graph, in the stream of the caller."""
    pool = CudaPool(torch.device("cuda"))
    cuda.fails = True
    with pytest.raises(RuntimeError, match="capture_end"):
        pool.capture(lambda: ())
    assert cuda.current == "caller's"


def test_one_capture_at_a_time(cuda: FakeCuda) -> None:
    """A second thread waits: torch synchronises with the device before a capture, which would spoil the first one."""
    pool, inside, began = CudaPool(torch.device("cuda")), threading.Event(), threading.Event()

    def first() -> tuple[()]:
        inside.set()
        assert not began.wait(0.1)
        return ()

    def second() -> None:
        inside.wait(5)
        pool.capture(lambda: (began.set(), ())[1])

    thread = threading.Thread(target=second)
    thread.start()
    pool.capture(first)
    thread.join()
    assert began.is_set()
