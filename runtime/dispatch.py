"""Dispatch: select and run the compiled segments of a graph by the decisions of a call.

This is Python over tuples on the hot path of each step; it does no tensor arithmetic on the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import MissReason, Reason
from dit_rewrite.runtime.cache import Cache, stamp_of
from dit_rewrite.runtime.decide import Decider, Decisions, SiteSpec, Weights
from dit_rewrite.runtime.forecast_errors import ForecastErrors, Fresh
from dit_rewrite.runtime.history import Moment, Past
from dit_rewrite.runtime.measure import Distance, Meter
from dit_rewrite.runtime.prologue import Prologue
from dit_rewrite.runtime.segments import Executable, Segment, SizesNotCompiled, Wiring, chosen, execute
from dit_rewrite.runtime.session import Call, Observation, Session
from dit_rewrite.runtime.spectral import noise_share
from dit_rewrite.runtime.stats import Record
from dit_rewrite.runtime.step_tables import Program

# The arguments of `Decider` after `sites`. Without measurements they determine the decisions.
State = tuple[Moment, tuple[Past, ...], tuple[int, ...], tuple[bool, ...], Reason | None]
Decide = Callable[[int], bool]  # returns whether a site is reused
Weigh = Callable[[int], Weights | None]  # returns the weights of the values in a site's slot; None: use the newest
PLANS = 4096  # cached decisions per graph, over steps, streams and numbers of steps


def newest(site: int) -> None:
    """Return None, the weights of a site that uses only the newest value of its slot."""


class CompiledGraph:
    """The callable that replaces one captured graph."""

    def __init__(
        self,
        index: int,
        sites: Sequence[SiteSpec],
        num_layers: int,
        wiring: Wiring,
        segments: Sequence[Segment],
        session: Session,
        compile_variant: Callable[[int, DecisionRow], Executable | None],
        lag: int,
        distance: Distance,
    ) -> None:
        """Create the callable for graph number `index`.

        num_layers: blocks in this graph. compile_variant: compiles a segment for a row of decisions, or returns None
        if nothing is left to run. lag: 0 if guards read measurements of this call, 1 if those of the previous call.
        distance: the relative change between two tensors.
        """
        self.index = index
        self.sites = tuple(sites)
        self.names = tuple(site.name for site in sites)
        self.num_layers = num_layers
        self.wiring, self.segments = wiring, tuple(segments)
        self.session = session
        self.prologue: Prologue | None = None  # computes the hoisted values
        self.program: Program | None = None  # computes the rows of the step table
        self._compile = compile_variant
        self._lag, self._distance = lag, distance
        self._measured = tuple(site.measured for site in self.sites)
        self._errors = ForecastErrors(self.sites, distance)
        self._measures = any(site.measured or site.errors or site.entropy is not None for site in self.sites)
        self._decided = lru_cache(maxsize=PLANS)(self._decide)
        self.forget_decisions = self._decided.cache_clear  # for a forecast whose weights have changed
        self._borrowing = tuple((i, site.borrows) for i, site in enumerate(self.sites) if site.borrows is not None)
        self._conditioned = tuple(i for i, site in enumerate(self.sites) if site.conditioned)
        self._weights, self._steady = chosen(sorted(wiring.static)), chosen(sorted(wiring.steady))
        self._ambient, self._unknown = chosen(sorted(wiring.ambient)), chosen(sorted(wiring.unknown))
        num_given = wiring.num_inputs - wiring.num_hoisted
        self._passed = tuple(i for i, out in enumerate(wiring.outputs) if out in range(num_given, wiring.num_inputs))
        self._data = chosen([i for i in range(num_given) if i not in wiring.static | wiring.unread])
        self._blockwise = [(i, site) for i, site in enumerate(self.sites) if site.counters is not None]
        forecasting = {i for i, site in enumerate(self.sites) if site.depth > 1}
        self._forecasting = tuple(tuple(i for i in segment.sites if i in forecasting) for segment in self.segments)
        self._compiling = threading.RLock()
        self._room = [None] * (wiring.num_wires - wiring.num_inputs)
        self._shared: dict[tuple[DecisionRow, DecisionRow], tuple[int, ...]] = {}  # outputs that alias a slot, by row

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Run the graph on its flat inputs; this is the calling convention of AOTAutograd. Clears `args`."""
        call = self.session.call
        if call is None:
            return self._outside(args)
        occurrence, cache, changed = call.enter(self.index, len(self.sites))
        stamp = stamp_of(self._data(args), call.inputs.number is None)
        unfit: Reason | None = cache.fit(stamp, self._weights(args), self._ambient(args), self._unknown(args))
        if unfit is MissReason.EMPTY and call.fresh is not None:
            unfit = call.fresh
        if self.program is not None:
            cache.bookmark.begin(call.explicit)
        if self._conditioned:
            steady = self._steady(args)
            unfit = cache.validate_conditioning(steady, call.explicit, self._conditioned) or unfit
        inputs = [*args, *self._hoisted(args, cache, call.explicit)]
        cache.graphs = self.session.graphs(self.index, cache, stamp, self.wiring, self.sites)
        for site, lender in self._borrowing:
            if lender != call.stream.name and (unfit is None or self.sites[site].differs):
                take = cache.lend if self.sites[site].differs else cache.borrow
                take(site, call.lent(lender, self.index, occurrence), call.trajectory.step)
        run = self._run if self.session.director is None else self._directed
        try:
            decided, outputs = run(inputs, call, cache, changed or unfit)
        except SizesNotCompiled:
            decided, outputs = self._run(inputs, call, cache, MissReason.SIZES_NOT_COMPILED)
        outputs = self._owned(decided, outputs, cache)
        self._note(call, occurrence, decided, args, outputs, cache)
        for site, lender in self._borrowing:
            cache.lent.pop(site, None)  # do not keep the lender's old values alive while it computes new ones
            if lender != call.stream.name and not self.sites[site].differs:
                cache.values[site] = None
        call.leave(self.num_layers, outputs)
        args.clear()
        return outputs

    def _run(self, args: list[Any], call: Call, cache: Cache, unfit: Reason | None) -> tuple[Decisions, Sequence[Any]]:
        """Decide and run segment by segment. The slots are filled only after all segments have run."""
        wires, moment = self.start(args), call.moment
        holds = tuple([unfit is None and values is not None for values in cache.values])
        if self._borrowing:
            holds = self._with_lent(holds, moment, cache)
        state: State = (moment, tuple(cache.past), tuple(cache.streak), holds, unfit)
        if self._measures:
            decided, fresh = self._measuring(args, wires, cache, state)
        else:
            decided = self._decided(*state)
            fresh = self._run_segments(args, wires, cache, decided, moment.stream)
        self.commit(fresh, cache, moment, decided)
        return decided, self.results(wires)

    def _measuring(
        self, args: list[Any], wires: list[Any], cache: Cache, state: State
    ) -> tuple[Decisions, list[tuple[tuple[int, int], Tensor]]]:
        """Run the segments if guards read measurements of earlier segments or of earlier calls."""
        noise = noise_share(state[0].sigma, state[0].snr)
        inputs = self.wiring.num_inputs
        meter = Meter(cache.tracked, self._measured, wires, inputs, self._lag, self._distance, noise)

        def measure(site: int, symbol: str) -> float | None:
            index, errors = self.sites[site].entropy, self.sites[site].errors
            if symbol in errors:
                return cache.tracked.error(errors[symbol])
            if symbol != "entropy" or index is None:
                return meter.read(site, symbol)
            values = cache.values[site]
            return None if values is None else float(values[index].item())

        decider = Decider(self.sites, *state, measure=measure)
        fresh = self._run_segments(args, wires, cache, decider, state[0].stream)
        decided = decider.decisions()
        meter.close(decided.row)
        return decided, fresh

    def _with_lent(self, holds: tuple[bool, ...], moment: Moment, cache: Cache) -> tuple[bool, ...]:
        """Update which slots are usable: a difference also needs the value of the lending stream from this step."""
        missing = {
            i for i, by in self._borrowing if self.sites[i].differs and by != moment.stream and i not in cache.lent
        }
        return tuple(held and i not in missing for i, held in enumerate(holds))

    def _decide(self, *state: Any) -> Decisions:
        """Return the decisions if nothing is measured; they depend on the state alone, and are cached."""
        return Decider(self.sites, *state).decisions()

    def _directed(
        self, args: list[Any], call: Call, cache: Cache, unfit: Reason | None
    ) -> tuple[Decisions, Sequence[Any]]:
        """Let the session's director decide and run the segments, by `start`, `run_segment`, `results` and `commit`."""
        found: tuple[Decisions, Sequence[Any]] = self.session.director(self, args, call, cache)  # type: ignore[misc]
        return found

    def _run_segments(
        self, args: list[Any], wires: list[Any], cache: Cache, by: Decider | Decisions, stream: Hashable
    ) -> Fresh:
        """Run the segments in order, and return their new slot tensors.

        The oldest value of a site that computes is freed first, since nothing reads it any more and it would occupy
        memory beside the new value; its forecast is made before. If the call fails, the stream's slots are cleared.
        """
        fresh, foretold, settle = Fresh(), dict[int, list[Tensor]](), by.settle
        for number, segment in enumerate(self.segments):
            for site in [site for site in segment.sites if not settle(site)]:
                if site in foretold:
                    continue
                if site in self._errors:
                    foretold[site] = self._errors.foretell(site, cache.values[site], by.foretell(site))
                if not by.is_verified(site):
                    cache.release(site, self.sites[site].width, self.sites[site].kept(stream))
            fresh += self.run_segment(number, settle, args, wires, cache, by.weigh)
        self._errors.note(foretold, fresh, cache.tracked)
        return fresh

    def start(self, args: list[Any]) -> list[Any]:
        """Return the wires of a call before any segment has run."""
        return [*args, *self._room]

    def run_segment(
        self, number: int, decide: Decide, args: list[Any], wires: list[Any], cache: Cache, weigh: Weigh = newest
    ) -> Fresh:
        """Run one segment, write its outputs to `wires`, free spent wires, and return its new slot tensors.

        Raises SizesNotCompiled if the segment was compiled for other sizes.
        """
        segment = self.segments[number]
        row = tuple(map(decide, segment.sites))
        executable = segment.variants[row] if row in segment.variants else self.add_variant(number, row, late=True)
        fresh: Fresh = []
        if executable is not None:
            if executable.admits is not None and not executable.admits(args):
                raise SizesNotCompiled
            slots = self._weighted(number, decide, weigh, cache) if self._forecasting[number] else cache.values
            table, graphs = self._table(executable, args, cache), cache.graphs
            if graphs is not None:
                fresh = graphs.execute((number, row), executable, wires, slots, table, cache)
            else:
                fresh = execute(executable, wires, slots, table)
        for wire in segment.spent:
            wires[wire] = None
        return fresh

    def _weighted(self, number: int, decide: Decide, weigh: Weigh, cache: Cache) -> list[tuple[Tensor, ...] | None]:
        """Return the slots, with the inputs of the weighted sum in those that the segment forecasts from."""
        slots = list(cache.values)
        for i in self._forecasting[number]:
            if slots[i] is not None and decide(i):
                site = self.sites[i]
                weights = weigh(i) or (1.0,) + (0.0,) * (site.depth - 1)
                slots[i] = cache.weighted(i, weights, site.width)
        return slots

    def results(self, wires: list[Any]) -> list[Any]:
        """Return the outputs of the graph after all segments have run."""
        return [wires[out] if isinstance(out, int) else out[0] for out in self.wiring.outputs]

    def _note(
        self,
        call: Call,
        occurrence: int,
        decided: Decisions,
        args: list[Any],
        outputs: Sequence[Any],
        cache: Cache,
    ) -> None:
        """Record the decisions of a call in the statistics, and call the observer if there is one."""
        when = call.trajectory.number, call.trajectory.step, call.stream.name, self.index, occurrence
        record = Record(*when, self.names, decided.row, decided.reasons, decided.weights, decided.measured)
        self.session.stats.count(record, decided.misses, decided.counts)
        if self.session.observer is not None:
            position, slots = len(call.graphs) - 1, tuple(cache.values)
            self.session.observer(Observation(self.index, position, record, tuple(args), tuple(outputs), slots))

    def add_variant(self, segment: int, row: DecisionRow, late: bool = False) -> Executable | None:
        """Compile a segment for a row of decisions, unless it is compiled already.

        late: the variant was not predicted when the model was compiled, and is compiled during a call.
        """
        with self._compiling:
            if row in self.segments[segment].variants:
                return self.segments[segment].variants[row]
            executable = self.segments[segment].variants[row] = self._compile(segment, row)
        self.session.stats.add("late_variants", late)
        return executable

    def _hoisted(self, args: list[Any], cache: Cache, explicit: bool) -> Sequence[Tensor]:
        return () if self.prologue is None else self.prologue.values(args, cache, explicit)

    def _table(self, executable: Executable, args: list[Any], cache: Cache) -> Sequence[Tensor]:
        """Return the values of the step table that a variant takes."""
        if not executable.columns or self.program is None:
            return ()
        call, tables = self.session.call, self.session.tables_of(self.index, self.program)
        explicit, clock = (False, None) if call is None else (call.explicit, call.trajectory.clock)
        return tables.read(executable.columns, args, cache.bookmark, explicit, clock)

    def commit(
        self, fresh: Sequence[tuple[tuple[int, int], Tensor]], cache: Cache, moment: Moment, decided: Decisions
    ) -> None:
        """Fill the slots with the new tensors after all segments have run, and update their histories."""
        cache.commit(self.sites, fresh, moment, decided)
        if self._blockwise and self.session.call is not None:
            when = (self.session.call.trajectory.number, moment.step, moment.stream)
            self.session.stats.note_blocks(self._blockwise, cache.values, decided, when)
        if fresh:
            self.session.note_bytes()

    def _owned(self, decided: Decisions, outputs: Sequence[Any], cache: Cache) -> Sequence[Any]:
        """Return the outputs. Outputs that share storage with a slot are copied, as the caller may modify them."""
        shared = self._shared.get(decided.kind)  # without graphs, a variant always aliases the same outputs
        if cache.graphs is not None:  # the outputs of a replay are copies, but no segment computes a hoisted value
            shared = cache.aliased(outputs) if cache.graphs.plainly else self._passed
        elif shared is None:
            shared = self._shared[decided.kind] = cache.aliased(outputs)
        return [out.clone() if i in shared else out for i, out in enumerate(outputs)] if shared else outputs

    def _outside(self, args: list[Any]) -> Sequence[Any]:
        """Compute without caching, because the graph was called outside a call of the compiled model."""
        self.session.stats.miss(MissReason.OUTSIDE_CALL)
        cache = Cache(len(self.sites))
        wires = self.start([*args, *self._hoisted(args, cache, explicit=False)])
        for segment in self.segments:
            executable = segment.variants[(False,) * len(segment.sites)]
            if executable is not None:
                execute(executable, wires, cache.values, self._table(executable, args, cache))
        return self.results(wires)
