"""The cache of one occurrence of a graph, in one stream of one trajectory: a slot for each site."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.errors import MissReason
from dit_rewrite.runtime.decide import Decisions, SiteSpec, Weights
from dit_rewrite.runtime.history import NEVER, Computed, Moment, Past
from dit_rewrite.runtime.measure import Tracked
from dit_rewrite.runtime.slots import Transition, after
from dit_rewrite.runtime.step_tables import Bookmark
from dit_rewrite.runtime.tensors import Memoized, address, storage_address, version, versions

Stamp = tuple[Any, ...]


def stamp_of(arguments: Sequence[Any], numbers: bool = True) -> Stamp:
    """Return the shape, dtype and device of each tensor input of a graph.

    Other inputs are included by value if `numbers` is True, and as None otherwise.
    """
    return tuple([(a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a if numbers else None for a in arguments])


@lru_cache(maxsize=1024)
def vector(weights: Weights, device: torch.device) -> Tensor:
    """Return `weights` as a float32 tensor on `device`. Results are cached: equal weights are copied to a GPU once."""
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.float32, device=device)


def _is_same_number(a: Tensor, b: Tensor) -> bool:
    """Return whether two 0-d CPU tensors are equal. Dynamo passes float attributes as a new tensor in each call."""
    return a is not b and not (a.ndim or b.ndim or a.is_cuda or b.is_cuda) and a.dtype == b.dtype and bool(a == b)


class Cache:
    """The slots of one occurrence of a graph.

    ``values`` holds for each site the tensors of its newest computed value, followed by those of older values; None is
    an empty slot. ``past`` holds the steps at which they were computed, ``streak`` the number of reuses since then, and
    ``tracked`` the state of the measurements. If the stamp does not match a call's inputs, all slots are cleared, so
    that their values are never used.
    """

    def __init__(self, num_sites: int) -> None:
        self.values: list[tuple[Tensor, ...] | None] = [None] * num_sites
        self.past: list[Past] = [NEVER] * num_sites
        self.streak = [0] * num_sites
        self.tracked = Tracked()
        self.lent: dict[int, tuple[Tensor, ...]] = {}  # by site: values of another stream from this step
        self.hoisted: Memoized | None = None
        self.bookmark = Bookmark()
        self.conditioning: Memoized | None = None  # has no values; `validate_conditioning` compares its inputs
        self.graphs: Any = None  # the CUDA graphs that serve it, see cuda_graphs.py
        self.stamp: Stamp | None = None
        self.weights: tuple[Any, ...] = ()
        self.ambient: tuple[tuple[Tensor, int | None, Tensor], ...] = ()  # with an alias that keeps the address
        self.unknown: list[tuple[weakref.ref[Tensor], int | None]] = []
        self._versions: tuple[int | None, ...] = ()  # of the weights
        self._highest: int | None = None  # the site whose slot has the highest address in the CPU's memory
        self._behind: tuple[Tensor, ...] = ()  # the value of that slot while its site computes, see `release`

    def fit(
        self,
        stamp: Stamp,
        weights: tuple[Any, ...],
        ambient: Sequence[Tensor] = (),
        unknown: Sequence[Tensor] = (),
    ) -> MissReason | None:
        """Compare the cache with a call's inputs and clear it if they differ. Returns the reason, or None.

        stamp: shapes, dtypes and devices of the inputs (see `stamp_of`). weights: the model's parameters and buffers,
        compared by identity and version. ambient: tensors that are attributes of the model, compared by identity,
        version and address. unknown: tensors of unknown origin, see `_replaces`.
        """
        reason = None
        if self.stamp is None:
            reason = MissReason.EMPTY
        elif self.stamp != stamp:
            reason = MissReason.CHANGED_INPUT
        elif not all(map(operator.is_, self.weights, weights)) or self._versions != versions(weights):
            reason = MissReason.CHANGED_WEIGHTS
        elif ambient and not self._knows(ambient):
            reason = MissReason.CHANGED_ATTRIBUTE
        elif unknown and any(map(self._replaces, unknown, self.unknown)):
            reason = MissReason.CHANGED_UNKNOWN
        if reason is not None:
            self.clear()
            self.stamp, self.weights, self._versions = stamp, weights, versions(weights)
            self.ambient = tuple((tensor, version(tensor), tensor.detach()) for tensor in ambient)
        self.unknown = [(weakref.ref(tensor), version(tensor)) for tensor in unknown]
        return reason

    def _replaces(self, now: Tensor, last: tuple[weakref.ref[Tensor], int | None]) -> bool:
        """Return whether a tensor of unknown origin may be another condition than that of the previous call.

        One that code between two graphs makes in each call is data, and the last one was freed. If the last one still
        exists, it may be the condition of other calls.
        """
        before, changes = last[0](), last[1]
        if before is now:
            return changes != version(now)
        return before is not None and all(before is not tensor for tensor in self.tracked.tensors)

    def _knows(self, ambient: Sequence[Tensor]) -> bool:
        """Return whether `ambient` are the tensors of the previous call, unmodified since."""
        pairs = zip(self.ambient, ambient, strict=True)
        return all(
            (a is b and changes == version(b) and address(alias) == address(b)) or _is_same_number(a, b)
            for (a, changes, alias), b in pairs
        )

    def clear(self) -> None:
        """Empty all slots."""
        self.hoisted = None
        self.bookmark.table = None  # compares the weights again
        self.tracked = Tracked()
        self._behind = ()
        self.values = [None] * len(self.values)
        self.past = [NEVER] * len(self.past)

    def validate_conditioning(
        self, conditioning: Sequence[Tensor], explicit: bool, sites: Sequence[int]
    ) -> MissReason | None:
        """Clear the slots of `sites` if `conditioning` is not the one they were filled under.

        Returns the reason if the conditioning changed, or None if it did not or was not known.
        """
        before = self.conditioning
        if before is not None and before.valid_for(conditioning, explicit):
            return None
        self.conditioning = Memoized.of(conditioning, ())
        for site in sites:
            self.values[site], self.past[site] = None, NEVER
        return None if before is None else MissReason.CHANGED_CONDITIONING

    def release(self, site: int, width: int, depth: int) -> None:
        """Free the oldest of the `depth` values of a slot before a new one is computed. A value has `width` tensors.

        Of several slots, the memory of the one with the highest address is freed when the new values exist: glibc
        returns free memory behind the last object to the system, which would have to provide pages for them anew.
        """
        tensors = self.values[site]
        if tensors is not None:
            self._behind = tensors if site == self._highest else self._behind
            self.values[site] = tensors[: width * (depth - 1)] or None

    def update(
        self, site: int, change: Transition, value: tuple[Tensor, ...] | None, now: Computed, depth: int = 1
    ) -> None:
        """Apply a transition to the slot of `site`. A filled slot gets `value`, and keeps at most `depth` values.

        A slot that should be filled is emptied if `value` is None.
        """
        if change is Transition.FILL and value is None:
            change = Transition.EMPTY
        older = self.values[site] or ()
        past = self.past[site] if older or change is not Transition.FILL else NEVER
        self.past[site], self.streak[site] = after(change, past, self.streak[site], now, depth)
        if change is Transition.FILL and value is not None:
            self.values[site] = (*value, *older[: len(value) * (depth - 1)])
        elif change is Transition.EMPTY:
            self.values[site] = None

    def commit(
        self,
        sites: Sequence[SiteSpec],
        fresh: Sequence[tuple[tuple[int, int], Tensor]],
        moment: Moment,
        decided: Decisions,
    ) -> None:
        """Apply the decisions of a call of `sites` to their slots. `fresh` has the new tensors by site and index."""
        for site in decided.used:
            self.streak[site] += 1
        if not decided.changed:  # most calls
            return
        now = Computed(moment.step, moment.sigma, moment.snr)
        values: dict[int, list[tuple[int, Tensor]]] = {}
        for (site, index), value in fresh:
            values.setdefault(site, []).append((index, value))
        for site, change in decided.changed:
            made = tuple([value for _, value in sorted(values.get(site, ()), key=itemgetter(0))]) or None
            if sites[site].differs and sites[site].borrows != moment.stream:
                made = self.less_lent(site, made)
            self.update(site, change, made, now, sites[site].kept(moment.stream))
        ends = {i: max(map(address, values)) for i, values in enumerate(self.values) if values and values[0].is_cpu}
        self._highest, self._behind = max(ends, key=ends.__getitem__) if len(ends) > 1 else None, ()

    def weighted(self, site: int, weights: Weights, width: int) -> tuple[Tensor, ...]:
        """Return the inputs of a weighted sum over a slot: one value for each weight, then the weights as a tensor.

        The newest value replaces every value of weight 0, which may be missing or not finite. A value lent by another
        stream comes before the slot's own values.
        """
        tensors = (*self.lent.get(site, ()), *(self.values[site] or ()))
        values = (tensors[width * k * (w != 0) : width * (k * (w != 0) + 1)] for k, w in enumerate(weights))
        return (*(tensor for value in values for tensor in value), vector(weights, tensors[0].device))

    def borrow(self, site: int, lender: Cache | None, step: int) -> None:
        """Fill a slot with the value of `lender`, if that was computed in this step from inputs with the same stamp."""
        self.lend(site, lender, step)
        self.values[site] = self.lent.pop(site, None)
        self.past[site] = NEVER if self.values[site] is None or lender is None else lender.past[site]

    def lend(self, site: int, lender: Cache | None, step: int) -> None:
        """Record the value of `lender` in ``lent``, under the same condition, without changing the slot itself."""
        fits = lender is not None and lender.stamp == self.stamp and lender.past[site].age(step) == 0
        values = lender.values[site] if fits and lender is not None else None
        if values is not None:
            self.lent[site] = values
        else:
            self.lent.pop(site, None)

    def less_lent(self, site: int, value: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Return the difference between a value and the one lent by another stream; None without either."""
        lent = self.lent.get(site)
        return None if lent is None or value is None else tuple(a - b for a, b in zip(value, lent, strict=True))

    def aliased(self, outputs: Sequence[Any]) -> tuple[int, ...]:
        """Return the indices of the tensors among `outputs` that share their storage with a cached tensor."""
        cached = {storage_address(tensor) for values in self.all for tensor in values}
        tensors = ((i, out) for i, out in enumerate(outputs) if isinstance(out, Tensor))
        return tuple(i for i, out in tensors if storage_address(out) in cached)

    @property
    def all(self) -> list[tuple[Tensor, ...]]:
        """All cached tensors: of the filled slots, the hoisted values, and the references of the measurements."""
        filled = [values for values in self.values if values is not None]
        filled += [self.hoisted.values] if self.hoisted is not None else []
        return [*filled, self.tracked.tensors] if self.tracked.tensors else filled

    @property
    def bytes(self) -> int:
        """Bytes of storage that the cache keeps alive; shared storage counts once."""
        storages = {v.untyped_storage() for values in self.all for v in values}
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
