"""Runs of a sampler under many tables of weights, with one compilation: the trials of `autopolicy`."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.errors import NothingRecorded, NotImages
from dit_rewrite.guards import step
from dit_rewrite.module import attach, twin
from dit_rewrite.passes.analysis import cost
from dit_rewrite.policy.fitted import Fitted
from dit_rewrite.policy.plan import describe_scheduler
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.callers import calling
from dit_rewrite.runtime.session import Observation

Place = Literal["output", "stack", "branches"]
Sample = Callable[[Any, int], Tensor]  # (denoiser, seed) -> images
WHERE: dict[Place, Where] = {"output": Where(span="output"), "stack": Where(span="stack"), "branches": Where()}
DEPTH = 4  # computed values that a forecast may read


def images_of(sample: Sample, model: Any, seed: int, policy: object = None) -> Tensor:
    """Run a sampler; errors name `policy`. Raises NotImages unless it returns a tensor, and FunctionFailed."""
    run = f"with seed {seed}" if policy is None else f"with seed {seed} under {policy}"
    with torch.no_grad(), calling(sample, run):
        images = sample(model, seed)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise NotImages(type(images).__name__)
    return images.detach().float().cpu()


class Steered:
    """A basis whose table can be exchanged between runs. Without one every step computes."""

    def __init__(self) -> None:
        self.table: Fitted | None = None

    def history(self, order: int) -> int:
        return DEPTH

    def weights(self, places: Sequence[float], place: float, order: int) -> list[float]:
        if self.table is None:
            raise ValueError("every step computes")
        return self.table.weights(places, place, order)


@dataclass
class Trial:
    """A run: its images, its FLOPs over those of a run that computes everything, its seconds and calls of the model."""

    images: Tensor
    flops: float
    seconds: float
    calls: int


class Trials:
    """Runs of one sampler in which a place of the model is forecast by tables of weights."""

    def __init__(self, model: nn.Module, sample: Sample, place: Place, backend: InnerBackend) -> None:
        self.sample, self.place = sample, place
        self._steered = Steered()
        rule = Rule(step > 0, Forecast(DEPTH - 1, self._steered, DEPTH), WHERE[place])
        self._backend = Backend(model, Policy((rule,), f"forecasts of {place}"), Lowering.of(backend))
        self.model = attach(twin(model), self._backend)
        self._rows: dict[tuple[int, tuple[bool, ...]], int] = defaultdict(int)
        self._flops: dict[tuple[int, tuple[bool, ...]], int] = {}
        self.scheduler: str | None = None
        self._slots = self._others = 0  # bytes: of the slots with DEPTH values, and of all other stored tensors
        self._values: dict[Hashable, list[tuple[Tensor, ...]]] | None = None
        self._backend.session.observer = self._see

    def run(self, table: Fitted | None, seed: int) -> Trial:
        """Run the sampler with a table of weights, or with every step computed."""
        self._steered.table = table
        for rewritten in self._backend.rewritten:
            rewritten.graph.forget_decisions()
        self._rows.clear()
        began, calls = time.perf_counter(), self._backend.stats.calls
        images = images_of(self.sample, self.model, seed, None if table is None else self._backend.policy)
        seconds = time.perf_counter() - began
        return Trial(images, self._share(), seconds, self._backend.stats.calls - calls)

    def record(self, seed: int) -> tuple[Tensor, Trial]:
        """Run with every step computed. Returns the Gram matrix of the place's values over the steps, and the run.

        Each tensor of each site and stream is weighed by its mean square, so that all have equal weight. Raises
        NothingRecorded if the place has no value, or streams were called at different numbers of steps.
        """
        self._values = defaultdict(list)
        trial = self.run(None, seed)
        values, self._values = self._values, None
        self._count_bytes()
        counts = {len(steps) for steps in values.values()}
        if len(counts) != 1 or min(counts) < 3:
            raise NothingRecorded(self.place, " and ".join(map(str, sorted(counts))) or "0")
        grams = [_gram([step[k] for step in steps]) for steps in values.values() for k in range(len(steps[0]))]
        return torch.stack(grams).mean(0), trial

    def _count_bytes(self) -> None:
        session = self._backend.session
        runs, streams = Counter(session.ran), max(session.num_streams, 1)
        graphs = [(each, streams * (runs[i] or 1)) for i, each in enumerate(self._backend.rewritten)]
        self._slots = sum(times * sum(graph.slot_bytes.values()) for graph, times in graphs)
        self._others = sum(times * graph.stored_bytes for graph, times in graphs) - self._slots

    def cache_bytes(self, depth: int) -> int:
        """Return the predicted bytes of the caches with `depth` values per site, over all streams: those in the slots,
        and the values that are computed once per trajectory."""
        return self._slots * depth // DEPTH + self._others

    def _see(self, observation: Observation) -> None:
        record = observation.record
        self._rows[observation.graph, record.row] += 1
        session = self._backend.session
        if session.explicit is not None:
            scheduler = session.explicit.clock.scheduler
            self.scheduler = None if scheduler is None else describe_scheduler(scheduler)
        if self._values is None:
            return
        sites = self._backend.rewritten[observation.graph].graph.sites
        pairs = zip(sites, observation.slots, strict=True)
        newest = [tensor for site, slot in pairs for tensor in (slot or ())[: site.width]]
        self._note((record.stream, record.graph, record.occurrence), record.step, tuple(newest))

    def _note(self, key: Hashable, at: int, values: tuple[Tensor, ...]) -> None:
        """Keep the first values of each step; a solver may call twice at one."""
        assert self._values is not None
        if values and len(self._values[key]) == at:
            self._values[key].append(values)

    def _share(self) -> float:
        """Return the FLOPs of the last run over those of a run that computes everything."""
        whole = sum(n * self._cost(graph, (False,) * len(row)) for (graph, row), n in self._rows.items())
        return sum(n * self._cost(graph, row) for (graph, row), n in self._rows.items()) / whole

    def _cost(self, graph: int, row: tuple[bool, ...]) -> int:
        if (graph, row) not in self._flops:
            self._flops[graph, row] = cost.total_flops(self._backend.rewritten[graph].straight(row).gm.graph)
        return self._flops[graph, row]


def _gram(values: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the values of all steps, over their mean square."""
    flat = torch.stack([value.detach().flatten().float().cpu() for value in values])
    gram = (flat @ flat.T).double()
    return gram / gram.diagonal().mean().clamp_min(1e-30)
