"""The decision machine: a pure function from the state of the slots to what each site does at this step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dit_rewrite.errors import Reason


class Choose(Protocol):
    """The rules of a policy for one site: the strategy that applies (None: compute) and the reason."""

    def __call__(
        self,
        step: int,
        num_steps: int | None,
        layer: int,
        num_layers: int | None,
        age: int | None,
        streak: int,
        sigma: float | None,
        snr: float | None,
    ) -> tuple[bool, Reason]: ...


@dataclass(frozen=True)
class SiteSpec:
    """What dispatch knows of a guarded site; `layer` counts within its graph, `parent` is the enclosing site."""

    name: str
    kind: str
    layer: int
    parent: int | None
    num_values: int
    choose: Choose


@dataclass(frozen=True)
class Moment:
    """Where in its trajectory a call is. What is None nobody knows."""

    step: int
    num_steps: int | None
    layer_offset: int = 0
    num_layers: int | None = None
    sigma: float | None = None
    snr: float | None = None


@dataclass(frozen=True)
class Decisions:
    """A row (True: reuse), the reason of each entry, and the rules that would have reused but for a missing value."""

    row: tuple[bool, ...]
    reasons: tuple[Reason, ...]
    misses: tuple[Reason, ...]


def decide(
    sites: Sequence[SiteSpec],
    moment: Moment,
    computed_at: Sequence[int],
    streak: Sequence[int],
    holds: Sequence[bool],
    unfit: Reason | None = None,
) -> Decisions:
    """What each site does. `holds` says which slots hold values that fit; `unfit` why the others do not.

    Only proof permits reuse: without a fitting value, beyond the told end, or inside a reused site nothing else is
    looked at. A site comes before the sites inside it in no particular order; parents are asked first.
    """
    beyond = moment.num_steps is not None and moment.step >= moment.num_steps
    row: dict[int, bool] = {}
    reasons: dict[int, Reason] = {}
    misses: list[Reason] = []

    def settle(i: int) -> None:
        site = sites[i]
        if i in row:
            return
        if site.parent is not None:
            settle(site.parent)
            if row[site.parent]:
                row[i], reasons[i] = True, Reason.COVERED
                return
        age = moment.step - computed_at[i] if holds[i] else None
        layer = moment.layer_offset + site.layer
        wanted, reason = site.choose(
            moment.step, moment.num_steps, layer, moment.num_layers, age, streak[i], moment.sigma, moment.snr
        )
        lacking = Reason.BEYOND_END if beyond else (None if holds[i] else unfit or Reason.EMPTY)
        if wanted and lacking is not None:
            misses.append(lacking)
            wanted, reason = False, lacking
        row[i], reasons[i] = wanted, reason

    for i in range(len(sites)):
        settle(i)
    order = range(len(sites))
    return Decisions(tuple(row[i] for i in order), tuple(reasons[i] for i in order), tuple(misses))
