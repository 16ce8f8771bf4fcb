"""The decision machine: a pure function from the state of the slots to what each site does at this step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.measure import Measured

NO_SLOT = -1
HORIZON = 32  # steps to look ahead where nobody told how many there are

Read = Callable[[str], float | None]  # the value of a measured symbol, None where there is none


class Moment(NamedTuple):
    """Where in its trajectory a call is. What is None nobody knows. `layer_offset`: blocks that ran before it."""

    step: int
    num_steps: int | None
    layer_offset: int = 0
    num_layers: int | None = None
    sigma: float | None = None
    snr: float | None = None
    stream: Hashable = None


class Choose(Protocol):
    """The rules of a policy for one site: whether its strategy applies, and why. `read` is asked where it matters."""

    def __call__(self, moment: Moment, layer: int, age: int | None, streak: int, read: Read) -> tuple[bool, Reason]: ...


@dataclass(frozen=True)
class SiteSpec:
    """What dispatch knows of a guarded site; `layer` counts within its graph, `parent` is the enclosing site.

    ``measured`` are the symbols of its guard that are measured, ``entropy`` is the index in its slot of the tensor that
    holds its attention's entropy. ``reads`` is the site whose slot its strategy reads: by default its own, -1: none.
    ``serves``: it only fills a slot for that site, where this will read it. ``foreseen``: what `choose` says of a step
    to come depends on nothing but the step. ``borrows``: its slot is that of this stream, filled in the same step.
    ``conditioned``: what its slot holds is good for the same conditioning alone.
    """

    name: str
    kind: str
    layer: int
    parent: int | None
    choose: Choose
    measured: tuple[Measured, ...] = ()
    entropy: int | None = None
    reads: int | None = None
    serves: int | None = None
    foreseen: bool = False
    borrows: str | None = None
    conditioned: bool = False


@dataclass(frozen=True)
class Decisions:
    """A row (True: reuse), the reason of each entry, and the rules that would have reused but for a missing value."""

    row: tuple[bool, ...]
    reasons: tuple[Reason, ...]
    misses: tuple[Reason, ...]


def _unknown(site: int, symbol: str) -> float | None:
    return None


class Decider:
    """The decisions of one call, settled one by one: a guard may need what the call has yet to compute.

    `holds` says which slots hold values that fit; `unfit` why the others do not. Only proof permits reuse: without a
    fitting value, beyond the told end, or inside a reused site nothing else is looked at.
    """

    def __init__(
        self,
        sites: Sequence[SiteSpec],
        moment: Moment,
        computed_at: Sequence[int],
        streak: Sequence[int],
        holds: Sequence[bool],
        unfit: Reason | None = None,
        measure: Callable[[int, str], float | None] = _unknown,
    ) -> None:
        self._sites, self._moment, self._unfit, self._measure = sites, moment, unfit, measure
        self._computed_at, self._streak, self._holds = computed_at, streak, holds
        self._beyond = moment.num_steps is not None and moment.step >= moment.num_steps
        self.row: list[bool | None] = [None] * len(sites)
        self._reasons: list[Reason] = [Reason.NO_RULE] * len(sites)
        self._misses: list[Reason] = []

    def settle(self, i: int) -> bool:
        """Whether site `i` is reused. The sites around it are asked first."""
        settled = self.row[i]
        if settled is not None:
            return settled
        parent = self._sites[i].parent
        serves = self._sites[i].serves
        if parent is not None and self.settle(parent):
            reused, reason = True, Reason.COVERED
        elif serves is not None:
            reused, reason = (False, Reason.WILL_BE_READ) if self._will_be_read(serves) else (True, Reason.UNREAD)
        else:
            reused, reason = self._ask(i)
        self.row[i], self._reasons[i] = reused, reason
        return reused

    def _ask(self, i: int) -> tuple[bool, Reason]:
        site, moment = self._sites[i], self._moment
        if site.borrows is not None and site.borrows == moment.stream:
            return False, Reason.NO_RULE  # the stream that lends
        holds = site.reads == NO_SLOT or self._holds[i if site.reads is None else site.reads]
        age = moment.step - self._computed_at[i] if holds else None
        layer = moment.layer_offset + site.layer
        wanted, reason = site.choose(moment, layer, age, self._streak[i], lambda name: self._measure(i, name))
        lacking = Reason.BEYOND_END if self._beyond else (None if holds else self._unfit or Reason.EMPTY)
        if wanted and lacking is not None:
            self._misses.append(lacking)
            return False, lacking
        return wanted, reason

    def _will_be_read(self, i: int) -> bool:
        """Whether site `i`, which computes now, may read its slot before it computes again."""
        around = [i]
        while (parent := self._sites[around[-1]].parent) is not None:
            around.append(parent)
        sites = [self._sites[j] for j in around]
        if not all(site.foreseen for site in sites):
            return True
        end = self._moment.num_steps
        for step in range(self._moment.step + 1, self._moment.step + HORIZON if end is None else end):
            moment = self._moment._replace(step=step, sigma=None, snr=None)
            reused = [s.choose(moment, moment.layer_offset + s.layer, 1, 0, lambda _: None)[0] for s in sites]
            if not any(reused[1:]):
                return reused[0]
        return end is None

    def decisions(self) -> Decisions:
        """All decisions; what is not settled yet is settled now."""
        row = tuple(self.settle(i) for i in range(len(self._sites)))
        return Decisions(row, tuple(self._reasons), tuple(self._misses))
