"""The conditioning of a stream: which tensors its calls have, and which of them are data that moves."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.tensors import alike, version


class Kind(Enum):
    """What is known of a tensor of the conditioning."""

    NEW = "seen in one step"
    STEADY = "the same in several steps"
    DATA = "another one in each step"


class _Held:
    """One tensor: the object (weakly: one that is gone cannot come again) and its memory, to compare its content."""

    __slots__ = ("ref", "alias", "version", "kind")

    def __init__(self, tensor: Tensor, kind: Kind) -> None:
        self.ref = weakref.ref(tensor)
        self.alias = tensor.detach() if kind is not Kind.DATA else None  # shares the version counter
        self.version = version(tensor)
        self.kind = kind

    def is_(self, tensor: Tensor) -> bool:
        """Whether this is the very tensor, unchanged since."""
        return self.ref() is tensor and self.version == version(tensor)

    def comparable(self, tensor: Tensor) -> Tensor | None:
        """The memory of the held tensor, if that may equal `tensor` and was not changed since."""
        alias = self.alias
        if alias is None or not alike(alias, tensor):
            return None
        return alias if self.version == (None if self.version is None else alias._version) else None


class Conditioning:
    """The conditioning of a stream's calls. Places number the tensors in the order of the arguments."""

    def __init__(self, inputs: Inputs) -> None:
        self.rest = inputs.rest
        self._held = [_Held(tensor, Kind.NEW) for tensor in inputs.conditioning]

    def __len__(self) -> int:
        return len(self._held)

    def is_like(self, inputs: Inputs) -> bool:
        """Whether everything but the tensors themselves is as in `inputs`."""
        return self.rest == inputs.rest and len(self._held) == len(inputs.conditioning)

    def differing(self, inputs: Inputs) -> list[int]:
        """The places at which `inputs` have another tensor, or one that was changed; data is left aside."""
        pairs = enumerate(zip(self._held, inputs.conditioning, strict=True))
        return [i for i, (held, tensor) in pairs if held.kind is not Kind.DATA and not held.is_(tensor)]

    def before(self, inputs: Inputs, place: int) -> Tensor | None:
        """The tensor at a place as it was, where that of `inputs` may equal it; None where it differs for certain."""
        return self._held[place].comparable(inputs.conditioning[place])

    def are_gone(self, places: Sequence[int]) -> bool:
        """Whether the tensors at `places` were seen in one step alone and do not exist any more."""
        return all(self._held[i].ref() is None and self._held[i].kind is Kind.NEW for i in places)

    def is_gone(self) -> bool:
        """Whether some tensor does not exist any more and its content is not held: no call can have this again."""
        return any(held.ref() is None and held.alias is None and held.kind is not Kind.DATA for held in self._held)

    def hold(self, inputs: Inputs, data: Sequence[int] = ()) -> None:
        """Take the tensors of `inputs` in the place of those before; those at the places `data` move."""
        for i in self.differing(inputs):
            self._held[i] = _Held(inputs.conditioning[i], Kind.DATA if i in data else self._held[i].kind)

    def settle(self) -> None:
        """All tensors that did not move until the second step are steady."""
        for held in self._held:
            if held.kind is Kind.NEW:
                held.kind = Kind.STEADY

    def release(self) -> None:
        """Keep no memory alive; from now on tensors are told by identity alone."""
        for held in self._held:
            held.alias = None

    def steady(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The tensors of `inputs` that may stay the same: all but data."""
        pairs = zip(self._held, inputs.conditioning, strict=True)
        return tuple(tensor for held, tensor in pairs if held.kind is not Kind.DATA)


def unequal(streams: Sequence[tuple[Conditioning, list[int]]], inputs: Inputs) -> list[list[int]]:
    """Of the places at which each conditioning has another tensor than `inputs`, those where the content differs too.

    Reads the device once. NaN is equal to nothing.
    """
    pairs = [(held.before(inputs, i), inputs.conditioning[i]) for held, places in streams for i in places]
    differ = [(before != now).any() for before, now in pairs if before is not None]
    read = iter(torch.stack([number.to(differ[0].device) for number in differ]).tolist() if differ else ())
    found = iter([before is None or next(read) for before, _ in pairs])
    return [[i for i in places if next(found)] for _, places in streams]
