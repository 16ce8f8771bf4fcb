"""The conditioning of a stream: the tensors of its calls, and which of them vary from step to step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.tensors import address, alike, version

Pair = tuple[Tensor, Tensor] | None  # tensors to compare; None: they differ without comparing their content


class TensorKind(Enum):
    """How a tensor of the conditioning behaves over the steps."""

    NEW = "seen in one step"
    INVARIANT = "the same in several steps"
    MOVED = "replaced once: it may vary, or it was exchanged for another condition"
    VARYING = "another one in each step"


class _Entry:
    """One tensor: a weak reference to the object, and an alias of its memory, or a copy, to compare its content with.

    The reference is weak because a tensor that was freed cannot be passed again. ``moved`` is the number of the
    stream's step in which a MOVED tensor was replaced.
    """

    __slots__ = ("ref", "alias", "version", "address", "kind", "moved")

    def __init__(self, tensor: Tensor, kind: TensorKind, moved: int = 0) -> None:
        self.ref = weakref.ref(tensor)
        self.alias = _alias(tensor) if kind is not TensorKind.VARYING else None
        self.version, self.address = version(tensor), address(tensor)
        self.kind, self.moved = kind, moved

    def is_(self, tensor: Tensor, told: bool = True) -> bool:
        """Return whether `tensor` is the same object, unmodified since.

        Inference tensors have no version. On a CPU their content is compared; on other devices that would synchronise,
        so in a trajectory that is `told` they count as unmodified.
        """
        same = self.ref() is tensor and self.version == version(tensor) and self.address == address(tensor)
        trusted = self.version is not None or self.alias is None or (told and tensor.device.type != "cpu")
        return same and (trusted or torch.equal(self.alias, tensor))  # type: ignore[arg-type]

    def comparable(self, tensor: Tensor) -> Tensor | None:
        """Return the alias if it may equal `tensor` and was not modified since, or None."""
        alias = self.alias
        if alias is None or not alike(alias, tensor):
            return None
        return alias if self.version == (None if self.version is None else alias._version) else None


def _alias(tensor: Tensor) -> Tensor:
    """Return a tensor with the same memory and version counter, or a copy of an inference tensor, which has none."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


class Conditioning:
    """The conditioning of a stream's calls. A place is the index of a tensor in the order of the arguments."""

    def __init__(self, inputs: Inputs) -> None:
        self.rest = inputs.rest
        self._entries = [_Entry(tensor, TensorKind.NEW) for tensor in inputs.conditioning]

    def __len__(self) -> int:
        return len(self._entries)

    def is_like(self, inputs: Inputs) -> bool:
        """Return whether everything except the tensors themselves equals that of `inputs`."""
        return self.rest == inputs.rest and len(self._entries) == len(inputs.conditioning)

    def differing(self, inputs: Inputs, told: bool = True) -> list[int]:
        """Return the places at which `inputs` have a different or modified tensor. Varying tensors are ignored."""
        pairs = enumerate(zip(self._entries, inputs.conditioning, strict=True))
        kept = [(i, entry, tensor) for i, (entry, tensor) in pairs if entry.kind is not TensorKind.VARYING]
        return [i for i, entry, tensor in kept if not entry.is_(tensor, told)]

    def pair(self, inputs: Inputs, place: int) -> Pair:
        """Return the old and the new tensor at a place, for `equal` to compare."""
        before = self._entries[place].comparable(inputs.conditioning[place])
        return None if before is None else (before, inputs.conditioning[place])

    def places(self, *kinds: TensorKind) -> list[int]:
        """Return the places of tensors of these kinds."""
        return [i for i, entry in enumerate(self._entries) if entry.kind in kinds]

    def may_vary(self, places: Sequence[int]) -> bool:
        """Return whether none of the tensors at `places` was the same in two steps."""
        return all(self._entries[i].kind is not TensorKind.INVARIANT for i in places)

    def have_moved(self, places: Sequence[int], number: int) -> bool:
        """Return whether the tensors at `places` were replaced in a step before the stream's step `number` too."""
        return all(self._entries[i].kind is TensorKind.MOVED and self._entries[i].moved < number for i in places)

    def shares(self, other: Conditioning, places: Sequence[int]) -> bool:
        """Return whether both have the same tensor objects at `places`, even if these were freed."""
        return all(self._entries[i].ref is other._entries[i].ref for i in places)  # a tensor has one weak reference

    def are_gone(self, places: Sequence[int]) -> bool:
        """Return whether the tensors at `places` were freed, and none of them was the same in two steps."""
        return self.may_vary(places) and all(self._entries[i].ref() is None for i in places)

    def is_gone(self) -> bool:
        """Return whether some tensor was freed and has no alias, so that no call can match this conditioning again."""
        return any(
            entry.ref() is None and entry.alias is None and entry.kind is not TensorKind.VARYING
            for entry in self._entries
        )

    def hold(self, inputs: Inputs) -> None:
        """Replace the tensors by those of `inputs`, which equal them."""
        for i in self.differing(inputs):
            self._entries[i] = _Entry(inputs.conditioning[i], self._entries[i].kind, self._entries[i].moved)

    def move(self, inputs: Inputs, places: Sequence[int], number: int, vary: bool) -> None:
        """Replace the tensors by those of `inputs`. Those at `places` are others in the stream's step `number`.

        `vary`: it is proven that they vary.
        """
        for i in places:
            kind = TensorKind.VARYING if vary else TensorKind.MOVED
            self._entries[i] = _Entry(inputs.conditioning[i], kind, number)
        self.hold(inputs)

    def settle(self, number: int) -> None:
        """Mark the tensors that were the same in two steps as invariant; the stream is in its step `number`."""
        for entry in self._entries:
            if entry.kind is TensorKind.NEW or entry.kind is TensorKind.MOVED and entry.moved < number:
                entry.kind = TensorKind.INVARIANT

    def release(self) -> None:
        """Release the memory; from now on tensors are compared by identity only."""
        for entry in self._entries:
            entry.alias = None

    def invariant(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the tensors of `inputs` that no step has replaced."""
        pairs = zip(self._entries, inputs.conditioning, strict=True)
        return tuple(tensor for entry, tensor in pairs if entry.kind in (TensorKind.NEW, TensorKind.INVARIANT))


def equal(pairs: Sequence[Pair]) -> list[bool]:
    """Return which pairs are bitwise equal, with one device read. NaN is not equal to itself."""
    differ = [(pair[0] != pair[1]).any() for pair in pairs if pair is not None]
    read = iter(torch.stack([d.to(differ[0].device) for d in differ]).tolist() if differ else [])
    return [pair is not None and not next(read) for pair in pairs]
