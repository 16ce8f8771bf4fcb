"""The pass that finds the step table of a graph, and the program that computes its rows at run time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite import torch_compat
from dit_rewrite.compiler.request import Request
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.passes.rewrite.step_tables import StepTables, tabulate
from dit_rewrite.runtime.released import Weights
from dit_rewrite.runtime.step_tables import Columns
from dit_rewrite.runtime.tensors import checksum
from dit_rewrite.runtime.trajectory import Trajectory

_PROGRAMS = 8  # graphs that are kept, one for each set of columns


def run(gm: fx.GraphModule, ctx: Context) -> StepTables:
    """The pass: find the step table."""
    captured, request = ctx[Captured], ctx[Request]
    return tabulate(
        gm,
        captured.static,
        captured.conditioning,
        captured.step,
        request.told,
        request.readable,
        request.tables == "all",
    )


class TableProgram:
    """Computes rows of a step table with the captured ops; many rows at once with each op batched over the steps.

    `weights` may release those of its weights that `released` returns the positions of; None releases none.
    """

    def __init__(
        self, tables: StepTables, weights: Weights | None = None, released: Callable[[], Sequence[int]] = tuple
    ) -> None:
        self._weights, self._released = weights, released
        self._lock = threading.RLock() if weights is None else weights.lock
        self.step, self.weights, self.conditioning = tables.step, tables.weights, tables.conditioning
        self.sizes = tables.sizes
        self.columns: Columns = ()
        self._program = lru_cache(maxsize=_PROGRAMS)(tables.program)
        self.bytes_of = lru_cache(maxsize=_PROGRAMS)(tables.bytes_of)
        self.peak_of = lru_cache(maxsize=_PROGRAMS)(tables.peak_of)

    def add(self, columns: Columns) -> None:
        """Add the columns that a variant reads. Rows that lack them are computed again when they are read."""
        self.columns = tuple(dict.fromkeys((*self.columns, *columns)))

    def row(self, columns: Columns, args: Sequence[Any]) -> Sequence[Tensor]:
        """Return the values of `columns` for the timestep in `args`."""
        gm, inputs = self._program(columns)
        with self._lock, _plain():
            return [_owned(value) for value in gm(*map(args.__getitem__, inputs))]

    def rows(self, columns: Columns, args: Sequence[Any], timesteps: Tensor) -> Sequence[Tensor] | None:
        """Return the values of `columns` for each of `timesteps`, stacked; None if an op cannot be batched."""
        gm, inputs = self._program(columns)
        dims = tuple(0 if i in self.step else None for i in inputs)
        given = [timesteps if i in self.step else args[i] for i in inputs]
        with self._lock, _plain():
            try:
                return [value.contiguous() for value in torch.vmap(gm, dims)(*given)]
            except (RuntimeError, ValueError):  # an op has no batching rule
                return None

    def checksum(self, args: Sequence[Any]) -> Tensor:
        """Return the checksum of the weights."""
        with self._lock:
            return checksum([args[i] for i in self.weights])

    def release(self, args: Sequence[Any]) -> None:
        """Release the weights that only rows are computed from."""
        if self._weights is not None:
            self._weights.release([args[i] for i in self._released()])


def _owned(value: Tensor) -> Tensor:
    """Return a contiguous tensor that keeps no more memory alive than its own, as a part of a product would."""
    dense = value.contiguous()
    return dense if dense.untyped_storage().nbytes() == dense.nbytes else dense.clone()


class _plain:
    """Context manager under which captured ops run as they were captured: without autocast, autograd and inference
    tensors, which have no version counter."""

    def __enter__(self) -> None:
        self._contexts = torch_compat.no_autocast(), torch.inference_mode(False), torch.no_grad()
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *_: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)


def timesteps_known(trajectory: Trajectory, timestep: Tensor | float | None) -> tuple[bool, bool]:
    """Return whether the timestep of a call can be read without a device read, and whether further ones are known.

    They count as known at the last step too: the next trajectory may be longer, as after a warm-up of one step.
    """
    clock = trajectory.clock
    with torch_compat.unset_fake_temporarily():
        if isinstance(timestep, float):
            timestep = torch.tensor(timestep, dtype=torch.float64)  # as Dynamo passes it to the graph
        if not isinstance(timestep, Tensor):
            return timestep is not None, False
        if clock is None:
            return timestep.device.type == "cpu", False
        return clock.numbers(timestep) is not None, bool(clock.given(timestep))
