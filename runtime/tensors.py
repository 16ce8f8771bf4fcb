"""Comparison of tensors by identity, version counter and relative change."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK, WHOLE = 64, 8192  # words of a checksum


def version(tensor: Tensor) -> int | None:
    """Return the version counter of a tensor, or None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's data, which changes if its ``data`` is replaced; the version counter does not.

    0 for a subclass that has none.
    """
    return 0 if type(tensor) not in (Tensor, torch.nn.Parameter) else tensor.data_ptr()


def storage_address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, which its views share."""
    return tensor.untyped_storage().data_ptr()


def versions(tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
    """Return the version counter of each tensor; see `version`."""
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:  # at least one is an inference tensor
        return tuple(map(version, tensors))


@dataclass(frozen=True)
class Memoized:
    """Values together with the input tensors, and their version counters, that they were computed from.

    The inputs are weak references, because a tensor that was freed cannot be passed again.
    """

    inputs: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int | None, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, inputs: Sequence[Tensor], values: Sequence[Tensor]) -> Memoized:
        return cls(tuple(map(weakref.ref, inputs)), versions(inputs), tuple(values))

    @property
    def is_alive(self) -> bool:
        """Return whether the same inputs can be passed again."""
        return all(reference() is not None for reference in self.inputs)

    def valid_for(self, inputs: Sequence[Tensor], explicit: bool) -> bool:
        """Return whether `inputs` are the same tensor objects, unmodified since.

        Inference tensors have no version counter. They count as unmodified only in an `explicit` trajectory, whose
        contract is that the caller does not modify the conditioning.
        """
        if not all([before() is now for before, now in zip(self.inputs, inputs, strict=True)]):
            return False
        current = versions(inputs)
        if None in current:
            return all(
                explicit if now is None else now == before for before, now in zip(self.versions, current, strict=True)
            )
        return current == self.versions


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums, modulo 2**64, of every CHUNK words of 8 bytes of the tensors' memory, as an int64 vector.

    It notices changes that leave the version counter as it is: those of `tensor.data`, by which adapters are merged. It
    reads the memory once, at its speed. Tensors of at most WHOLE words are copied. In others it does not notice words
    that change places within a chunk.
    """
    parts = [part for tensor in tensors for part in _sums(_words(tensor))]
    return torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.zeros(0)


def _words(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as a vector of the widest integers that fit its size and address."""
    plain = tensor.detach().contiguous()
    octets = (torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain).flatten().view(torch.uint8)
    width = math.gcd(len(octets), octets.storage_offset(), 8)
    return octets.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])


def _sums(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of all whole chunks of a vector, and the words behind them."""
    summed = len(words) // CHUNK * CHUNK if len(words) > WHOLE else 0
    return words[:summed].view(-1, CHUNK).sum(1, dtype=torch.int64), words[summed:].long()


def alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and device."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def relative_changes(now: Tensor | None, before: Sequence[Tensor | None]) -> list[float]:
    """Return the relative L2 change from each tensor of `before` to `now`, with one device read; NaN means unknown."""
    known = [i for i, tensor in enumerate(before) if now is not None and tensor is not None and alike(now, tensor)]
    changes = [float("nan")] * len(before)
    if not known:
        return changes
    measured = torch.stack([relative_change(now, before[i]) for i in known])  # type: ignore[arg-type]
    for i, change in zip(known, measured.tolist(), strict=True):
        changes[i] = change
    return changes


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """Return the largest relative L2 change of a sample as a 0-d float64 tensor; norms are computed in float32.

    A sample is an entry of the first of several dimensions. Integers are tokens, and compared as one-hot vectors.
    """
    if now is before:
        return torch.zeros((), dtype=torch.float64, device=now.device)
    if now.ndim < 2 or now.numel() == 0:
        now, before = now.reshape(1, -1), before.reshape(1, -1)
    if now.is_complex():
        now, before = (torch.view_as_real(latent.resolve_conj()) for latent in (now, before))
    now, before, dims = now.detach(), before.detach(), tuple(range(1, now.ndim))
    if not now.is_floating_point():
        return (2 * (now != before).to(torch.float64).mean(dims)).sqrt().max()
    change = torch.linalg.vector_norm(now - before, dim=dims, dtype=torch.float32)
    size = torch.linalg.vector_norm(before, dim=dims, dtype=torch.float32)
    if len(change) > 1:  # a sample of zeros may stay one
        size = torch.where((change == 0) & (size == 0), 1.0, size)
    return (change / size).max().to(torch.float64)
