"""Dispatch: decisions -> pieces -> calls. Plain Python over tuples; no tensor work on the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.cache import Bank, Hoisted, stamp_of
from dit_rewrite.runtime.decide import Computed, Decider, Decisions, Moment, Past, SiteSpec, Weights
from dit_rewrite.runtime.measure import Distance, Meter
from dit_rewrite.runtime.pieces import Executable, Piece, Row, Unadmitted, Wiring, execute
from dit_rewrite.runtime.session import Call, Observation, Session
from dit_rewrite.runtime.spectral import noise_share
from dit_rewrite.runtime.stats import Record

# what decisions follow from where nothing is measured: the arguments of a Decider behind its sites
State = tuple[Moment, tuple[Past, ...], tuple[int, ...], tuple[bool, ...], Reason | None]
Decide = Callable[[int], bool]  # whether a site is reused
Weigh = Callable[[int], Weights | None]  # how the values are weighted that its slot holds; None: it takes the newest
PLANS = 4096  # decisions of a graph that are kept: of steps, streams and numbers of steps


def newest(site: int) -> None:
    """The weights of a site that takes the newest value of its slot."""


class Graph:
    """What runs in the place of one captured graph."""

    def __init__(
        self,
        index: int,
        sites: Sequence[SiteSpec],
        num_layers: int,
        wiring: Wiring,
        pieces: Sequence[Piece],
        session: Session,
        compile_variant: Callable[[int, Row], Executable | None],
        lag: int,
        distance: Distance,
    ) -> None:
        """`compile_variant` makes the code of a piece for a row; `distance` measures probes, `lag` calls late."""
        self.index = index
        self.sites = tuple(sites)
        self.names = tuple(site.name for site in sites)
        self.num_layers = num_layers
        self.wiring, self.pieces = wiring, tuple(pieces)
        self.session = session
        self.prologue: Executable | None = None  # computes the hoisted values
        self._compile = compile_variant
        self._lag, self._distance = lag, distance
        self._measured = tuple(site.measured for site in self.sites)
        self._measures = any(site.measured or site.entropy is not None for site in self.sites)
        self._decided = lru_cache(maxsize=PLANS)(self._decide)
        self._borrowing = tuple((i, site.borrows) for i, site in enumerate(self.sites) if site.borrows is not None)
        self._conditioned = tuple(i for i, site in enumerate(self.sites) if site.conditioned)
        self._weights = tuple(sorted(wiring.static))
        self._steady = tuple(sorted(wiring.steady))
        self._ambient = tuple(sorted(wiring.ambient))
        self._data = tuple(i for i in range(wiring.num_inputs - wiring.num_hoisted) if i not in wiring.static)
        forecasting = {i for i, site in enumerate(self.sites) if site.depth > 1}
        self._forecasting = tuple(tuple(i for i in piece.sites if i in forecasting) for piece in self.pieces)
        self._compiling = threading.RLock()
        self._room = [None] * (wiring.num_wires - wiring.num_inputs)
        self._shared: dict[Row, tuple[int, ...]] = {}  # the outputs that share memory with a slot

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Run the graph on its flat inputs, as AOTAutograd calls it."""
        call = self.session.call
        if call is None:
            return self._outside(args)
        occurrence, bank, changed = call.enter(self.index, len(self.sites))
        stamp = stamp_of([args[i] for i in self._data], not isinstance(call.inputs.timestep, (int, float)))
        weights = tuple(map(args.__getitem__, self._weights))
        unfit = bank.fit(stamp, weights, [args[i] for i in self._ambient])
        if unfit is Reason.EMPTY and call.fresh is not None:
            unfit = call.fresh
        if self._conditioned:
            steady = [args[i] for i in self._steady]
            unfit = bank.keep_for(steady, call.explicit, self._conditioned) or unfit
        inputs = [*args, *self._hoisted(args, bank, call.explicit)]
        for site, lender in self._borrowing:
            if lender != call.stream.name and (unfit is None or self.sites[site].differs):
                take = bank.lend if self.sites[site].differs else bank.borrow
                take(site, call.lent(lender, self.index, occurrence), call.trajectory.step)
        run = self._run if self.session.director is None else self._directed
        try:
            decided, outputs = run(inputs, call, bank, changed or unfit)
        except Unadmitted:
            decided, outputs = self._run(inputs, call, bank, Reason.SIZES_NOT_COMPILED)
        outputs = self._owned(decided.row, outputs, bank)
        self._note(call, occurrence, decided, args, outputs, bank)
        for site, lender in self._borrowing:
            bank.lent.pop(site, None)  # or the lender's old values would live while it makes new ones
            if lender != call.stream.name and not self.sites[site].differs:
                bank.values[site] = None
        call.layers += self.num_layers
        args.clear()
        return outputs

    def _run(self, args: list[Any], call: Call, bank: Bank, unfit: Reason | None) -> tuple[Decisions, Sequence[Any]]:
        """Decide and run piece by piece; nothing is stored before all of them have run."""
        wires, moment = self.start(args), call.moment
        holds = tuple([unfit is None and values is not None for values in bank.values])
        if self._borrowing:
            holds = self._with_lent(holds, moment, bank)
        state: State = (moment, tuple(bank.past), tuple(bank.streak), holds, unfit)
        if self._measures:
            decided, fresh = self._measuring(args, wires, bank, state)
        else:
            decided = self._decided(*state)
            fresh = self._pieces(args, wires, bank, decided.row.__getitem__, decided.weigh, moment.stream)
        self.store(fresh, bank, moment, decided)
        return decided, self.results(wires)

    def _measuring(
        self, args: list[Any], wires: list[Any], bank: Bank, state: State
    ) -> tuple[Decisions, list[tuple[tuple[int, int], Tensor]]]:
        """Run the pieces where decisions wait for what earlier ones, or earlier calls, computed."""
        noise = noise_share(state[0].sigma, state[0].snr)
        inputs = self.wiring.num_inputs
        meter = Meter(bank.tracked, self._measured, wires, inputs, self._lag, self._distance, noise)

        def measure(site: int, symbol: str) -> float | None:
            index = self.sites[site].entropy
            if symbol != "entropy" or index is None:
                return meter.read(site, symbol)
            held = bank.values[site]
            return None if held is None else float(held[index].item())

        decider = Decider(self.sites, *state, measure=measure)
        fresh = self._pieces(args, wires, bank, decider.settle, decider.weigh, state[0].stream)
        decided = decider.decisions()
        meter.close(decided.row)
        return decided, fresh

    def _with_lent(self, holds: tuple[bool, ...], moment: Moment, bank: Bank) -> tuple[bool, ...]:
        """Which slots hold what can be used: a difference needs what the other stream computed in this step."""
        lacks = {i for i, by in self._borrowing if self.sites[i].differs and by != moment.stream and i not in bank.lent}
        return tuple(held and i not in lacks for i, held in enumerate(holds))

    def _decide(self, *state: Any) -> Decisions:
        """The decisions where nothing is measured: a function of the state alone, whose results are kept."""
        return Decider(self.sites, *state).decisions()

    def _directed(
        self, args: list[Any], call: Call, bank: Bank, unfit: Reason | None
    ) -> tuple[Decisions, Sequence[Any]]:
        """Have somebody else decide and run the pieces (see `start`, `run_piece`, `results` and `store`)."""
        found: tuple[Decisions, Sequence[Any]] = self.session.director(self, args, call, bank)  # type: ignore[misc]
        return found

    def _pieces(
        self, args: list[Any], wires: list[Any], bank: Bank, decide: Decide, weigh: Weigh, stream: Hashable
    ) -> list[tuple[tuple[int, int], Tensor]]:
        """Run the pieces one after the other; what they made for the slots.

        The oldest value of a site that now computes is let go first: nothing reads it any more, and it would take
        memory beside the new one. Should the call fail, the stream's slots are emptied.
        """
        fresh: list[tuple[tuple[int, int], Tensor]] = []
        for number, piece in enumerate(self.pieces):
            for site in piece.sites:
                if not decide(site):
                    bank.release(site, self.sites[site].width, self.sites[site].kept(stream))
            fresh += self.run_piece(number, decide, args, wires, bank, weigh)
        return fresh

    def start(self, args: list[Any]) -> list[Any]:
        """The wires of a call, before any piece."""
        return [*args, *self._room]

    def run_piece(
        self, number: int, decide: Decide, args: list[Any], wires: list[Any], bank: Bank, weigh: Weigh = newest
    ) -> list[tuple[tuple[int, int], Tensor]]:
        """Run one piece, put what it returns on the wires and take what is spent off them; what it made for slots."""
        piece = self.pieces[number]
        row = tuple([decide(site) for site in piece.sites])
        executable = piece.variants[row] if row in piece.variants else self.add_variant(number, row, late=True)
        fresh: list[tuple[tuple[int, int], Tensor]] = []
        if executable is not None:
            if executable.admits is not None and not executable.admits(args):
                raise Unadmitted
            slots = self._weighted(number, decide, weigh, bank) if self._forecasting[number] else bank.values
            fresh = execute(executable, wires, slots)
        for wire in piece.spent:
            wires[wire] = None
        return fresh

    def _weighted(self, number: int, decide: Decide, weigh: Weigh, bank: Bank) -> list[tuple[Tensor, ...] | None]:
        """The slots, those from which a piece takes a weighted sum as it reads them."""
        slots = list(bank.values)
        for i in self._forecasting[number]:
            if slots[i] is not None and decide(i):
                site = self.sites[i]
                weights = weigh(i) or (1.0,) + (0.0,) * (site.depth - 1)
                slots[i] = bank.weighted(i, weights, site.width)
        return slots

    def results(self, wires: list[Any]) -> list[Any]:
        """What the graph returns, once all pieces have run."""
        return [wires[out] if isinstance(out, int) else out[0] for out in self.wiring.outputs]

    def _note(
        self,
        call: Call,
        occurrence: int,
        decided: Decisions,
        args: list[Any],
        outputs: Sequence[Any],
        bank: Bank,
    ) -> None:
        """Count the decisions of a call, and show it to the observer if there is one."""
        trajectory, stream = call.trajectory.number, call.stream.name
        record = Record(
            trajectory,
            call.trajectory.step,
            stream,
            self.index,
            occurrence,
            self.names,
            decided.row,
            decided.reasons,
            decided.weights,
            decided.measured,
        )
        self.session.stats.count(record, decided.misses)
        if self.session.observer is not None:
            position, held = len(call.graphs) - 1, tuple(bank.values)
            self.session.observer(Observation(self.index, position, record, tuple(args), tuple(outputs), held))

    def add_variant(self, piece: int, row: Row, late: bool = False) -> Executable | None:
        """Compile a piece for a row. A late one was not foreseen, and is compiled in the middle of a call."""
        with self._compiling:
            if row in self.pieces[piece].variants:
                return self.pieces[piece].variants[row]
            executable = self.pieces[piece].variants[row] = self._compile(piece, row)
        self.session.stats.add("late_variants", late)
        return executable

    def _hoisted(self, args: list[Any], bank: Bank, explicit: bool) -> Sequence[Tensor]:
        """The hoisted values: those of the bank if it computed them from these very inputs, unchanged since."""
        if self.prologue is None:
            return ()
        inputs = [args[i] for i in self.prologue.inputs if isinstance(args[i], Tensor)]  # weights may be changed too
        if bank.hoisted is None or not bank.hoisted.holds_for(inputs, explicit):
            values = [value for _, value in execute(self.prologue, args, ())]
            bank.hoisted = Hoisted.of(inputs, values)
            self.session.stats.add("hoists")
            self.session.note_bytes()
        return bank.hoisted.values

    def store(
        self, fresh: Sequence[tuple[tuple[int, int], Tensor]], bank: Bank, moment: Moment, decided: Decisions
    ) -> None:
        """Put what the pieces made into the slots, once all of them have run."""
        now = Computed(moment.step, moment.sigma, moment.snr)
        values: dict[int, dict[int, Tensor]] = {}
        for (site, index), value in fresh:
            values.setdefault(site, {})[index] = value
        for site, reason in enumerate(decided.reasons):
            if not decided.row[site]:
                tensors = values.get(site, {})
                made = tuple(tensors[k] for k in range(len(tensors))) or None
                made = self._difference(site, made, bank, moment)
                bank.store(site, made, now, self.sites[site].kept(moment.stream))
            elif reason is Reason.UNREAD:
                bank.store(site, None, now)  # what it held is of an earlier computation
            elif reason is not Reason.COVERED:
                bank.streak[site] += 1
        if fresh:
            self.session.note_bytes()

    def _difference(
        self, site: int, made: tuple[Tensor, ...] | None, bank: Bank, moment: Moment
    ) -> tuple[Tensor, ...] | None:
        """What a slot holds of what was made: the difference from what another stream made, where it asks for that."""
        spec = self.sites[site]
        if not spec.differs or spec.borrows == moment.stream or made is None:
            return made
        lent = bank.lent.get(site)
        return None if lent is None else tuple(a - b for a, b in zip(made, lent, strict=True))

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
        self.session.stats.miss(Reason.OUTSIDE_CALL)
        bank = Bank(len(self.sites))
        wires = self.start([*args, *self._hoisted(args, bank, explicit=False)])
        for piece in self.pieces:
            executable = piece.variants[(False,) * len(piece.sites)]
            if executable is not None:
                execute(executable, wires, bank.values)
        return self.results(wires)
