"""Slots: the values that the sites of one graph hold, for one occurrence of it in one stream of one trajectory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_rewrite.errors import Reason

Stamp = tuple[Any, ...]


def stamp_of(arguments: Sequence[Any]) -> Stamp:
    """Shape, dtype and device of each tensor among a graph's inputs; other inputs as they are."""
    return tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments)


class Bank:
    """The slots of one occurrence of a graph: for each site its values, when they were computed, and how often reused.

    ``computed_at`` is the step of the last computation, ``streak`` the number of reuses since. A bank whose stamp does
    not fit a call is emptied: what it held is never used nor added to anything.
    """

    def __init__(self, num_sites: int) -> None:
        self.values: list[tuple[Tensor, ...] | None] = [None] * num_sites
        self.computed_at = [0] * num_sites
        self.streak = [0] * num_sites
        self.stamp: Stamp | None = None
        self.weights: tuple[Any, ...] = ()

    def fit(self, stamp: Stamp, weights: tuple[Any, ...]) -> Reason | None:
        """Make the bank fit a call's inputs; why its slots cannot be used, or None where they can."""
        reason = None
        if self.stamp is None:
            reason = Reason.EMPTY
        elif self.stamp != stamp:
            reason = Reason.CHANGED_INPUT
        elif not all(map(operator.is_, self.weights, weights)):
            reason = Reason.CHANGED_WEIGHTS
        if reason is not None:
            self.clear()
            self.stamp, self.weights = stamp, weights
        return reason

    def clear(self) -> None:
        """Empty all slots."""
        self.values = [None] * len(self.values)

    def store(self, site: int, values: tuple[Tensor, ...], step: int) -> None:
        """Put freshly computed values into a slot."""
        self.values[site] = values
        self.computed_at[site] = step
        self.streak[site] = 0

    @property
    def bytes(self) -> int:
        """Bytes of memory that the slots keep alive, shared storage counted once."""
        storages = {v.untyped_storage() for values in self.values if values is not None for v in values}
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
