"""The decision machine: a pure function from the state of the slots to what each site does at this step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.measure import Measured

NO_SLOT = -1
HORIZON = 32  # steps to look ahead where nobody told how many there are

Read = Callable[[str], float | None]  # the value of a measured symbol, None where there is none
Weights = tuple[float, ...]  # of the computed values that a slot holds, newest first


class Moment(NamedTuple):
    """Where in its trajectory a call is. What is None nobody knows. `layer_offset`: blocks that ran before it."""

    step: int
    num_steps: int | None
    layer_offset: int = 0
    num_layers: int | None = None
    sigma: float | None = None
    snr: float | None = None
    stream: Hashable = None


class Computed(NamedTuple):
    """When a value was computed. Sigma and SNR are None where nobody knows them."""

    step: int
    sigma: float | None = None
    snr: float | None = None


class Past:
    """When the values that a slot holds were computed, newest first. Hashed once: it is part of what decisions follow
    from."""

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
        """Steps since the newest value was computed; None where there is none."""
        return step - self.computed[0].step if self.computed else None


NEVER = Past()


@lru_cache(maxsize=4096)
def pushed(past: Past, now: Computed, depth: int) -> Past:
    """The past of a slot that holds at most `depth` values and gets one more. The same object for every site."""
    return Past((now, *past.computed)[:depth])


class Weigh(Protocol):
    """A strategy that takes a weighted sum of the values that a slot holds: the weights at a moment, or why not."""

    def __call__(self, past: Past, moment: Moment) -> Weights | Reason: ...


class Choice(NamedTuple):
    """Whether a site's strategy applies, and why; `weigh` where it takes more than the newest value."""

    reuse: bool
    reason: Reason
    weigh: Weigh | None = None


class Choose(Protocol):
    """The rules of a policy for one site. `read` is asked where it matters."""

    def __call__(self, moment: Moment, layer: int, age: int | None, streak: int, read: Read) -> Choice: ...


@dataclass(frozen=True)
class SiteSpec:
    """What dispatch knows of a guarded site; `layer` counts within its graph, `parent` is the enclosing site.

    ``measured`` are the symbols of its guard that are measured, ``entropy`` is the index in its slot of the tensor that
    holds its attention's entropy. ``reads`` is the site whose slot its strategy reads: by default its own, -1: none.
    ``serves``: it only fills a slot for that site, where this will read it. ``foreseen``: what `choose` says of a step
    to come depends on nothing but the step. ``borrows``: its slot is that of this stream, filled in the same step.
    ``conditioned``: what its slot holds is good for the same conditioning alone. ``width`` is the number of tensors
    that its slot gets when it computes, ``depth`` the number of values that a reusing step takes. ``differs``: its slot
    holds the differences from the output of the stream that it borrows from, and a reusing step takes that first.
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
    width: int = 1
    depth: int = 1
    differs: bool = False

    def kept(self, stream: Hashable) -> int:
        """How many computed values its slot keeps in a stream."""
        return self.depth if not self.differs else 1 if stream == self.borrows else self.depth - 1


@dataclass(frozen=True)
class Decisions:
    """A row (True: reuse), the reason of each entry, and the rules that would have reused but for a missing value.

    ``weights`` has those of each site that takes a weighted sum, None for the others; nothing where none does.
    ``measured`` are the numbers that were read for it, by site and symbol.
    """

    row: tuple[bool, ...]
    reasons: tuple[Reason, ...]
    misses: tuple[Reason, ...]
    weights: tuple[Weights | None, ...] = ()
    measured: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def weigh(self, i: int) -> Weights | None:
        """The weights of what the slot of a site holds; None where it takes the newest."""
        return self.weights[i] if self.weights else None


def _unknown(site: int, symbol: str) -> float | None:
    return None


class Decider:
    """The decisions of one call, settled one by one: a guard may need what the call has yet to compute.

    `past` says when what each slot holds was computed, `holds` which slots hold values that fit; `unfit` why the others
    do not. Only proof permits reuse: without a fitting value, beyond the told end, or inside a reused site nothing else
    is looked at.
    """

    def __init__(
        self,
        sites: Sequence[SiteSpec],
        moment: Moment,
        past: Sequence[Past],
        streak: Sequence[int],
        holds: Sequence[bool],
        unfit: Reason | None = None,
        measure: Callable[[int, str], float | None] = _unknown,
    ) -> None:
        self._sites, self._moment, self._unfit, self._measure = sites, moment, unfit, measure
        self._past, self._streak, self._holds = past, streak, holds
        self._beyond = moment.num_steps is not None and moment.step >= moment.num_steps
        self.row: list[bool | None] = [None] * len(sites)
        self._reasons: list[Reason] = [Reason.NO_RULE] * len(sites)
        self._misses: list[Reason] = []
        self._weights: list[Weights | None] = [None] * len(sites)
        self._read: dict[int, dict[str, float]] = {}

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
        age = self._past[i].age(moment.step) if holds else None
        layer = moment.layer_offset + site.layer
        choice = site.choose(moment, layer, age, self._streak[i], lambda name: self._noted(i, name))
        lacking = Reason.BEYOND_END if self._beyond else (None if holds else self._unfit or Reason.EMPTY)
        if choice.reuse and lacking is None and choice.weigh is not None:
            weights = choice.weigh(self._past[i], moment)
            if isinstance(weights, Reason):
                lacking = weights
            else:
                self._weights[i] = weights
        if choice.reuse and lacking is not None:
            self._misses.append(lacking)
            return False, lacking
        return choice.reuse, choice.reason

    def weigh(self, i: int) -> Weights | None:
        """The weights of what the slot of a settled site holds; None where it takes the newest."""
        return self._weights[i]

    def _noted(self, i: int, name: str) -> float | None:
        """A measurement of a site; a number is read once in a call, and noted."""
        if name in self._read.get(i, {}):
            return self._read[i][name]
        value = self._measure(i, name)
        if value is not None:
            self._read.setdefault(i, {})[name] = value
        return value

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
            reused = [s.choose(moment, moment.layer_offset + s.layer, 1, 0, lambda _: None).reuse for s in sites]
            if not any(reused[1:]):
                return reused[0]
        return end is None

    def decisions(self) -> Decisions:
        """All decisions; what is not settled yet is settled now."""
        row = tuple(self.settle(i) for i in range(len(self._sites)))
        weights = tuple(self._weights) if any(self._weights) else ()
        return Decisions(row, tuple(self._reasons), tuple(self._misses), weights, self._read)
