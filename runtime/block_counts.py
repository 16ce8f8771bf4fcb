"""Counters and bounds of attention that reuses blocks of keys; they stay on the device until they are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_rewrite.runtime.decide import Decisions, SiteSpec

MOST = 10_000  # states and bounds that are kept apart; older counters are added up, older bounds are dropped

Key = tuple[str, torch.device]


class KeptBlocks(NamedTuple):
    """The number of blocks that a site kept, and of all its blocks: each is a block of keys for a tile of queries."""

    kept: int
    total: int

    @property
    def fraction(self) -> float:
        """The fraction of the blocks that were kept; 0 if there were none."""
        return self.kept / self.total if self.total else 0.0


class Certificate(NamedTuple):
    """A bound on the error of one attention at one step, see `BlockwiseReuse`."""

    site: str
    trajectory: int
    step: int
    stream: Hashable
    bound: float


class _Bound(NamedTuple):
    site: str
    trajectory: int
    step: int
    stream: Hashable
    tensor: Tensor  # (1,) float32


class BlockCounts:
    """The counters of all states that were read, by site, and the bounds of certified steps.

    A state's ops update its counters in place, so that a step costs nothing here, and no method but `kept` and
    `certificates` waits for a device. A counters tensor begins with the recomputed blocks and all blocks.
    """

    def __init__(self) -> None:
        self._states: dict[int, tuple[Key, Tensor]] = {}  # by id, which is unique because the tensor is kept alive
        self._sums: dict[Key, Tensor] = {}
        self._bounds: deque[_Bound] = deque(maxlen=MOST)

    def note(
        self,
        sites: Sequence[tuple[int, SiteSpec]],
        values: Sequence[tuple[Tensor, ...] | None],
        decided: Decisions,
        when: tuple[int, int, Hashable],
    ) -> None:
        """Register the states that a call has read, and copy their bounds. `when`: trajectory, step and stream."""
        for i, site in sites:
            state = None if site.reads is None or not decided.ran(i) else values[site.reads]
            if state is None or site.counters is None:
                continue
            counters = state[site.counters]
            self._states.setdefault(id(counters), ((site.name, counters.device), counters))
            if len(self._states) > MOST:
                self._add(*self._states.pop(next(iter(self._states))))
            if site.certificate is not None:
                self._bounds.append(_Bound(site.name, *when, state[site.certificate].clone()))

    def _add(self, key: Key, counters: Tensor) -> None:
        before = self._sums.get(key)
        self._sums[key] = counters.clone() if before is None else before + counters

    def snapshot(self) -> BlockCounts:
        """Return the counts so far, which later steps do not change."""
        found = BlockCounts()
        found._sums, found._bounds = dict(self._sums), self._bounds.copy()
        states: dict[Key, list[Tensor]] = {}
        for key, counters in list(self._states.values()):
            states.setdefault(key, []).append(counters)
        for key, each in states.items():
            found._add(key, torch.stack(each).sum(0))
        return found

    def since(self, earlier: BlockCounts) -> BlockCounts:
        """Return the counts after `earlier`; both are snapshots."""
        found, old = BlockCounts(), earlier._sums
        found._sums = {key: now - old[key] if key in old else now for key, now in self._sums.items()}
        known = {id(bound.tensor) for bound in earlier._bounds}
        found._bounds.extend(bound for bound in self._bounds if id(bound.tensor) not in known)
        return found

    @property
    def any(self) -> bool:
        """Whether a snapshot counted anything."""
        return bool(self._sums)

    def kept(self) -> dict[str, KeptBlocks]:
        """Read the counters of a snapshot, by site. Waits for the devices."""
        found: dict[str, KeptBlocks] = {}
        for (site, _), numbers in zip(self._sums, _read(self._sums.values()), strict=True):
            again, total = numbers[:2]
            before = found.get(site, KeptBlocks(0, 0))
            found[site] = KeptBlocks(before.kept + int(total - again), before.total + int(total))
        return {site: blocks for site, blocks in found.items() if blocks.total}

    def certificates(self) -> list[Certificate]:
        """Read the bounds, oldest first. Waits for the devices."""
        numbers = _read(bound.tensor for bound in self._bounds)
        return [Certificate(*bound[:4], number) for bound, (number,) in zip(self._bounds, numbers, strict=True)]


def _read(tensors: Iterable[Tensor]) -> list[list[float]]:
    """Return the numbers of tensors of equal length, with one transfer for each device."""
    devices: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        devices.setdefault(tensor.device, []).append((i, tensor))
    rows: dict[int, list[float]] = {}
    for numbered in devices.values():
        numbers = torch.stack([tensor for _, tensor in numbered]).tolist()
        rows.update(zip((i for i, _ in numbered), numbers, strict=True))
    return [rows[i] for i in range(len(rows))]
