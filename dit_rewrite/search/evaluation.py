"""The error and the cost of any policy on a model, seed by seed, which `tune` minimises."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from dit_rewrite.compiler.lowering import InnerBackend
from dit_rewrite.errors import BadParameter
from dit_rewrite.module import backend_of, twin
from dit_rewrite.passes.analysis import cost
from dit_rewrite.policies.static import Never
from dit_rewrite.policy.plan import fingerprint
from dit_rewrite.policy.rules import Policy
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.runtime.session import Observation
from dit_rewrite.search.denoisers import parts_of, rewritten
from dit_rewrite.search.pipeline_sampler import resolved
from dit_rewrite.search.trials import Sample, images_of

Rows = Counter[tuple[str, int, tuple[bool, ...]]]  # calls by denoiser, graph and row of decisions


class Evaluation:
    """Runs a sampler with policies: a module with its sampler, or a pipeline with the arguments of its call, as in
    `autopolicy`. All denoisers of a pipeline have the policy. After each seed it yields the means so far over the
    seeds:

    "error": the relative L2 error to the images of the model that computes everything; "flops": the FLOPs over those of
    its run; with `time`, "time": the seconds over those of its run, in alternation. Equal seeds must give equal noise.
    Raises BadParameter without seeds, and the errors of `autopolicy` for models and samplers.
    """

    def __init__(
        self,
        model: Any,
        sample: Sample | Mapping[str, Any],
        seeds: Sequence[int] = (0, 1),
        *,
        time: bool = False,
        backend: InnerBackend = "inductor",
    ) -> None:
        if not seeds:
            raise BadParameter("Evaluation", "seeds", seeds, "one or more whole numbers")
        self.model, self.sample, _ = resolved("Evaluation", model, sample)
        self.seeds, self.time, self.backend = seeds, time, backend
        self._plain: Any = rewritten(self.model, Never(), backend) if time else twin(self.model)
        self._images: dict[int, Tensor] = {}

    @property
    def key(self) -> dict[str, str]:
        """The model and the seeds, which all trials of a study share."""
        return {"model": fingerprint(self.model), "seeds": repr(list(self.seeds))}

    def __call__(self, policy: Policy) -> Iterator[dict[str, float]]:
        model = rewritten(self.model, policy, self.backend)
        rows: Rows = Counter()

        def see(name: str, observation: Observation) -> None:
            rows[name, observation.graph, observation.record.row] += 1

        for name, part in parts_of(model).items():
            backend_of(part).session.observer = partial(see, name)
        if self.time:
            self._run(model, self.seeds[0], policy)  # compiles
            rows.clear()
        found: dict[str, list[float]] = {"error": [], **({"time": []} if self.time else {})}
        for seed in self.seeds:
            images, seconds = self._run(model, seed, policy)
            found["error"].append(relative_l2(images, self._reference(seed)))
            if self.time:
                found["time"].append(seconds / self._run(self._plain, seed)[1])
            yield {name: statistics.fmean(values) for name, values in found.items()} | {"flops": _share(model, rows)}

    def _reference(self, seed: int) -> Tensor:
        if seed not in self._images:
            self._images[seed] = self._run(self._plain, seed)[0]
        return self._images[seed]

    def _run(self, model: Any, seed: int, policy: object = None) -> tuple[Tensor, float]:
        began = time.perf_counter()
        images = images_of(self.sample, model, seed, policy)
        return images, time.perf_counter() - began


def _share(model: Any, rows: Rows) -> float:
    """Return the FLOPs of calls with these rows of decisions, over those of as many calls that compute everything."""
    graphs = {(name, i): r for name, part in parts_of(model).items() for i, r in enumerate(backend_of(part).rewritten)}
    spent = sum(n * cost.total_flops(graphs[name, i].straight(row).gm.graph) for (name, i, row), n in rows.items())
    return spent / sum(n * cost.total_flops(graphs[name, i].bound.gm.graph) for (name, i, _), n in rows.items())
