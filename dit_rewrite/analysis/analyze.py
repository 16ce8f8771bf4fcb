"""`dit_rewrite.analyze`: measure how much the tensors of a model change between the steps of its sampler."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.analysis.places import Keys
from dit_rewrite.analysis.probing import ProbingBackend, Profile, Settings
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.analysis.sampling import Sample, blamed, sampler
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.enable import denoisers
from dit_rewrite.errors import BadArgument, NotAModule, NothingMeasured, NoTransformer
from dit_rewrite.module import attach, inside, twin, unwrapped
from dit_rewrite.policy.plan import describe_scheduler, fingerprint, is_whole
from dit_rewrite.proof.callers import calling
from dit_rewrite.runtime.clock import Clock

Make = Callable[[nn.Module, str], Backend]  # makes the backend of a denoiser; the text begins the names of its sites


def analyze(
    model: Any,
    sample: Sample,
    prompts: Sequence[Any] | None = None,
    *,
    steps: int | None = None,
    distances: Sequence[int] = (1,),
    keys: Keys = "core",
    heads: bool = False,
    window: float | None = None,
    conditional: str | None = None,
    backend: InnerBackend = "inductor",
    path: str | Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Analysis:
    """Measure how much the tensors of a denoiser, or of the denoisers of a diffusers pipeline, change between steps.

    `sample` is one of

    - a function ``sample(model, prompt)`` that runs the sampler for each of `prompts` with the denoiser, or pipeline,
      that it is given (with several trajectories per prompt, each counts);
    - for a pipeline, a list of prompts, or of dicts with the arguments of its call, which runs `steps` steps;
    - for a module, a list of trajectories: each a list with the keyword arguments of every call.

    Every tensor is reduced in the compiled graph, where it is made, against the tensors of the last ``max(distances)``
    steps, which alone are stored. `model` itself is not changed.

    `keys`: whether keys and values are measured as the attention op reads them ("core": behind norms and rotations) or
    as their projection computes them ("projection"). `heads` also measures each attention head. `window` also measures
    window attention with that fraction of the tokens, and its residual to full attention. `conditional` is as in
    `ShareGuidance`: "first" or "second" if both halves of the guidance are in one batch, which are then measured apart,
    or the name of the conditional stream, which must be called first; the unconditional tensors are then compared with
    the conditional ones, too.

    With a `path` the analysis is saved there after each prompt, and an existing file of the same model, settings,
    prompts, steps and scheduler of the pipeline is continued. Under `torchrun` the
    processes share the prompts, and each writes a file of its own, with its rank in the name; `Analysis.merge` puts
    them together. `progress` is called with the number of each finished prompt.

    Raises BadArgument, NotAModule, NoTransformer, NothingMeasured, FunctionFailed, BadAnalysis or OtherAnalysis.
    """
    settings = _settings(distances, keys, heads, window, conditional)
    if steps is not None and not is_whole(steps, 2):
        raise BadArgument("analyze", "steps", steps, "a whole number >= 2, or None")
    if steps is not None and min(settings.distances) >= steps:
        raise BadArgument("analyze", "distances", distances, f"numbers of which one is below the {steps} steps")
    components(model)  # raises if it is neither a module nor a pipeline
    run, given = sampler("analyze", model, sample, prompts, steps)
    lowering = Lowering.of(backend)

    def make(denoiser: nn.Module, prefix: str) -> Backend:
        return ProbingBackend(denoiser, lowering, settings, prefix)

    found, target = _begin(model, settings, given, steps, path)
    with probed(model, make) as (ours, backends), torch.no_grad():
        for number in _own(len(given)):
            if number in found.prompts:
                continue
            with calling(blamed(model, sample), f"for prompt {number}"):
                run(ours, given[number])
            profiles = _taken(backends)
            if not any(row.distance for profile in profiles for row in profile):
                raise NothingMeasured(number)
            streams = dict.fromkeys(row.stream for profile in profiles for row in profile)
            if settings.lender is not None and settings.lender not in streams:
                allowed = f'"first", "second", or one of the streams {", ".join(streams)}'
                raise BadArgument("analyze", "conditional", conditional, allowed)
            found.add(number, profiles)
            probes = [backend for backend in backends if isinstance(backend, ProbingBackend)]
            refused = (reason for each in probes for reason in each.reasons())
            found.refused = list(dict.fromkeys([*found.refused, *refused]))
            if target is not None:
                found.save(target)
            if progress is not None:
                progress(number)
    return found


def _taken(backends: Sequence[Backend]) -> list[Profile]:
    """Return the profile of each trajectory, with the rows of all denoisers of a pipeline."""
    each = [backend.collector.take() for backend in backends if isinstance(backend, ProbingBackend)]
    joined = zip_longest(*each, fillvalue={})
    return [{row: values for profile in profiles for row, values in profile.items()} for profiles in joined]


def _settings(
    distances: Sequence[int], keys: Keys, heads: bool, window: float | None, conditional: str | None
) -> Settings:
    given = tuple(dict.fromkeys(distances)) if isinstance(distances, Sequence) else ()
    if not given or not all(is_whole(distance, 1) for distance in given):
        raise BadArgument("analyze", "distances", distances, "a list of whole numbers >= 1")
    if keys not in ("core", "projection"):
        raise BadArgument("analyze", "keys", keys, '"core" or "projection"')
    if window is not None and not (isinstance(window, float) and 0 < window < 1):
        raise BadArgument("analyze", "window", window, "a fraction between 0 and 1, or None")
    if conditional is not None and not (isinstance(conditional, str) and conditional):
        raise BadArgument("analyze", "conditional", conditional, '"first", "second", a stream, or None')
    return Settings(given, keys, heads, window, conditional)


def _begin(
    model: Any, settings: Settings, prompts: Sequence[Any], steps: int | None, path: str | Path | None
) -> tuple[Analysis, Path | None]:
    """Return the analysis to continue, and where to save it."""
    parts = components(model)
    known = asdict(settings) | {"distances": list(settings.distances), "prompts": _digest(prompts), "steps": steps}
    known["scheduler"] = describe_scheduler(getattr(model, "scheduler", None))
    name = " ".join(type(part).__name__ for part in parts.values())
    fresh = Analysis("+".join(fingerprint(part) for part in parts.values()), name, known)
    target = None if path is None else _ranked(Path(path))
    if target is None or not target.exists():
        return fresh, target
    found = Analysis.load(target)
    found.check(fresh.key, target)
    return found, target


def _digest(prompts: Sequence[Any]) -> str:
    """Return a hash of the prompts: texts, numbers, tensors, and lists and dicts of them. Of others the type counts."""
    return hashlib.sha256(repr([_plain(prompt) for prompt in prompts]).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(content).hexdigest()
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _rank() -> tuple[int, int]:
    """Return the number of this process, and how many there are, as `torchrun` tells them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _own(count: int) -> range:
    """Return the numbers of the prompts of this process."""
    rank, world = _rank()
    return range(rank, count, world)


def _ranked(path: Path) -> Path:
    rank, world = _rank()
    return path if world == 1 else path.with_name(f"{path.stem}.{rank}-of-{world}{path.suffix}")


def components(model: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by the names of their components, or the module itself under "".

    Raises NotAModule or NoTransformer.
    """
    if hasattr(model, "components") and not isinstance(model, nn.Module):
        found = denoisers(model)
        if not found:
            raise NoTransformer(type(model).__name__, getattr(model, "components", ()))
        return found
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    return {"": model}


@contextmanager
def probed(model: Any, make: Make) -> Iterator[tuple[Any, list[Backend]]]:
    """Provide a copy of a module that is compiled with a backend of `make`, and the backend.

    For a pipeline, its denoisers are exchanged for such copies, and each call of it is a trajectory, until the context
    ends.
    """
    parts = components(model)
    several = len(parts) > 1
    backends = {name: make(part, f"{name}." if several else "") for name, part in parts.items()}
    copies = {name: attach(twin(part), backends[name], dynamic=False) for name, part in parts.items()}
    if "" in parts:
        yield copies[""], list(backends.values())
        return
    before = {name: getattr(model, name) for name in parts}
    try:
        for name, part in copies.items():
            setattr(model, name, part)
        yield _Tied(model, list(copies.values())), list(backends.values())
    finally:
        for name, part in before.items():
            setattr(model, name, part)


class _Tied:
    """A pipeline each call of which is one trajectory of its denoisers."""

    def __init__(self, pipeline: Any, models: Sequence[nn.Module]) -> None:
        self._pipeline, self._models = pipeline, models

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clock = Clock(scheduler=getattr(self._pipeline, "scheduler", None))
        with ExitStack() as stack:
            for model in self._models:
                stack.enter_context(inside(model, clock))
            return self._pipeline(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)
