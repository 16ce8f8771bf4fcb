"""Tensors at fixed addresses, which captured CUDA graphs read and write."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dit_rewrite import torch_compat


@dataclass(frozen=True)
class Layout:
    """The shape, strides, dtype and device that kernels are compiled for."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    @cached_property
    def repeats(self) -> tuple[int, ...]:
        """The dimensions along which the same memory is repeated."""
        return tuple(i for i, (size, step) in enumerate(zip(self.shape, self.stride, strict=True)) if size > 1 > step)

    def once(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor of this layout in which no memory is repeated."""
        for dimension in self.repeats:
            tensor = tensor.narrow(dimension, 0, 1)
        return tensor

    def allocate(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class Buffer:
    """A tensor at a fixed address."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        with torch.inference_mode(False):  # an inference tensor could not be filled outside of inference mode
            self.tensor = layout.allocate()
            self.target = layout.once(self.tensor)
        self._source: weakref.ref[Tensor] | None = None

    def fits(self, value: Any) -> bool:
        """Return whether kernels that read the buffer compute the same from a copy of `value` in it."""
        layout = self.layout
        same = isinstance(value, Tensor) and value.shape == layout.shape and value.dtype is layout.dtype
        return same and (not layout.repeats or value.stride() == layout.stride)

    def note_source(self, value: Tensor) -> None:
        """Record that the buffer is a copy of a tensor that nobody changes."""
        self._source = weakref.ref(value)

    def is_copy_of(self, value: Tensor) -> bool:
        """Return whether `note_source` recorded this very tensor last."""
        return self._source is not None and self._source() is value

    @property
    def bytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()


def fill(buffers: Sequence[Buffer], values: Sequence[Tensor]) -> None:
    """Copy values, which fit, into buffers, with few launches."""
    if buffers:
        sources = [buffer.layout.once(value) for buffer, value in zip(buffers, values, strict=True)]
        torch_compat.copy_each([buffer.target for buffer in buffers], sources)


def duplicates(tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Return copies of tensors, whose layouts are given, with few launches."""
    made = [layout.allocate() for layout in layouts]
    if made:
        targets, sources = ([each.once(t) for each, t in zip(layouts, side, strict=True)] for side in (made, tensors))
        torch_compat.copy_each(targets, sources)
    return made
