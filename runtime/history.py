"""The position of a call in its trajectory, and the steps at which the values in a slot were computed."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple


class Moment(NamedTuple):
    """The position of a graph call in its trajectory. None means unknown.

    layer_offset: blocks that earlier graphs of this call of the model have run. snr: signal-to-noise ratio (power).
    """

    step: int
    num_steps: int | None
    layer_offset: int = 0
    num_layers: int | None = None
    sigma: float | None = None
    snr: float | None = None
    stream: Hashable = None


class Computed(NamedTuple):
    """The step at which a value was computed, with its sigma and SNR (None means unknown)."""

    step: int
    sigma: float | None = None
    snr: float | None = None


class Past:
    """When the values in a slot were computed, newest first.

    The hash is computed once, because a Past is part of the key under which decisions are cached.
    """

    __slots__ = ("_hash", "computed")

    def __init__(self, computed: tuple[Computed, ...] = ()) -> None:
        self.computed, self._hash = computed, hash(computed)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Past) and self.computed == other.computed)

    def __repr__(self) -> str:
        return f"Past({self.computed})"

    def age(self, step: int) -> int | None:
        """Return the number of steps since the newest value was computed, or None if there is no value."""
        return step - self.computed[0].step if self.computed else None


NEVER = Past()


@lru_cache(maxsize=4096)
def pushed(past: Past, now: Computed, depth: int) -> Past:
    """Return `past` with `now` added, limited to `depth` entries. Equal arguments give the same object."""
    return Past((now, *past.computed)[:depth])
