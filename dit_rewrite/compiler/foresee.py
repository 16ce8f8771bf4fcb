"""Foresee the decisions of a trajectory, as far as they are known before it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.request import Request, num_foreseen
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.kernels.blockwise_attention import State
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.passes.guards.symbols import measured
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.site_rules import SiteRules, forced
from dit_rewrite.policy.strategies import BlockwiseReuse, GuidanceDelta, ShareGuidance
from dit_rewrite.runtime.decide import NO_SLOT, Choose, Decider, SiteSpec
from dit_rewrite.runtime.history import NEVER, Computed, Moment
from dit_rewrite.runtime.measure import ForecastError
from dit_rewrite.runtime.slots import Transition, after, transition

ANSWERS = (None, 0.0, 1e6)  # simulated measurements: unknown, no change, a large change

Noise = Callable[[int], tuple[float | None, float | None]]


def unknown_noise(step: int) -> tuple[None, None]:
    """The noise of a trajectory without a scheduler: sigma and SNR are unknown."""
    return None, None


@dataclass(frozen=True)
class Foreseen:
    """``specs`` describes the guarded sites to dispatch; ``rows`` has the decisions of each foreseen step."""

    specs: tuple[SiteSpec, ...]
    rows: tuple[DecisionRow, ...]

    def describe(self) -> Iterator[str]:
        """Yield each distinct row as letters (C for compute, R for reuse), with its number of foreseen steps."""
        for row in dict.fromkeys(self.rows):
            yield f"{self.rows.count(row):5d}  {''.join('R' if reused else 'C' for reused in row)}"


def run(gm: fx.GraphModule, ctx: Context) -> Foreseen:
    """The pass: simulate the decisions of the policy on the guarded sites."""
    bound, guarded, policy, request = ctx[Bound], ctx[GuardedGraph], ctx[Policy], ctx[Request]
    rules = [bound.rules[label.site] for label in bound.labels]
    specs = tuple(
        replace(_spec(guarded, k, each, request.force), errors=_errors(k, rules)) for k, each in enumerate(rules)
    )
    measures = bool(measured(policy.mentions))
    return Foreseen(
        specs, tuple(simulate(specs, request.num_steps, request.levels.__getitem__, policy.streams, measures))
    )


def _errors(index: int, rules: Sequence[SiteRules]) -> dict[str, ForecastError]:
    """Return, for each symbol of a site's guard that is a forecast error, the sites whose error it is."""
    verified = tuple(i for i, each in enumerate(rules) if each.verifies)
    asked = {error: (index,) if error.probe == "self" else verified for error in rules[index].errors}
    return {error.name: ForecastError(sites, error.elementwise) for error, sites in asked.items()}


def _spec(guarded: GuardedGraph, index: int, rules: SiteRules, force: bool) -> SiteSpec:
    """Return the description of a guarded site for dispatch."""
    site = guarded.sites[index]
    choose: Choose = forced if force else rules.chooser()
    entropy = None if site.entropy is None else guarded.widths[index] - 1
    parent, reads, serves = guarded.parents[index], None, None
    borrows = rules.slot_format.stream if isinstance(rules.slot_format, ShareGuidance | GuidanceDelta) else None
    do = rules.slot_format
    blockwise = do if isinstance(do, BlockwiseReuse) and site.part is Part.CORE else None
    if site.part is Part.CORE:
        reads = guarded.parents.index(index)
    elif site.part is Part.CFG_SHARED and borrows is None:
        reads = NO_SLOT
    elif site.part is Part.CORE_STATE and not force:
        serves = parent
    return SiteSpec(
        site.name,
        site.kind,
        site.layer,
        parent,
        choose,
        foretell=None if rules.forecast is None else rules.forecast.weights,
        entropy=entropy,
        reads=reads,
        serves=serves,
        foreseen=rules.foreseen,
        borrows=borrows,
        width=guarded.widths[index],
        depth=guarded.depths[index],
        differs=isinstance(rules.slot_format, GuidanceDelta) and borrows is not None,
        counters=State._fields.index("counters") if blockwise is not None else None,
        certificate=State._fields.index("error") if blockwise is not None and blockwise.certify else None,
    )


def simulate(
    specs: Sequence[SiteSpec],
    num_steps: int | None,
    noise: Noise = unknown_noise,
    streams: Collection[str] = (),
    measures: bool = False,
) -> list[DecisionRow]:
    """Return the rows of a trajectory without misses, once for each stream that rules name and once for any other.

    `noise` returns sigma and SNR of a step. Without `num_steps`, the first steps of a long trajectory are simulated. If
    guards measure (`measures`), the decisions are not known; the rows are those of constant measurements (`ANSWERS`).
    """
    answers = ANSWERS if measures else (None,)
    plans = itertools.product((None, *sorted(streams)), answers)
    return [row for stream, answer in plans for row in _rows(specs, num_steps, noise, stream, answer)]


def _rows(
    specs: Sequence[SiteSpec], num_steps: int | None, noise: Noise, stream: str | None, answer: float | None
) -> list[DecisionRow]:
    past, streak, holds = [NEVER] * len(specs), [0] * len(specs), [False] * len(specs)
    rows = []
    for step in range(num_foreseen(num_steps)):
        sigma, snr = noise(step)
        moment, now = Moment(step, num_steps, sigma=sigma, snr=snr, stream=stream), Computed(step, sigma, snr)
        decided = Decider(specs, moment, past, streak, holds, measure=lambda _, __: answer).decisions()
        rows.append(decided.row)
        for i, spec in enumerate(specs):
            change = transition(decided.row[i], decided.reasons[i])
            past[i], streak[i] = after(change, past[i], streak[i], now, spec.depth)
            holds[i] = change is Transition.FILL or (holds[i] and change is not Transition.EMPTY)
    return rows
