"""Slots: the values that the sites of one graph hold, for one occurrence of it in one stream of one trajectory."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.decide import NEVER, Computed, Past, Weights, pushed
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


@lru_cache(maxsize=1024)
def vector(weights: Weights, device: torch.device) -> Tensor:
    """Weights as an fp32 tensor. Steps that are weighted alike share it: on a GPU it is copied there once."""
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.float32, device=device)


def _is_same_number(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one number on the CPU: Dynamo hands float attributes on as a new tensor in each call."""
    return a is not b and not (a.ndim or b.ndim or a.is_cuda or b.is_cuda) and a.dtype == b.dtype and bool(a == b)


class Bank:
    """The slots of one occurrence of a graph: for each site its values, when they were computed, and how often reused.

    A slot's ``values`` are the tensors of the newest computed value, then of older ones; ``past`` is when each was
    computed, ``streak`` the number of reuses since the last, ``tracked`` what its guards measure. A bank whose stamp
    does not fit a call is emptied: what it held is never used nor added to anything.
    """

    def __init__(self, num_sites: int) -> None:
        self.values: list[tuple[Tensor, ...] | None] = [None] * num_sites
        self.past: list[Past] = [NEVER] * num_sites
        self.streak = [0] * num_sites
        self.tracked = Tracked()
        self.lent: dict[int, tuple[Tensor, ...]] = {}  # what another stream computed for a site in this very step
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
        self.past = [NEVER] * len(self.past)

    def keep_for(self, conditioning: Sequence[Tensor], told: bool, sites: Sequence[int]) -> Reason | None:
        """Empty the slots of `sites` unless the conditioning is the one that they were filled under; why, if so."""
        before = self.conditioning
        if before is not None and before.holds_for(conditioning, told):
            return None
        self.conditioning = Hoisted.of(conditioning, ())
        for site in sites:
            self.values[site], self.past[site] = None, NEVER
        return None if before is None else Reason.CHANGED_CONDITIONING

    def release(self, site: int, width: int, depth: int) -> None:
        """Let go the oldest of `depth` values of a slot that is about to get one more, or the one that it holds."""
        held = self.values[site]
        if held is not None:
            self.values[site] = held[: width * (depth - 1)] or None

    def store(self, site: int, values: tuple[Tensor, ...] | None, now: Computed, depth: int = 1) -> None:
        """Put what a computing site made into its slot, before the older ones of `depth`; None where it has none."""
        if values is None:
            self.values[site], self.past[site] = None, pushed(NEVER, now, 1)
        else:
            older = self.values[site] or ()
            past = self.past[site] if older else NEVER
            self.values[site] = (*values, *older[: len(values) * (depth - 1)])
            self.past[site] = pushed(past, now, depth)
        self.streak[site] = 0

    def weighted(self, site: int, weights: Weights, width: int) -> tuple[Tensor, ...]:
        """What a step reads that takes the weighted sum of a slot's values: as many values as weights, then these.

        In the place of a value of weight 0, which may not be there or not be finite, stands the newest. What another
        stream lent stands before the slot's own values.
        """
        held = (*self.lent.get(site, ()), *(self.values[site] or ()))
        values = (held[width * k * (w != 0) : width * (k * (w != 0) + 1)] for k, w in enumerate(weights))
        return (*(tensor for value in values for tensor in value), vector(weights, held[0].device))

    def borrow(self, site: int, lender: Bank | None, step: int) -> None:
        """Let a slot be that of another bank, if that was filled in this very step for inputs of the same kind."""
        self.lend(site, lender, step)
        self.values[site] = self.lent.pop(site, None)
        self.past[site] = NEVER if self.values[site] is None or lender is None else lender.past[site]

    def lend(self, site: int, lender: Bank | None, step: int) -> None:
        """Note what another bank's slot holds, under the same condition, beside one's own."""
        fits = lender is not None and lender.stamp == self.stamp and lender.past[site].age(step) == 0
        values = lender.values[site] if fits and lender is not None else None
        if values is not None:
            self.lent[site] = values
        else:
            self.lent.pop(site, None)

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
