"""Decisions: a pure function from the state of the slots to whether each site computes or reuses at this step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from dit_rewrite.errors import DecisionReason, MissReason, Reason
from dit_rewrite.runtime.history import Moment, Past
from dit_rewrite.runtime.measure import ForecastError, Measured
from dit_rewrite.runtime.slots import Transition, transition

NO_SLOT = -1
HORIZON = 32  # steps to look ahead if the number of steps is unknown

Read = Callable[[str], float | None]  # returns the value of a measured symbol; None if there is none
Weights = tuple[float, ...]  # weights of the values in a slot, newest first


def unmeasured(symbol: str) -> None:
    """Nothing is measured."""


class Weigh(Protocol):
    """Returns the weights with which a strategy sums the values in a slot, or the reason why it cannot.

    `read` returns a measurement that it asks for."""

    def __call__(self, past: Past, moment: Moment, read: Read = unmeasured) -> Weights | Reason: ...


class Choice(NamedTuple):
    """Whether a site is reused, and why. `weigh` is set if the strategy uses more than the newest value.

    VERIFIED: it computes, and the value is compared with the sum that `weigh` gives of its slot."""

    reuse: bool
    reason: DecisionReason
    weigh: Weigh | None = None


class Choose(Protocol):
    """Evaluates the rules of a policy for one site. It calls `read` only for measurements that it needs."""

    def __call__(self, moment: Moment, layer: int, age: int | None, streak: int, read: Read) -> Choice: ...


@dataclass(frozen=True)
class SiteSpec:
    """A guarded site as dispatch sees it.

    layer: index of its block within the graph. parent: the enclosing site. choose: the rules of the policy.
    measured: the symbols that its guard and its weights measure at probes. errors: the symbols of its guard that are
    errors of forecasts. foretell: the weights of its own forecast, for those errors.
    entropy: the index in its slot of its attention's entropy.
    reads: the site whose slot the strategy reads; None means its own, NO_SLOT none.
    serves: this site only fills its slot for that site, and only if that site will read it.
    foreseen: for future steps, `choose` depends on the step alone.
    borrows: the name of the stream whose slot it reads, filled in the same step.
    conditioned: its slot is valid only under the conditioning that it was filled with.
    width: tensors per value. depth: values that a reusing step needs.
    differs: its slot holds differences from the output of the stream that it borrows from; a reusing step also takes
    that output, as the first value.
    counters: the index in the slot that it reads of how many blocks were recomputed. certificate: that of the bound on
    the error of the last step.
    """

    name: str
    kind: str
    layer: int
    parent: int | None
    choose: Choose
    measured: tuple[Measured, ...] = ()
    errors: Mapping[str, ForecastError] = field(default_factory=dict)
    foretell: Weigh | None = None
    entropy: int | None = None
    reads: int | None = None
    serves: int | None = None
    foreseen: bool = False
    borrows: str | None = None
    conditioned: bool = False
    width: int = 1
    depth: int = 1
    differs: bool = False
    counters: int | None = None
    certificate: int | None = None

    def kept(self, stream: Hashable) -> int:
        """Return how many computed values its slot keeps in `stream`."""
        return self.depth if not self.differs else 1 if stream == self.borrows else self.depth - 1


@dataclass(frozen=True)
class Decisions:
    """The decisions of one call of a graph.

    row: for each site, True if it is reused. reasons: the reason for each entry. misses: reasons why sites that a rule
    would have reused were computed. weights: for each site the weights of its sum, or None; empty if no site has any.
    measured: the measurements that were read, by site and symbol.
    """

    row: tuple[bool, ...]
    reasons: tuple[Reason, ...]
    misses: tuple[Reason, ...]
    weights: tuple[Weights | None, ...] = ()
    measured: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @cached_property
    def changes(self) -> tuple[tuple[int, Transition], ...]:
        """The sites whose slots the call changes or reads, each with its transition."""
        each = enumerate(map(transition, self.row, self.reasons))
        return tuple((site, change) for site, change in each if change is not Transition.NONE)

    @cached_property
    def used(self) -> tuple[int, ...]:
        """The sites whose slots stay as they are."""
        return tuple(site for site, change in self.changes if change is Transition.USE)

    @cached_property
    def changed(self) -> tuple[tuple[int, Transition], ...]:
        """The sites whose slots are filled or emptied, with the transition."""
        return tuple((site, change) for site, change in self.changes if change is not Transition.USE)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """How many sites computed and how many reused. A site that only fills a slot counts as neither."""
        reused = sum(self.row)
        computed = len(self.row) - reused - self.reasons.count(DecisionReason.WILL_BE_READ)
        return computed, reused - self.reasons.count(DecisionReason.UNREAD)

    @cached_property
    def kind(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which sites are reused, and which are verified. It determines what the call runs."""
        return self.row, tuple(reason is DecisionReason.VERIFIED for reason in self.reasons)

    def ran(self, i: int) -> bool:
        """Return whether the strategy of site `i` ran: the site is reused, and no site around it is."""
        return self.row[i] and self.reasons[i] is not DecisionReason.COVERED

    def weigh(self, i: int) -> Weights | None:
        """Return the weights of the values in the slot of site `i`, or None if it uses the newest."""
        return self.weights[i] if self.weights else None

    @cached_property
    def settle(self) -> Callable[[int], bool]:
        """A function that returns whether a site is reused."""
        return self.row.__getitem__

    def is_verified(self, i: int) -> bool:
        """Whether a site computes for its forecast to be compared with, and leaves its slot as it is."""
        return self.reasons[i] is DecisionReason.VERIFIED

    def foretell(self, i: int) -> None:
        """Where nothing is measured, nobody asks for a forecast that is not taken."""


def _unknown(site: int, symbol: str) -> float | None:
    return None


class Decider:
    """Settles the decisions of one call one by one, since a guard may read a value that the call has yet to compute.

    past: when the values in each slot were computed. holds: which slots have valid values. unfit: why the others do
    not. A site is computed if its slot has no valid value or if the step is beyond the explicit number of steps.
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
        self._reasons: list[Reason] = [DecisionReason.NO_RULE] * len(sites)
        self._misses: list[Reason] = []
        self._weights: list[Weights | None] = [None] * len(sites)
        self._read: dict[int, dict[str, float]] = {}

    def settle(self, i: int) -> bool:
        """Return whether site `i` is reused. Enclosing sites are settled first."""
        settled = self.row[i]
        if settled is not None:
            return settled
        parent = self._sites[i].parent
        serves = self._sites[i].serves
        reason: Reason
        if parent is not None and self.settle(parent):
            reused, reason = True, DecisionReason.COVERED
        elif serves is not None:
            reused = not self._will_be_read(serves)
            reason = DecisionReason.UNREAD if reused else DecisionReason.WILL_BE_READ
        else:
            reused, reason = self._ask(i)
        self.row[i], self._reasons[i] = reused, reason
        return reused

    def _ask(self, i: int) -> tuple[bool, Reason]:
        site, moment = self._sites[i], self._moment
        if site.borrows is not None and site.borrows == moment.stream:
            return False, DecisionReason.NO_RULE  # this is the lending stream
        holds = site.reads == NO_SLOT or self._holds[i if site.reads is None else site.reads]
        age = self._past[i].age(moment.step) if holds else None
        layer = moment.layer_offset + site.layer
        choice = site.choose(moment, layer, age, self._streak[i], self._reader(i))
        missing = MissReason.BEYOND_END if self._beyond else (None if holds else self._unfit or MissReason.EMPTY)
        applies = choice.reuse or choice.reason is DecisionReason.VERIFIED
        if applies and missing is None and choice.weigh is not None:
            weights = choice.weigh(self._past[i], moment, self._reader(i))
            if isinstance(weights, Reason):
                missing = weights
            else:
                self._weights[i] = weights
        if applies and missing is not None:
            self._misses += [missing] if choice.reuse else []
            return False, missing
        return choice.reuse, choice.reason

    def is_verified(self, i: int) -> bool:
        """Whether a settled site computes for its forecast to be compared with, and leaves its slot as it is."""
        return self._reasons[i] is DecisionReason.VERIFIED

    def foretell(self, i: int) -> Weights | None:
        """The weights of a forecast that a site which computes could have taken; None where it could take none."""
        weigh = self._sites[i].foretell
        if self._weights[i] is not None or weigh is None or not self._holds[i]:
            return self._weights[i]
        weights = weigh(self._past[i], self._moment, self._reader(i))
        return None if isinstance(weights, Reason) else weights

    def weigh(self, i: int) -> Weights | None:
        """Return the weights of the values in the slot of a settled site, or None if it uses the newest."""
        return self._weights[i]

    def _reader(self, i: int) -> Read:
        return lambda name: self._noted(i, name)

    def _noted(self, i: int, name: str) -> float | None:
        """Return a measurement of a site. Each number is read once in a call, and recorded."""
        if name in self._read.get(i, {}):
            return self._read[i][name]
        value = self._measure(i, name)
        if value is not None:
            self._read.setdefault(i, {})[name] = value
        return value

    def _will_be_read(self, i: int) -> bool:
        """Return whether site `i`, which computes now, may read its slot before it computes again."""
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
        """Settle the remaining sites, and return all decisions."""
        row = tuple(self.settle(i) for i in range(len(self._sites)))
        weights = tuple(self._weights) if any(self._weights) else ()
        return Decisions(row, tuple(self._reasons), tuple(self._misses), weights, self._read)
