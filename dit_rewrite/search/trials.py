"""Runs of a sampler under many tables of weights, with one compilation: the trials of `autopolicy`."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from dit_rewrite.search.denoisers import mapped

Place = Literal["output", "stack", "branches"]
Sample = Callable[[Any, int], Tensor]  # (denoiser, seed) -> images
Row = tuple[str, int, tuple[bool, ...]]  # a denoiser, a graph, and its decisions
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
    """Runs of one sampler in which a place of the model is forecast by tables of weights.

    Several denoisers of a pipeline (`denoisers`) forecast by one table, each from its own values. ``begins`` has the
    steps at which they ran first, 0 among them.
    """

    def __init__(self, model: nn.Module, sample: Sample, place: Place, backend: InnerBackend) -> None:
        self.sample, self.place = sample, place
        self._steered = Steered()
        rule = Rule(step > 0, Forecast(DEPTH - 1, self._steered, DEPTH), WHERE[place])
        self._policy = Policy((rule,), f"forecasts of {place}")
        self._backends: dict[str, Backend] = {}

        def make(name: str, part: nn.Module) -> nn.Module:
            own = self._backends[name] = Backend(part, self._policy, Lowering.of(backend))
            own.session.observer = partial(self._see, name)
            return attach(twin(part), own)

        self.model = mapped(model, make)
        self.begins: tuple[int, ...] = (0,)
        self.scheduler: str | None = None
        self._rows: dict[Row, int] = defaultdict(int)
        self._flops: dict[Row, int] = {}
        self._slots = self._others = 0  # bytes: of the slots with DEPTH values, and of all other stored tensors
        self._firsts: dict[str, int] = {}  # the step of the first value of each denoiser
        self._values: dict[tuple[str, Hashable], list[tuple[Tensor, ...]]] | None = None

    def run(self, table: Fitted | None, seed: int) -> Trial:
        """Run the sampler with a table of weights, or with every step computed."""
        self._steered.table = table
        for backend in self._backends.values():
            for rewritten in backend.rewritten:
                rewritten.graph.forget_decisions()
        self._rows.clear()
        began, calls = time.perf_counter(), self._calls()
        images = images_of(self.sample, self.model, seed, None if table is None else self._policy)
        seconds = time.perf_counter() - began
        return Trial(images, self._share(), seconds, self._calls() - calls)

    def _calls(self) -> int:
        return sum(backend.stats.calls for backend in self._backends.values())

    def record(self, seed: int) -> tuple[Tensor, Trial]:
        """Run with every step computed. Returns the Gram matrix of the place's values over the steps, and the run.

        Each tensor of each site and stream is weighed by its mean square, so that all have equal weight. Values of
        different denoisers have no inner product, and no forecast needs one. Raises NothingRecorded if the place has no
        value at some step, or streams were called at different numbers of steps.
        """
        self._values, self._firsts = defaultdict(list), {}
        trial = self.run(None, seed)
        values, self._values = self._values, None
        self._count_bytes()
        lengths = {(name, len(steps)) for (name, _), steps in values.items()}
        ran = {first + i for name, first in self._firsts.items() for i in range(dict(lengths)[name])}
        if len(lengths) != len(self._firsts) or len(ran) < 3 or ran != set(range(len(ran))):
            raise NothingRecorded(self.place, " and ".join(str(count) for _, count in sorted(lengths)) or "0")
        self.begins = tuple(sorted({0, *self._firsts.values()}))
        return _joined([(self._firsts[name], _mean_gram(values, name)) for name in self._firsts]), trial

    def _count_bytes(self) -> None:
        self._slots = self._others = 0
        for backend in self._backends.values():
            session = backend.session
            runs, streams = Counter(session.ran), max(session.num_streams, 1)
            graphs = [(each, streams * (runs[i] or 1)) for i, each in enumerate(backend.rewritten)]
            slots = sum(times * sum(graph.slot_bytes.values()) for graph, times in graphs)
            self._slots += slots
            self._others += sum(times * graph.stored_bytes for graph, times in graphs) - slots

    def cache_bytes(self, depth: int) -> int:
        """Return the predicted bytes of the caches with `depth` values per site, over all streams: those in the slots,
        and the values that are computed once per trajectory."""
        return self._slots * depth // DEPTH + self._others

    def _see(self, name: str, observation: Observation) -> None:
        record, backend = observation.record, self._backends[name]
        self._rows[name, observation.graph, record.row] += 1
        session = backend.session
        if session.explicit is not None:
            scheduler = session.explicit.clock.scheduler
            self.scheduler = None if scheduler is None else describe_scheduler(scheduler)
        if self._values is None:
            return
        sites = backend.rewritten[observation.graph].graph.sites
        pairs = zip(sites, observation.slots, strict=True)
        newest = [tensor for site, slot in pairs for tensor in (slot or ())[: site.width]]
        self._note(name, (record.stream, record.graph, record.occurrence), record.step, tuple(newest))

    def _note(self, name: str, key: Hashable, at: int, values: tuple[Tensor, ...]) -> None:
        """Keep the first values of each step; a solver may call twice at one."""
        assert self._values is not None
        if values and len(self._values[name, key]) == at - self._firsts.setdefault(name, at):
            self._values[name, key].append(values)

    def _share(self) -> float:
        """Return the FLOPs of the last run over those of a run that computes everything."""
        whole = sum(n * self._cost(name, graph, (False,) * len(row)) for (name, graph, row), n in self._rows.items())
        return sum(n * self._cost(*row) for row, n in self._rows.items()) / whole

    def _cost(self, name: str, graph: int, row: tuple[bool, ...]) -> int:
        key = name, graph, row
        if key not in self._flops:
            self._flops[key] = cost.total_flops(self._backends[name].rewritten[graph].straight(row).gm.graph)
        return self._flops[key]


def _mean_gram(values: Mapping[tuple[str, Hashable], Sequence[tuple[Tensor, ...]]], name: str) -> Tensor:
    """Return the mean of the inner products of a denoiser's tensors."""
    own = [steps for (owner, _), steps in values.items() if owner == name]
    grams = [_gram([step[k] for step in steps]) for steps in own for k in range(len(steps[0]))]
    return torch.stack(grams).mean(0)


def _joined(blocks: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return the matrix of all steps from those of the denoisers, given the first step of each."""
    steps = max(first + len(gram) for first, gram in blocks)
    total, count = torch.zeros(2, steps, steps, dtype=torch.float64)
    for first, gram in blocks:
        total[first : first + len(gram), first : first + len(gram)] += gram
        count[first : first + len(gram), first : first + len(gram)] += 1
    return total / count.clamp_min(1)


def _gram(values: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the values of all steps, over their mean square."""
    flat = torch.stack([value.detach().flatten().float().cpu() for value in values])
    gram = (flat @ flat.T).double()
    return gram / gram.diagonal().mean().clamp_min(1e-30)
