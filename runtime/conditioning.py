"""The conditioning of a stream: which tensors its calls have, and which of them are data that moves."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.tensors import alike, version

Pair = tuple[Tensor, Tensor] | None  # tensors to compare; None: they differ whatever they hold


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

    def pair(self, inputs: Inputs, place: int) -> Pair:
        """The tensors at a place, before and now, for `equal` to compare."""
        before = self._held[place].comparable(inputs.conditioning[place])
        return None if before is None else (before, inputs.conditioning[place])

    @property
    def data(self) -> list[int]:
        """The places of data."""
        return [i for i, held in enumerate(self._held) if held.kind is Kind.DATA]

    def is_new(self, places: Sequence[int]) -> bool:
        """Whether the tensors at `places` were seen in one step alone."""
        return all(self._held[i].kind is Kind.NEW for i in places)

    def shares(self, other: Conditioning, places: Sequence[int]) -> bool:
        """Whether two have the very same tensors at `places`, which may not exist any more."""
        return all(self._held[i].ref is other._held[i].ref for i in places)  # a tensor has one weak reference

    def are_gone(self, places: Sequence[int]) -> bool:
        """Whether the tensors at `places` were seen in one step alone and do not exist any more."""
        return self.is_new(places) and all(self._held[i].ref() is None for i in places)

    def is_gone(self) -> bool:
        """Whether some tensor does not exist any more and its content is not held: no call can have this again."""
        return any(held.ref() is None and held.alias is None and held.kind is not Kind.DATA for held in self._held)

    def hold(self, inputs: Inputs, data: Sequence[int] = ()) -> None:
        """Take the tensors of `inputs` in the place of those before; those at the places of `data` move."""
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


def equal(pairs: Sequence[Pair]) -> list[bool]:
    """Which pairs are equal bit for bit; by one read of the device. NaN is equal to nothing."""
    differ = [(pair[0] != pair[1]).any() for pair in pairs if pair is not None]
    read = iter(torch.stack([d.to(differ[0].device) for d in differ]).tolist() if differ else [])
    return [pair is not None and not next(read) for pair in pairs]
