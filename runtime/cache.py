"""Slots: the values that the sites of one graph hold, for one occurrence of it in one stream of one trajectory."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.measure import Tracked
from dit_rewrite.runtime.tensors import version

Stamp = tuple[Any, ...]


def stamp_of(arguments: Sequence[Any], numbers: bool = True) -> Stamp:
    """Shape, dtype and device of each tensor among a graph's inputs; other inputs as they are, with `numbers`."""
    return tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a if numbers else None for a in arguments)


@dataclass(frozen=True)
class Hoisted:
    """Values that were computed once per trajectory, and the inputs that they hold for, with version counters.

    The inputs are held weakly: a tensor that does not exist any more cannot come again.
    """

    inputs: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int | None, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, inputs: Sequence[Tensor], values: Sequence[Tensor]) -> Hoisted:
        return cls(tuple(map(weakref.ref, inputs)), tuple(map(version, inputs)), tuple(values))

    def holds_for(self, inputs: Sequence[Tensor], explicit: bool) -> bool:
        """Whether these are the same tensors, unchanged. Inference tensors have no counter to prove it: they pass in an
        `explicit` trajectory alone, whose contract is that conditioning stays as it is."""
        return all(before() is now for before, now in zip(self.inputs, inputs, strict=True)) and all(
            explicit if now is None else now == before
            for before, now in zip(self.versions, map(version, inputs), strict=True)
        )


def _is_same_number(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one number on the CPU: Dynamo hands float attributes on as a new tensor in each call."""
    return a is not b and not (a.ndim or b.ndim or a.is_cuda or b.is_cuda) and a.dtype == b.dtype and bool(a == b)


class Bank:
    """The slots of one occurrence of a graph: for each site its values, when they were computed, and how often reused.

    ``computed_at`` is the step of the last computation, ``streak`` the number of reuses since, ``tracked`` what its
    guards measure. A bank whose stamp does not fit a call is emptied: what it held is never used nor added to anything.
    """

    def __init__(self, num_sites: int) -> None:
        self.values: list[tuple[Tensor, ...] | None] = [None] * num_sites
        self.computed_at = [0] * num_sites
        self.streak = [0] * num_sites
        self.tracked = Tracked()
        self.hoisted: Hoisted | None = None
        self.conditioning: Hoisted | None = None  # holds no values: what the slots hold that are good for it alone
        self.stamp: Stamp | None = None
        self.weights: tuple[Any, ...] = ()
        self.ambient: tuple[tuple[Any, int | None], ...] = ()

    def fit(self, stamp: Stamp, weights: tuple[Any, ...], ambient: Sequence[Tensor] = ()) -> Reason | None:
        """Make the bank fit a call's inputs; why its slots cannot be used, or None where they can.

        `ambient` are the tensors that the model has as attributes.
        """
        reason = None
        if self.stamp is None:
            reason = Reason.EMPTY
        elif self.stamp != stamp:
            reason = Reason.CHANGED_INPUT
        elif not all(map(operator.is_, self.weights, weights)):
            reason = Reason.CHANGED_WEIGHTS
        elif ambient and not self._knows(ambient):
            reason = Reason.AMBIENT_CHANGED
        if reason is not None:
            self.clear()
            self.stamp, self.weights = stamp, weights
            self.ambient = tuple((tensor, version(tensor)) for tensor in ambient)
        return reason

    def _knows(self, ambient: Sequence[Tensor]) -> bool:
        """Whether these are the tensors of the call before, unchanged since."""
        pairs = zip(self.ambient, ambient, strict=True)
        return all((a is b and changes == version(b)) or _is_same_number(a, b) for (a, changes), b in pairs)

    def clear(self) -> None:
        """Empty all slots."""
        self.hoisted = None
        self.tracked = Tracked()
        self.values = [None] * len(self.values)

    def keep_for(self, conditioning: Sequence[Tensor], told: bool, sites: Sequence[int]) -> Reason | None:
        """Empty the slots of `sites` unless the conditioning is the one that they were filled under; why, if so."""
        before = self.conditioning
        if before is not None and before.holds_for(conditioning, told):
            return None
        self.conditioning = Hoisted.of(conditioning, ())
        for site in sites:
            self.values[site] = None
        return None if before is None else Reason.CHANGED_CONDITIONING

    def store(self, site: int, values: tuple[Tensor, ...] | None, step: int) -> None:
        """Put what a computing site made into its slot; None where it has none."""
        self.values[site] = values
        self.computed_at[site] = step
        self.streak[site] = 0

    def borrow(self, site: int, lender: Bank | None, step: int) -> None:
        """Let a slot be that of another bank, if that was filled in this very step for inputs of the same kind."""
        fits = lender is not None and lender.stamp == self.stamp and lender.computed_at[site] == step
        self.values[site] = lender.values[site] if fits and lender is not None else None
        self.computed_at[site] = step

    @property
    def all(self) -> list[tuple[Tensor, ...]]:
        """The values of every filled slot, what is hoisted, and what probes are compared with."""
        filled = [values for values in self.values if values is not None]
        filled += [self.hoisted.values] if self.hoisted is not None else []
        return [*filled, self.tracked.tensors] if self.tracked.tensors else filled

    @property
    def bytes(self) -> int:
        """Bytes of memory that the slots keep alive, shared storage counted once."""
        storages = {v.untyped_storage() for values in self.all for v in values}
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
