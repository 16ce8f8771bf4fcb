"""The error that reusing one site at one step causes in the final image, measured by running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.analysis.analyze import components, probed
from dit_rewrite.analysis.result import ReuseErrors
from dit_rewrite.analysis.sampling import Sample, blamed, image_of, replay, sampler
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.errors import BadArgument, DecisionReason
from dit_rewrite.guards import step as step_symbol
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.proof.callers import calling
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.runtime.cache import Cache
from dit_rewrite.runtime.decide import Decisions
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.runtime.session import Call


def reuse_errors(
    model: Any,
    sample: Sample,
    prompts: Sequence[Any] | None = None,
    *,
    steps: int | None = None,
    at: Collection[int] | None = None,
    sites: Collection[str] | None = None,
    backend: InnerBackend = "inductor",
    progress: Callable[[str, int], object] | None = None,
) -> ReuseErrors:
    """Run the sampler once for each branch and step, and reuse that branch's value of the step before there alone.

    `model`, `sample`, `prompts` and `steps` are as in `analyze`; sampling must return the final image or latent. `at`
    are the steps to try, by default all but the first; `sites` the names of the sites, by default all branches. In a
    model with several streams, the site is reused in each of them. The result belongs into `Analysis.errors`.

    Raises BadArgument for unknown sites or steps, NoImage, FunctionFailed, NotAModule or NoTransformer.
    """
    components(model)  # raises if it is neither a module nor a pipeline
    run, given = sampler("reuse_errors", model, sample, prompts, steps)
    if run is replay:
        raise BadArgument("reuse_errors", "sample", "recorded calls", "a function, as reuse must change later inputs")

    def sampled(ours: Any, prompt: Any) -> Any:
        reuse = "nothing" if director.chosen is None else "{} at step {}".format(*director.chosen)
        with calling(blamed(model, sample), f"for the prompt {prompt!r:.60}, reusing {reuse}"):
            return run(ours, prompt)

    lowering = Lowering.of(backend, partition="segments")
    policy = Policy((Rule(step_symbol > 0),), "reuse one site")
    director = _Director()

    def make(denoiser: nn.Module, prefix: str) -> Backend:
        made = Backend(denoiser, policy, lowering)
        made.session.director = director
        director.prefixes[id(made.session)] = prefix
        return made

    totals: dict[tuple[str, int], list[float]] = {}
    with probed(model, make) as (ours, _), torch.no_grad():
        for prompt in given:
            director.chosen = None
            image = image_of(sampled(ours, prompt)).clone()
            names = _sites(director.names, sites)
            last = director.last_step
            for step in at or ():
                if not 1 <= step <= last:
                    raise BadArgument(
                        "reuse_errors", "at", step, f"steps from 1 to {last}: step 0 has nothing to reuse"
                    )
            for site in names:
                for step in range(1, last + 1) if at is None else at:
                    director.chosen = site, step
                    totals.setdefault((site, step), []).append(relative_l2(image_of(sampled(ours, prompt)), image))
                    if progress is not None:
                        progress(site, step)
    return ReuseErrors(names, _table(names, last + 1, totals), len(given))


def _sites(known: dict[str, None], wanted: Collection[str] | None) -> list[str]:
    for site in wanted or ():
        if site not in known:
            raise BadArgument("reuse_errors", "sites", site, f"sites of the model: {', '.join(known)}")
    return [site for site in known if wanted is None or site in wanted]


def _table(names: Sequence[str], steps: int, totals: dict[tuple[str, int], list[float]]) -> Tensor:
    values = torch.full((len(names), steps), math.nan, dtype=torch.float64)
    for (site, step), found in totals.items():
        if step < steps:
            values[names.index(site), step] = sum(found) / len(found)
    return values


class _Director:
    """Decides each call of a graph: everything is computed, but for one site at one step. It also learns the names of
    the sites and the number of steps."""

    def __init__(self) -> None:
        self.chosen: tuple[str, int] | None = None
        self.names: dict[str, None] = {}
        self.prefixes: dict[int, str] = {}
        self.last_step = 0

    def __call__(
        self, graph: CompiledGraph, args: list[Any], call: Call, cache: Cache
    ) -> tuple[Decisions, Sequence[Any]]:
        step, wires = call.trajectory.step, graph.start(args)
        names = self._named(graph, call)
        self.names.update(dict.fromkeys(names))
        self.last_step = max(self.last_step, step)
        row = tuple((name, step) == self.chosen and cache.values[i] is not None for i, name in enumerate(names))
        fresh: list[Any] = []
        for number in range(len(graph.segments)):
            fresh += graph.run_segment(number, row.__getitem__, args, wires, cache)
        reasons = tuple(DecisionReason.RULE if reused else DecisionReason.NO_RULE for reused in row)
        decided = Decisions(row, reasons, ())
        graph.commit(fresh, cache, call.moment, decided)
        return decided, graph.results(wires)

    def _named(self, graph: CompiledGraph, call: Call) -> list[str]:
        """Return the names of the sites, which tell the occurrences of a graph apart as those of an analysis do."""
        occurrence, prefix = call.graphs.count(graph.index) - 1, self.prefixes.get(id(graph.session), "")
        return [f"{prefix}{name}" + (f"@{occurrence}" if occurrence else "") for name in graph.names]
