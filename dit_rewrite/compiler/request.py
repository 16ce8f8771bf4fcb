"""The facts about a compilation that come from the model, the call and the caller, and not from a pass."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

FORESEEN_STEPS = 64  # steps to look ahead if the number of steps is unknown
LONGEST = 1000  # maximum number of steps to look ahead

Tables = Literal["reuse", "all"]  # the steps that read step tables
Level = tuple[float | None, float | None]  # sigma and SNR of a step; None means unknown


def num_foreseen(num_steps: int | None) -> int:
    """Return how many steps of a trajectory to look ahead; `num_steps` is None if it is unknown."""
    return min(num_steps or FORESEEN_STEPS, LONGEST)


@dataclass(frozen=True)
class Request:
    """``whole``: the graph is the whole model. ``num_steps`` is that of the trajectory, None means unknown, and
    ``levels`` has the noise of its first steps. ``hoist``: trajectory-invariant values are computed once per
    trajectory. ``force``: every decision computes, for `verify`. The slots of ``streams`` streams may take
    ``memory_budget`` bytes. ``readable``: the timestep of the call is known without a device read; ``told``: so are
    those of further steps. ``tables``: which steps read the step table.

    It holds numbers alone: a reference to the trajectory would keep its caches alive.
    """

    whole: bool
    num_steps: int | None = None
    levels: tuple[Level, ...] = ()
    hoist: bool = True
    force: bool = False
    memory_budget: int = sys.maxsize
    streams: int = 1
    readable: bool = False
    told: bool = False
    tables: Tables = "reuse"
