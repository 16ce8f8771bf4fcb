"""Search a plan over the compiled segments of a model (DiTFastAttn, section 3.5): `greedy_plan`.

The paper runs the whole network |S| |M| times per step. Here the segments before a site have already run with the
choices made for them when the site's candidates are tried. A candidate of site i runs the segments from i on, on
average (|M| + 1) / 2 of |M|, so a step takes at most |S| (|M| + 1) / 2 + 2 runs. `Plan.work` has the actual number.

If guidance takes several named calls a step, each stream has choices of its own, which are searched when it is called:
the sampler needs its outputs before the next stream is called. ASC then has no batch to share in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.errors import BadParameter, DecisionReason, NoSites, SearchOverGraphs
from dit_rewrite.guards import step as step_symbol
from dit_rewrite.module import RewrittenModule, attach, twin
from dit_rewrite.passes.analysis.site import Found
from dit_rewrite.policies import DiTFastAttn, strategies_of
from dit_rewrite.policy.files import check_writable
from dit_rewrite.policy.plan import (
    SHARED,
    WINDOWED,
    Choice,
    Grid,
    Plan,
    PlanRow,
    Window,
    check_window,
    describe_scheduler,
    fingerprint,
    partial_path,
)
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Strategy
from dit_rewrite.policy.where import Where
from dit_rewrite.report.prediction import Prediction, predict
from dit_rewrite.runtime.decide import Decisions
from dit_rewrite.search.candidates import REPLACED, Candidates
from dit_rewrite.search.greedy import DELTAS, STRATEGIES, greedy
from dit_rewrite.search.metrics import Metric, metric_of
from dit_rewrite.search.stepped_sampler import Arrival, Samplers, Sampling, State, digest

__all__ = ["DELTAS", "STRATEGIES", "greedy_plan"]

Sample = Callable[[Any], object]
ALL = frozenset(STRATEGIES)


def greedy_plan(
    model: nn.Module,
    trajectories: Sequence[Sample],
    delta: float,
    strategies: Collection[Choice] = ALL,
    *,
    steps: int,
    window: Window = 0.125,
    grid: Grid | None = None,
    conditional: Literal["first", "second"] | None = None,
    kinds: tuple[str, ...] = ("self", "joint", "parallel"),
    metric: str | Metric = "relative_error",
    scheduler: object = None,
    path: str | Path | None = None,
    backend: InnerBackend = "inductor",
    progress: bool = False,
) -> Plan:
    """The plan of DiTFastAttn's algorithm 1 for the attentions of `kinds` in a denoiser. In a parallel block, whose
    attention and MLP share a projection, AST reuses both.

    `trajectories` are functions that sample with the denoiser that they take. Each calls it once per step for `steps`
    steps, inside ``with denoiser.trajectory(num_steps=steps)``, with both halves of the guidance in one batch of which
    `conditional` is one half; the other may have a negative prompt. Or each calls it for the same streams in all steps,
    each call inside ``with denoiser.cache_context(name)``: then each stream has its own choices, without ASC, which
    needs both halves in one batch. They run side by side, each in a thread. `delta`
    bounds the loss of the model's output by `metric`: the mean relative absolute error, another of `metrics.METRICS`,
    or a function of two tensors. `strategies` are the candidates: a set is tried at each attention in ascending cost,
    in FLOPs for the sizes of the inputs; a sequence is tried in its order. `window` and `grid` are those of
    `WindowResidual`, for WA-RS. `scheduler` is only recorded in the plan. With a `path` the plan is saved there, and an
    interrupted search is continued if it has the same model, settings and inputs.

    Raises BadParameter, BadTrajectory if the model is called in another way, FunctionFailed, and the errors of
    `greedy`.
    """
    _check(strategies, window, grid, conditional)
    metric_of(metric)
    by_cost = isinstance(strategies, Set)
    strategies = tuple(sorted(strategies, key=STRATEGIES.index) if by_cost else strategies)
    lowering = Lowering.of(backend, partition="segments")
    known = strategies_of(window, conditional, grid)
    compiled = attach(
        twin(model), Backend(model, _candidates([known[choice] for choice in strategies], kinds), lowering)
    )
    samplings = [Sampling(compiled, sample, number) for number, sample in enumerate(trajectories)]
    runner = SegmentRunner(compiled, samplings, strategies)
    found_path = None if path is None else Path(path)
    if found_path is not None:
        check_writable(found_path)  # before the search, which takes long
    partial = None if found_path is None else partial_path(found_path)
    key = {"model": fingerprint(model), "scheduler": describe_scheduler(scheduler), "kinds": " ".join(kinds)}
    key |= {"window": str(window), "grid": str(grid), "conditional": str(conditional)}
    try:
        candidates = runner.open(kinds)
        candidates.check_grid(grid)
        orders = candidates.orders(by_cost)
        key |= {"inputs": runner.inputs()}
        streams = runner.open_streams() if steps > 1 else ()
        if streams and SHARED & set(strategies):
            allowed = f"None, and strategies without ASC: each step has calls of its own for {', '.join(streams)}"
            raise BadParameter("greedy_plan", "conditional", conditional, allowed)
        calls = max(1, len(streams))
        found = greedy(
            runner, runner.places, steps, delta, strategies, orders=orders, metric=metric, calls=calls, partial=partial,
            key=key | {"streams": " ".join(streams)}, progress=progress,
        )  # fmt: skip
    finally:
        runner.close()
    used = {choice for row in found.table for choice in row}
    plan = Plan(
        fingerprint(model),
        steps,
        describe_scheduler(scheduler),
        runner.places,
        tuple(sum(found.table[i : i + calls], ()) for i in range(0, steps * calls, calls)),
        delta,
        window if used & WINDOWED else None,
        conditional if used & SHARED else None,
        found.evaluations,
        found.share(len(strategies)),
        grid if used & WINDOWED else None,
        candidates.notes(kinds),
        metric_of(metric)[0],
        streams=streams,
    )
    predicted = predict([candidates.rewritten], {}, DiTFastAttn(plan), steps)
    if isinstance(predicted, Prediction):
        named = predicted.steps[1:] if streams else predicted.steps  # the first is that of streams without a name
        plan = replace(plan, attention=replace(predicted, steps=named).attention_shares)
    if found_path is not None:
        plan.save(found_path)
    return plan


def _check(strategies: Collection[Choice], window: Window | None, grid: object, conditional: object) -> None:
    """Raise BadParameter for invalid arguments, before anything is compiled."""
    if not all(isinstance(choice, Choice) and choice is not Choice.FULL for choice in strategies):
        raise BadParameter("greedy_plan", "strategies", strategies, "some Choice without Choice.FULL")
    if conditional is None and SHARED & set(strategies):
        raise BadParameter("greedy_plan", "conditional", None, '"first" or "second", or strategies without ASC')
    if conditional not in ("first", "second", None):
        raise BadParameter("greedy_plan", "conditional", conditional, '"first", "second" or None')
    if window is None and WINDOWED & set(strategies):
        raise BadParameter(
            "greedy_plan", "window", None, "a fraction or a tuple of tokens, or strategies without WA-RS"
        )
    check_window("greedy_plan", window, grid)


def _candidates(allowed: Sequence[Strategy | tuple[Strategy, ...]], kinds: tuple[str, ...]) -> Policy:
    """Return a policy that allows all candidates at every place. The search decides which of them runs."""
    return Policy(tuple(Rule(step_symbol > 0, do, Where(kinds)) for do in allowed), "candidates")


class SegmentRunner:
    """The runner of `greedy`: it runs compiled segments for several samplers side by side."""

    def __init__(self, compiled: RewrittenModule, samplings: Sequence[Sampling], strategies: Sequence[Choice]) -> None:
        self.compiled, self.samplers, self.strategies = compiled, Samplers(samplings), strategies
        self.work = 0.0
        self._ahead = 0  # rows of the first step that `replay` passes over
        self.states: list[State] = []
        self.row: list[Choice] = []
        self.places: tuple[str, ...] = ()
        self._waiting: list[Arrival] | None = None

    def open(self, kinds: Sequence[str]) -> Candidates:
        """Run all samplers up to their first call, which compiles the model, and return the candidates."""
        self._waiting = self.samplers.next()
        rewritten = self.compiled._backend.rewritten[self._waiting[0].graph.index]
        if not rewritten.captured.complete:
            raise SearchOverGraphs
        candidates = Candidates(rewritten, self.strategies)
        self.places = candidates.places
        if not self.places:
            self._refuse_graph(rewritten.found, kinds)
        numbers = {place: i for i, place in enumerate(self.places)}
        self._sites = [(numbers[site.place], site.part) for site in candidates.sites]
        depends = rewritten.partition.depends
        self._first = [
            next(p for p, own in enumerate(depends) if any(self._sites[s][0] == i for s in own))
            for i in range(len(self.places))
        ]
        return candidates

    def _refuse_graph(self, found: Found, kinds: Sequence[str]) -> None:
        """Raise the error for a first graph with nothing to search. Another graph of the same call may follow it."""
        if found.sites:
            has = dict.fromkeys(str(site.kind) for site in found.sites)
            raise BadParameter("greedy_plan", "kinds", kinds, f"kinds of the model's branches: {', '.join(has)}")
        self._sites, self._first = [], []
        self._run(())
        self.samplers.next()
        raise NoSites(type(self.compiled).__name__, [f"{p.path or p.node}: {p.reason}" for p in found.refused])

    def open_streams(self) -> tuple[str, ...]:
        """Run the first step, which is not compressed, and return the names of its streams, or () if it is one call.
        `replay` then passes over its rows."""
        waiting = self._arrivals()
        while waiting[0].call.trajectory.step == 0:
            self._waiting = waiting
            self._run([Choice.FULL] * len(self.places))
            waiting = self.samplers.next()
        self._waiting, self._ahead, self.work = waiting, self.samplers.done, 0.0
        return self.samplers.streams if self.samplers.done > 1 else ()

    def inputs(self) -> str:
        """Return the digest of the inputs of the samplers' first calls."""
        return digest(self._waiting or ())

    def close(self) -> None:
        """End the samplers."""
        self.samplers.close()

    def _arrivals(self) -> list[Arrival]:
        """Return the next call of every sampler."""
        arrivals = self._waiting if self._waiting is not None else self.samplers.next()
        self._waiting = None
        return arrivals

    def replay(self, row: PlanRow) -> None:
        """Run the next call with these choices."""
        if self._ahead:
            self._ahead, self.work = self._ahead - 1, self.work + 1
        else:
            self._run(row)

    def _run(self, row: Sequence[Choice]) -> None:
        self.begin(self.samplers.done)
        self.row = list(row)
        self.finish()

    def begin(self, number: int) -> None:
        self.states = [State(arrival) for arrival in self._arrivals()]
        self.row = [Choice.FULL] * len(self.places)

    def reference(self) -> list[Tensor]:
        return self._outputs([Choice.FULL] * len(self.places))

    def attempt(self, index: int, choice: Choice) -> list[Tensor]:
        row = [*self.row[:index], choice, *[Choice.FULL] * (len(self.row) - index - 1)]
        return self._outputs(row)

    def fix(self, index: int, choice: Choice) -> None:
        self.row[index] = choice
        until = self._first[index + 1] if index + 1 < len(self.places) else self._first[index]
        self._advance(until)

    def finish(self) -> None:
        self._advance(len(self.states[0].graph.segments))
        decided = self._decisions()
        self.samplers.answer(decided, [state.finish(decided) for state in self.states])

    def _advance(self, until: int) -> None:
        for state in self.states:
            self.work += state.advance(until, self._decide(self.row)) / len(self.states)

    def _outputs(self, row: Sequence[Choice]) -> list[Tensor]:
        outputs = []
        for state in self.states:
            output, share = state.outputs(self._decide(row))
            outputs.append(output)
            self.work += share / len(self.states)
        return outputs

    def _decide(self, row: Sequence[Choice]) -> Callable[[int], bool]:
        """Return a function of a site's index that says whether the site is reused under a row of choices."""
        return lambda site: self._sites[site][1] in REPLACED[row[self._sites[site][0]]]

    def _decisions(self) -> Decisions:
        decide = self._decide(self.row)
        row = tuple(map(decide, range(len(self._sites))))
        return Decisions(row, tuple(DecisionReason.RULE if reused else DecisionReason.NO_RULE for reused in row), ())
