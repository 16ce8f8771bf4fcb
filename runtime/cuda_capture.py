"""Capture of functions as CUDA graphs, by torch."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from dit_rewrite.errors import GraphReason

MODE = "thread_local"  # other threads, such as data loaders, may allocate memory during a capture
_ONE = threading.Lock()  # a process may make one capture at a time


class CudaReplay:
    """A captured function."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Tensor], size: int) -> None:
        self._graph, self.outputs, self.bytes = graph, outputs, size

    def __call__(self) -> None:
        self._graph.replay()


class CudaPool:
    """A pool of memory on one device. A graph without kernels keeps it alive while it has no other graph."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._handle = torch.cuda.graph_pool_handle()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the empty graph
            self._anchor = self._captured(lambda: ())

    def capture(self, body: Callable[[], Sequence[Tensor]]) -> CudaReplay:
        """Capture a function without running it."""
        return self._captured(body)

    def _captured(self, body: Callable[[], Sequence[Tensor]]) -> CudaReplay:
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self._handle, stream=self._stream, capture_error_mode=MODE)
        with _ONE, torch.cuda.stream(self._stream), capture:  # torch leaves the stream current if a capture cannot end
            before = torch.cuda.memory_reserved(self._device)
            outputs = body()
            size = torch.cuda.memory_reserved(self._device) - before
        return CudaReplay(graph, outputs, size)


class CudaDevice:
    """Captures on NVIDIA GPUs."""

    def queue(self, device: torch.device) -> Hashable | GraphReason:
        """Return the current CUDA stream, or why nothing can be captured."""
        if device.type != "cuda":
            return GraphReason.NO_GPU
        if torch.cuda.is_current_stream_capturing():
            return GraphReason.CAPTURING
        return torch.cuda.current_stream(device).cuda_stream

    def pool(self, device: torch.device) -> CudaPool:
        return CudaPool(device)
