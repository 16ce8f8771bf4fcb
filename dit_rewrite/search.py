"""Searching a plan over the compiled pieces of a model (DiTFastAttn, section 3.5): `greedy_plan`.

The paper runs the network |S| |M| times a step. Here the pieces before a site have run already, with what was chosen
for them, when its candidates are tried: a candidate of site i takes the pieces from i on, (|M| + 1) / 2 of |M| on
average, so that a step takes at most |S| (|M| + 1) / 2 + 2 runs; `Plan.work` has what it came to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_rewrite.backend import Backend
from dit_rewrite.errors import BadParameter, BadTrajectory, Reason
from dit_rewrite.greedy import DELTAS, STRATEGIES, greedy
from dit_rewrite.guards import step as step_symbol
from dit_rewrite.lowering import Backend as LoweringBackend
from dit_rewrite.lowering import Lowering
from dit_rewrite.module import RewrittenModule, attach, twin
from dit_rewrite.passes.site import Part
from dit_rewrite.plan import SHARED, WINDOWED, Choice, Plan, Row, Window, describe_scheduler, fingerprint, partial_path
from dit_rewrite.policies import strategies_of
from dit_rewrite.policy import Policy, Rule
from dit_rewrite.runtime.decide import Decisions
from dit_rewrite.sampling import Arrival, Sampling
from dit_rewrite.where import Where

__all__ = ["DELTAS", "STRATEGIES", "greedy_plan"]

Sample = Callable[[Any], object]

_REUSED: dict[Choice, frozenset[Part]] = {  # the parts of a place that are not computed
    Choice.FULL: frozenset(),
    Choice.AST: frozenset({Part.BRANCH, Part.GUIDANCE, Part.CORE, Part.HELD}),
    Choice.ASC: frozenset({Part.GUIDANCE}),
    Choice.WA_RS: frozenset({Part.CORE, Part.HELD}),
    Choice.WA_RS_ASC: frozenset({Part.GUIDANCE, Part.CORE, Part.HELD}),
}


def greedy_plan(
    model: nn.Module,
    trajectories: Sequence[Sample],
    delta: float,
    strategies: Sequence[Choice] = STRATEGIES,
    *,
    steps: int,
    window: Window = 0.125,
    conditional: Literal["first", "second"] | None = None,
    kinds: tuple[str, ...] = ("self", "joint"),
    scheduler: object = None,
    path: str | Path | None = None,
    backend: LoweringBackend = "inductor",
    progress: bool = False,
) -> Plan:
    """The plan of DiTFastAttn's algorithm 1 for the attentions of `kinds` in a denoiser.

    `trajectories` are functions that sample with the denoiser they are given: it is called once a step for `steps`
    steps, inside ``with denoiser.trajectory(num_steps=steps)``, both halves of the guidance in one batch of which
    `conditional` is one. They run side by side, each in a thread. `delta` bounds the mean relative absolute error of
    the model's output; `strategies` are the candidates in ascending cost, `window` is WA-RS's. `scheduler` is only
    noted in the plan. With a `path` the plan is saved there, and a search that was interrupted goes on.

    Raises BadParameter, BadTrajectory where the model is called otherwise, and what `greedy` raises.
    """
    if conditional is None and SHARED & set(strategies):
        raise BadParameter("greedy_plan", "conditional", None, '"first" or "second", or strategies without ASC')
    compiled = attach(
        twin(model), Backend(model, _candidates(strategies, window, conditional, kinds), _segments(backend))
    )
    runner = _Pieces(compiled, [Sampling(compiled, sample) for sample in trajectories], steps)
    found_path = None if path is None else Path(path)
    partial = None if found_path is None else partial_path(found_path)
    key = f"{fingerprint(model)} {len(trajectories)} {window} {conditional} {kinds} {describe_scheduler(scheduler)}"
    try:
        runner.open()
        found = greedy(runner, runner.places, steps, delta, strategies, partial=partial, key=key, progress=progress)
    finally:
        runner.close()
    used = {choice for row in found.table for choice in row}
    plan = Plan(
        fingerprint(model),
        steps,
        describe_scheduler(scheduler),
        runner.places,
        found.table,
        delta,
        window if used & WINDOWED else None,
        conditional if used & SHARED else None,
        found.evaluations,
        found.share(len(strategies)),
    )
    if found_path is not None:
        plan.save(found_path)
    return plan


def _segments(backend: LoweringBackend) -> Lowering:
    return Lowering.of(backend, form="segments")


def _candidates(
    strategies: Sequence[Choice], window: Window, conditional: str | None, kinds: tuple[str, ...]
) -> Policy:
    """A policy under which every place can do whatever a candidate asks; who does what, the search decides."""
    known = strategies_of(window, conditional)
    rules = (Rule(step_symbol > 0, known[choice], Where(kinds)) for choice in strategies if choice in known)
    return Policy(tuple(rules), "candidates")


class _Pieces:
    """The runner of `greedy` over compiled pieces, for several samplers side by side."""

    def __init__(self, compiled: RewrittenModule, samplings: Sequence[Sampling], steps: int) -> None:
        self.compiled, self.samplings, self.steps = compiled, samplings, steps
        self.work = 0.0
        self.states: list[_State] = []
        self.row: list[Choice] = []
        self.outputs: list[Tensor] = []
        self.places: tuple[str, ...] = ()
        self._waiting: list[Arrival] | None = None

    def open(self) -> None:
        """Run all samplers up to their first call, which compiles the model and shows its places."""
        self._waiting = [sampling.next() for sampling in self.samplings]
        (rewritten,) = self.compiled._backend.rewritten
        sites = rewritten.layout.sites
        self.places = tuple(dict.fromkeys(site.place for site in sites))
        numbers = {place: i for i, place in enumerate(self.places)}
        self._sites = [(numbers[site.place], site.part) for site in sites]
        depends = rewritten.layout.depends
        self._first = [
            next(p for p, own in enumerate(depends) if any(self._sites[s][0] == i for s in own))
            for i in range(len(self.places))
        ]

    def close(self) -> None:
        """End the samplers."""
        for sampling in self.samplings:
            sampling.close()

    def _arrivals(self) -> list[Arrival]:
        """The next call of every sampler."""
        arrivals = self._waiting if self._waiting is not None else [s.next() for s in self.samplings]
        self._waiting = None
        return arrivals

    def replay(self, row: Row) -> None:
        """Go through the next step with these choices."""
        self.begin(-1)
        self.row = list(row)
        self.finish()

    def begin(self, step: int) -> None:
        self.states = [_State(arrival) for arrival in self._arrivals()]
        self.row = [Choice.FULL] * len(self.places)

    def reference(self) -> list[Tensor]:
        return self._outputs([Choice.FULL] * len(self.places))

    def attempt(self, index: int, choice: Choice) -> list[Tensor]:
        needed = {Part.BRANCH} if choice is Choice.AST else _REUSED[choice]
        if not needed <= {part for place, part in self._sites if place == index}:
            return [torch.full_like(output, torch.nan) for output in self.outputs]  # refused here: proves nothing
        row = [*self.row[:index], choice, *[Choice.FULL] * (len(self.row) - index - 1)]
        return self._outputs(row)

    def fix(self, index: int, choice: Choice) -> None:
        self.row[index] = choice
        until = self._first[index + 1] if index + 1 < len(self.places) else self._first[index]
        self._advance(until)

    def finish(self) -> None:
        self._advance(len(self.states[0].graph.pieces))
        decided = self._decisions()
        for sampling, state in zip(self.samplings, self.states, strict=True):
            sampling.answer(decided, state.finish(decided))

    def _advance(self, until: int) -> None:
        for state in self.states:
            self.work += state.advance(until, self._decide(self.row)) / len(self.states)

    def _outputs(self, row: Sequence[Choice]) -> list[Tensor]:
        self.outputs = []
        for state in self.states:
            output, share = state.outputs(self._decide(row))
            self.outputs.append(output)
            self.work += share / len(self.states)
        return self.outputs

    def _decide(self, row: Sequence[Choice]) -> Callable[[int], bool]:
        """Whether a site is reused under a row of choices."""
        return lambda site: self._sites[site][1] in _REUSED[row[self._sites[site][0]]]

    def _decisions(self) -> Decisions:
        decide = self._decide(self.row)
        row = tuple(map(decide, range(len(self._sites))))
        return Decisions(row, tuple(Reason.RULE if reused else Reason.NO_RULE for reused in row), ())


class _State:
    """One trajectory within a step: the wires as they stand before the first piece that is still open."""

    def __init__(self, arrival: Arrival) -> None:
        self.graph, self.args, self.call, self.bank = arrival
        if not self.call.told:
            raise BadTrajectory("A plan is searched within told trajectories.", "Use `with model.trajectory(…)`.")
        self.wires = self.graph.start(self.args)
        self.cursor = 0
        self.fresh: list[Any] = []

    def outputs(self, decide: Callable[[int], bool]) -> tuple[Tensor, float]:
        """The model's output if the open pieces run so, and which share of the network that takes."""
        wires = list(self.wires)
        count = len(self.graph.pieces)
        for number in range(self.cursor, count):
            self.graph.run_piece(number, decide, self.args, wires, self.bank)
        tensors = [t for t in self.graph.results(wires) if isinstance(t, Tensor) and t.is_floating_point()]
        return torch.cat([t.flatten() for t in tensors]), (count - self.cursor) / count

    def advance(self, until: int, decide: Callable[[int], bool]) -> float:
        """Close the pieces before `until`: they run for good."""
        before = self.cursor
        for number in range(self.cursor, until):
            self.fresh += self.graph.run_piece(number, decide, self.args, self.wires, self.bank)
            self.cursor = number + 1
        return (self.cursor - before) / len(self.graph.pieces)

    def finish(self, decided: Decisions) -> list[Any]:
        """Fill the slots; what the graph returns."""
        self.graph.store(self.fresh, self.bank, self.call.moment.step, decided)
        return self.graph.results(self.wires)
