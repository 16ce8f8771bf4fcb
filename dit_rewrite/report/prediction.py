"""Predict FLOPs, counts and times of a policy over a trajectory, before it runs.

The passes run again over the captured graph, for the policy and the number of steps in question; nothing is compiled.
Each distinct row of decisions gives a straight-line graph, whose FLOPs are counted and whose time the roofline gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.foresee import Foreseen
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.compiler.pipeline import PASSES
from dit_rewrite.compiler.request import Level, Request, num_foreseen
from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.compiler.roofline import Roofline
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import PredictionReason
from dit_rewrite.passes.analysis.graph import is_contraction
from dit_rewrite.passes.analysis.site import Found, Kind, Part, Site
from dit_rewrite.passes.analysis.work import Work, kernels
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.guards.symbols import measured, reads_noise
from dit_rewrite.passes.pipeline import Context, PassRun, run_passes
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.hoist import Hoisted
from dit_rewrite.passes.rewrite.segments import whole
from dit_rewrite.passes.rewrite.specialise import specialise
from dit_rewrite.passes.rewrite.step_tables import StepTables
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.strategies import BlockwiseReuse
from dit_rewrite.runtime.schedule import Schedule

ATTENTION = frozenset({Kind.SELF, Kind.CROSS, Kind.JOINT})


@dataclass(frozen=True)
class StepCost:
    """The cost of one call of the model. ``recomputed`` counts the branches that compute, by kind."""

    flops: int
    attention_flops: int
    works: tuple[Work, ...]
    recomputed: Mapping[Kind, int]

    @classmethod
    def sum(cls, costs: Sequence[StepCost]) -> StepCost:
        counts = sum((Counter(cost.recomputed) for cost in costs), Counter[Kind]())
        works = tuple(work for cost in costs for work in cost.works)
        return cls(sum(c.flops for c in costs), sum(c.attention_flops for c in costs), works, counts)


@dataclass(frozen=True)
class Prediction:
    """The predicted costs of a trajectory. ``plain`` is a call of the model without this package, ``steps`` has the
    calls of each stream, ``hoisted`` is computed once. Without a roofline there are no times."""

    num_steps: int
    plain: StepCost
    steps: tuple[tuple[StepCost, ...], ...]
    hoisted: StepCost
    roofline: Roofline | None = None

    @property
    def _calls(self) -> Iterator[StepCost]:
        return (call for stream in self.steps for call in stream)

    @property
    def flops(self) -> int:
        """The FLOPs of all calls."""
        return len(self.steps) * self.hoisted.flops + sum(call.flops for call in self._calls)

    @property
    def plain_flops(self) -> int:
        """The FLOPs of all calls of the model without this package."""
        return len(self.steps) * self.num_steps * self.plain.flops

    @property
    def attention_share(self) -> float:
        """The FLOPs of attention, its projections included, as a fraction of those without this package.

        DiTFastAttn calls this attention FLOPs. A branch that has attention and MLP in one projection counts with its
        attention op alone.
        """
        attention = len(self.steps) * self.hoisted.attention_flops + sum(call.attention_flops for call in self._calls)
        return attention / max(len(self.steps) * self.num_steps * self.plain.attention_flops, 1)

    @property
    def attention_shares(self) -> tuple[float, ...]:
        """The same for each step, over all streams; values that are computed once per trajectory count at step 0."""
        plain = max(len(self.steps) * self.plain.attention_flops, 1)
        spent = [sum(call.attention_flops for call in calls) for calls in zip(*self.steps, strict=True)]
        hoisted = len(self.steps) * self.hoisted.attention_flops
        return tuple((flops + (hoisted if step == 0 else 0)) / plain for step, flops in enumerate(spent))

    @property
    def counts(self) -> dict[Kind, tuple[int, int]]:
        """By kind, how many branches compute over the steps of a stream, and how many there are (FORA's table 3)."""
        computed = sum((Counter(call.recomputed) for call in self._calls), Counter[Kind]())
        streams = len(self.steps)
        return {k: (computed[k] // streams, n * self.num_steps) for k, n in self.plain.recomputed.items()}

    @property
    def recomputed_fraction(self) -> float:
        """The fraction of the branches that compute: Recomp% of FORA, as a fraction of 1."""
        pairs = self.counts.values()
        return sum(computed for computed, _ in pairs) / max(sum(total for _, total in pairs), 1)

    @cached_property
    def step_seconds(self) -> tuple[tuple[float, ...], ...]:
        """The seconds of each call, by stream."""
        return tuple(tuple(self._seconds(call) for call in stream) for stream in self.steps)

    @cached_property
    def plain_seconds(self) -> float:
        """The seconds of a call of the model without this package."""
        return self._seconds(self.plain)

    @property
    def speedup(self) -> float:
        """The predicted speed-up of the trajectory: by times if there is a roofline, else by FLOPs."""
        if self.roofline is None:
            return self.plain_flops / max(self.flops, 1)
        hoisted = len(self.steps) * self._seconds(self.hoisted)
        return len(self.steps) * self.num_steps * self.plain_seconds / (hoisted + sum(map(sum, self.step_seconds)))

    def _seconds(self, call: StepCost) -> float:
        assert self.roofline is not None, "times need a roofline"
        return self.roofline.total(call.works)


def predict_model(
    backend: Backend, model: nn.Module, policy: Policy, num_steps: int | None = None, scheduler: Any = None
) -> Prediction | PredictionReason:
    """Predict the costs of a policy for the captured graphs of a rewritten model; the policy may be another one.

    The streams are those that the rules name, or as many as the last trajectory had. The number of steps is
    `num_steps`, or that of `scheduler`, that of the policy's plan, or that of the trajectory in which the model was
    captured.
    """
    known: Request = backend.rewritten[-1].context[Request]
    steps, levels = known.num_steps, list(known.levels)
    if scheduler is not None:
        steps, levels = noise_of(scheduler)
    steps = num_steps or (policy.made_for.steps if policy.made_for is not None else steps)
    levels = levels if len(levels) == steps else []
    reason = unforeseeable(policy, steps, levels)
    if reason is not None:
        return reason
    found = predict(backend.rewritten, Counter(backend.session.ran), policy, steps, levels, roofline_of(model))
    if isinstance(found, Prediction) and len(found.steps) == 1:  # the rules name no stream: all decide alike
        return replace(found, steps=found.steps * max(backend.session.num_streams, 1))
    return found


def predict(
    rewritten: Sequence[Rewritten],
    occurrences: Mapping[int, int],
    policy: Policy,
    num_steps: int | None,
    levels: Sequence[Level] = (),
    roofline: Roofline | None = None,
) -> Prediction | PredictionReason:
    """Predict a policy for captured graphs, or return why its decisions cannot be foreseen.

    `occurrences` is how often each graph runs in a call. `levels` has sigma and SNR of each step.
    """
    reason = unforeseeable(policy, num_steps, levels)
    if reason is not None or num_steps is None:
        return reason or PredictionReason.TOTAL_UNKNOWN
    graphs = [
        graph
        for i, each in enumerate(rewritten)
        if (graph := _Graph(each, policy, _request(each, num_steps, levels)))
        for _ in range(occurrences.get(i, 0) or 1)
    ]
    steps = zip(*(graph.rows() for graph in graphs), strict=True)
    calls = [StepCost.sum(costs) for costs in steps]
    by_stream = tuple(tuple(calls[i : i + num_steps]) for i in range(0, len(calls), num_steps))
    plain, hoisted = (StepCost.sum([getattr(graph, name) for graph in graphs]) for name in ("plain", "hoisted"))
    return Prediction(num_steps, plain, by_stream, hoisted, roofline)


def unforeseeable(policy: Policy, num_steps: int | None, levels: Sequence[Level]) -> PredictionReason | None:
    """Return why the decisions of a policy cannot be foreseen, or None if they can."""
    if num_steps is None:
        return PredictionReason.TOTAL_UNKNOWN
    if measured(policy.mentions):
        return PredictionReason.MEASURES
    if any(isinstance(do, BlockwiseReuse) for rule in policy.rules for do in rule.strategies):
        return PredictionReason.BLOCKWISE
    if reads_noise(policy.reads) and all(level == (None, None) for level in levels):
        return PredictionReason.NOISE_UNKNOWN
    return None


def _request(rewritten: Rewritten, num_steps: int, levels: Sequence[Level]) -> Request:
    known: Request = rewritten.context[Request]
    unknown: Level = (None, None)
    padded = (*levels, *[unknown] * num_foreseen(num_steps))[: num_foreseen(num_steps)]
    return replace(known, num_steps=num_steps, levels=padded, force=False)


class _Graph:
    """A captured graph under a policy: the cost of each row of decisions."""

    def __init__(self, rewritten: Rewritten, policy: Policy, request: Request) -> None:
        captured = rewritten.captured
        ctx = Context(captured, policy, request, rewritten.context[Lowering])
        runs: list[PassRun] = []
        disabled = () if request.hoist else ("hoist",)
        run_passes(PASSES, captured.gm, ctx, runs, disabled)
        self.guarded, self.rows_foreseen = ctx[GuardedGraph], ctx[Foreseen].rows
        self.names = [node.name for node in self.guarded.source.graph.nodes]
        self._sites, self._tables = ctx[Bound].found.sites, ctx.get(StepTables)
        self._costs: dict[DecisionRow, StepCost] = {}
        found = ctx[Found].sites
        self.plain = _cost([(node.name, node, work) for node, work in kernels(captured.gm.graph)], found)
        prologue = ctx.get(Hoisted)
        hoisted = () if prologue is None else kernels(prologue.prologue.graph)
        before = _cost([(node.name, node, work) for node, work in hoisted], found)
        self.hoisted = StepCost(before.flops, before.attention_flops, before.works, {})

    def rows(self) -> Iterator[StepCost]:
        """Yield the cost of each foreseen call: all steps of a stream, then those of the next."""
        return map(self._row, self.rows_foreseen)

    def _row(self, row: DecisionRow) -> StepCost:
        if row not in self._costs:
            segments = whole(self.guarded.source, self.guarded.sites)
            variant = specialise(self.guarded, row, segments, tables=self._tables)
            work = [(self._home(node), node, work) for node, work in kernels(variant.gm.graph)]
            self._costs[row] = _cost(work, self._sites)
        return self._costs[row]

    def _home(self, node: fx.Node) -> str:
        """Return the name of the captured node that a node of a variant was copied from or added for."""
        return self.names[int(node.meta.get("home", node.meta["position"]))]


def _cost(found: Collection[tuple[str, fx.Node, Work]], sites: Sequence[Site]) -> StepCost:
    """Return the cost of kernels, each with the name of its node in the captured graph."""
    branches = [site for site in sites if site.part is Part.BRANCH]
    attention = frozenset[str]().union(*(site.skipped for site in branches if site.kind in ATTENTION))
    products = [(name, node, work) for name, node, work in found if is_contraction(node)]
    computed = {name for name, _, _ in products}
    counts = Counter(site.kind for site in branches if not computed.isdisjoint(site.skipped))
    inside = (w.flops for name, n, w in products if name in attention or n.target is opaque_attention.OP)
    return StepCost(sum(work.flops for *_, work in products), sum(inside), tuple(work for *_, work in found), counts)


def noise_of(scheduler: Any) -> tuple[int, list[Level]]:
    """Return the number of steps of a scheduler whose timesteps are set, and the noise of each."""
    schedule = Schedule(scheduler, noise=True)
    steps, levels = schedule.num_steps, schedule.levels
    unknown: Level = (None, None)
    return steps, [unknown if levels is None else levels.at(schedule.entry_at(step)) for step in range(steps)]


def roofline_of(model: nn.Module | None) -> Roofline:
    """Return the roofline for the device and the dtype of most of a model's weights."""
    weights = [] if model is None else [p for p in model.parameters() if p.is_floating_point()]
    if not weights:
        return Roofline.of(torch.device("cpu"), torch.float32)
    dtypes = Counter[torch.dtype]()
    for weight in weights:
        dtypes[weight.dtype] += weight.numel()
    return Roofline.of(weights[0].device, dtypes.most_common(1)[0][0])
