"""Dispatch: decisions -> variant -> call. Plain Python over tuples; no tensor work on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.cache import Bank, Hoisted, stamp_of
from dit_rewrite.runtime.decide import Decisions, Moment, SiteSpec, decide
from dit_rewrite.runtime.session import Call, Observation, Session
from dit_rewrite.runtime.stats import Record


@dataclass(frozen=True)
class Executable:
    """A compiled variant: it takes the captured inputs at ``inputs`` and the slots at ``cached``, and returns the
    captured outputs, then the values of ``fresh`` (pairs of site and index within the site).

    ``admits`` is set where compiling assumed something of the sizes that Dynamo does not check.
    """

    run: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
    fresh: tuple[tuple[int, int], ...]
    admits: Callable[[Sequence[Any]], bool] | None = None


Row = tuple[bool, ...]


class Graph:
    """What runs in the place of one captured graph."""

    def __init__(
        self,
        index: int,
        sites: Sequence[SiteSpec],
        num_layers: int,
        static: frozenset[int],
        num_inputs: int,
        session: Session,
        compile_variant: Callable[[Row], Executable],
        steady: frozenset[int] = frozenset(),
    ) -> None:
        """`static` and `steady` are the positions, among `num_inputs`, of weights and of the call's conditioning."""
        self.index = index
        self.sites = tuple(sites)
        self.names = tuple(site.name for site in sites)
        self.num_layers = num_layers
        self.session = session
        self.variants: dict[Row, Executable] = {}
        self.prologue: Executable | None = None  # computes what is hoisted: the values of the site after the last
        self._compile = compile_variant
        self._weights = tuple(sorted(static))
        self._steady = tuple(sorted(steady))
        self._data = tuple(i for i in range(num_inputs) if i not in static)
        self._never = (False,) * len(self.sites)
        self._shared: dict[Row, tuple[int, ...]] = {}  # the outputs that share memory with a slot

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Run the graph on its flat inputs, as AOTAutograd calls it."""
        call = self.session.call
        if call is None:
            return self._outside(args)
        occurrence, bank, changed = call.enter(self.index, len(self.sites))
        unfit = bank.fit(stamp_of([args[i] for i in self._data]), tuple(map(args.__getitem__, self._weights)))
        moment = call.moment
        call.layers += self.num_layers
        decided, executable = self._choose(self._decide(moment, bank, changed or unfit), args)
        if self.prologue is not None:
            self._hoist(self.prologue, args, bank, call.told)
        outputs, fresh = _execute(executable, args, bank)
        self._store(executable, fresh, bank, moment.step, decided)
        outputs = self._owned(decided.row, outputs, bank)
        self._note(call, occurrence, moment, decided, args, outputs, bank)
        args.clear()
        return outputs

    def _choose(self, decided: Decisions, args: list[Any]) -> tuple[Decisions, Executable]:
        """The variant of the decided row; that which computes everything where it does not admit the call's sizes."""
        executable = self.variants.get(decided.row) or self.add_variant(decided.row, late=True)
        if executable.admits is None or executable.admits(args):
            return decided, executable
        return _all_compute(decided), self.variants[self._never]

    def _note(
        self,
        call: Call,
        occurrence: int,
        moment: Moment,
        decided: Decisions,
        args: list[Any],
        outputs: Sequence[Any],
        bank: Bank,
    ) -> None:
        """Count the decisions of a call, and show it to the observer if there is one."""
        trajectory, stream = call.trajectory.number, call.stream.name
        record = Record(
            trajectory, moment.step, stream, self.index, occurrence, self.names, decided.row, decided.reasons
        )
        self.session.stats.count(record, decided.misses)
        if self.session.observer is not None:
            position, held = len(call.graphs) - 1, tuple(bank.values)
            self.session.observer(Observation(self.index, position, record, tuple(args), tuple(outputs), held))

    def add_variant(self, row: Row, late: bool = False) -> Executable:
        """Compile the variant of a row. A late one was not foreseen, and is compiled in the middle of a call."""
        executable = self._compile(row)
        self.variants[row] = executable
        self.session.stats.variants += 1
        self.session.stats.late_variants += late
        return executable

    def _hoist(self, prologue: Executable, args: list[Any], bank: Bank, told: bool) -> None:
        """Compute what is hoisted, unless the bank holds it for these very inputs, unchanged since."""
        inputs = [args[i] for i in self._steady]
        if bank.hoisted is not None and bank.hoisted.holds_for(inputs, told):
            return
        bank.hoisted = Hoisted.of(inputs, _execute(prologue, args, bank)[1])
        self.session.stats.hoists += 1

    def _decide(self, moment: Moment, bank: Bank, unfit: Reason | None) -> Decisions:
        holds = [values is not None for values in bank.values]
        return decide(self.sites, moment, bank.computed_at, bank.streak, holds, unfit)

    def _store(
        self, executable: Executable, fresh: Sequence[Tensor], bank: Bank, step: int, decided: Decisions
    ) -> None:
        values: dict[int, list[Tensor]] = {}
        for (site, _), value in zip(executable.fresh, fresh, strict=True):
            values.setdefault(site, []).append(value)
        for site, tensors in values.items():
            bank.store(site, tuple(tensors), step)
        for site, reason in enumerate(decided.reasons):
            if decided.row[site] and reason is not Reason.COVERED:
                bank.streak[site] += 1

    def _owned(self, row: Row, outputs: Sequence[Any], bank: Bank) -> Sequence[Any]:
        """The outputs; one that shares memory with a slot is copied, since its taker may change it in place."""
        shared = self._shared.get(row)
        if shared is None:  # a variant always shares the same
            held = [value for values in bank.all for value in values]
            slots = {value.untyped_storage().data_ptr() for value in held}
            tensors = ((i, out) for i, out in enumerate(outputs) if isinstance(out, Tensor))
            shared = self._shared[row] = tuple(i for i, out in tensors if out.untyped_storage().data_ptr() in slots)
        return [out.clone() if i in shared else out for i, out in enumerate(outputs)] if shared else outputs

    def _outside(self, args: list[Any]) -> Sequence[Any]:
        """The graph was called without the compiled model around it: compute, and keep nothing."""
        executable = self.variants.get(self._never) or self.add_variant(self._never, late=True)
        self.session.stats.misses[Reason.OUTSIDE_CALL] += 1
        bank = Bank(len(self.sites))
        if self.prologue is not None:
            self._hoist(self.prologue, args, bank, told=False)
        return _execute(executable, args, bank)[0]


def _all_compute(decided: Decisions) -> Decisions:
    count = len(decided.row)
    lacking = Reason.SIZES_NOT_COMPILED
    return Decisions((False,) * count, (lacking,) * count, (*decided.misses, *(lacking for r in decided.row if r)))


def _execute(executable: Executable, args: list[Any], bank: Bank) -> tuple[Sequence[Any], Sequence[Tensor]]:
    slots = bank.values if bank.hoisted is None else [*bank.values, bank.hoisted.values]
    cached = [slots[site][k] for site, k in executable.cached]  # type: ignore[index]
    results = executable.run(*[args[i] for i in executable.inputs], *cached)
    split = len(results) - len(executable.fresh)
    return results[:split], results[split:]
