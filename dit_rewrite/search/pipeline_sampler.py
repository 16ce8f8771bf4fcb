"""The sampler and the controls of a diffusers pipeline, for `autopolicy` and `Evaluation`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.enable import denoisers
from dit_rewrite.errors import BadParameter, NotAModule
from dit_rewrite.module import RewrittenModule, inside, needs_noise, unwrapped
from dit_rewrite.runtime.clock import Clock
from dit_rewrite.search.controls import Solver
from dit_rewrite.search.trials import Sample

CONTROLS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")


def resolved(where: str, model: Any, sample: Any) -> tuple[nn.Module, Sample, dict[str, Solver]]:
    """Return the denoiser, its sampler and the controls, given a module with its sampler, which has no controls, or a
    pipeline with the arguments of its call. Raises NotAModule or BadParameter."""
    if isinstance(sample, Mapping):
        return of_pipeline(model, sample, where)
    if denoisers(model):
        allowed = "the arguments of the pipeline's call; a function belongs to its denoiser, such as pipe.transformer"
        raise BadParameter(where, "sample", sample, allowed)
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    return model, sample, {}


def of_pipeline(
    pipe: Any, call: Mapping[str, Any], where: str = "autopolicy"
) -> tuple[nn.Module, Sample, dict[str, Solver]]:
    """Return the denoiser of a pipeline, or several as a ModuleDict, its sampler, and the controls, by the class names
    of their schedulers.

    `call` has the arguments of the pipeline's call without `generator`; `num_inference_steps` must be among them. A
    control is the pipeline's scheduler, or one of `CONTROLS` that is compatible with it and takes its config. Raises
    BadParameter for a pipeline without a denoiser, or a call without the number of steps.
    """
    found = denoisers(pipe)
    if not found:
        raise BadParameter(where, "model", type(pipe).__name__, "a pipeline with a transformer")
    if "num_inference_steps" not in call:
        raise BadParameter(where, "sample", list(call), "a call with num_inference_steps")
    first = next(iter(found))

    def named(model: Any) -> dict[str, Any]:
        return dict(model.items()) if isinstance(model, nn.ModuleDict) else {first: model}

    @wraps(type(pipe).__call__)  # errors name it
    def sample(model: Any, seed: int) -> Tensor:
        return run(pipe, named(model), seed, call, type(pipe.scheduler))

    @wraps(type(pipe).__call__)
    def fewer(kind: type, model: Any, steps: int, seed: int) -> Tensor:
        return run(pipe, named(model), seed, {**call, "num_inference_steps": steps}, kind)

    denoiser = nn.ModuleDict(found) if len(found) > 1 else found[first]
    return denoiser, sample, {kind.__name__: partial(fewer, kind) for kind in compatible(pipe.scheduler)}


def compatible(scheduler: Any) -> list[type]:
    """Return the class of a scheduler, and those of `CONTROLS` that are compatible with it."""
    others = [kind for kind in getattr(scheduler, "compatibles", ()) if kind.__name__ in CONTROLS]
    return [type(scheduler), *sorted((k for k in others if k is not type(scheduler)), key=lambda k: k.__name__)]


def run(pipe: Any, models: Mapping[str, Any], seed: int, call: Mapping[str, Any], kind: Any) -> Tensor:
    """Run a copy of a pipeline with other denoisers and a new scheduler, and return its images, frames or audio."""
    copied = copy.copy(pipe)
    copied.scheduler = kind.from_config(pipe.scheduler.config)
    for name, model in models.items():
        setattr(copied, name, model)
    copied.set_progress_bar_config(disable=True)
    given = {**call, "generator": torch.Generator().manual_seed(seed), "output_type": "np", "return_dict": True}
    rewritten = [model for model in models.values() if isinstance(model, RewrittenModule)]
    clock = Clock(scheduler=copied.scheduler, noise=any(map(needs_noise, rewritten)))
    with contextlib.ExitStack() as stack:
        for model in rewritten:
            stack.enter_context(inside(model, clock))
        output = copied(**given)
    return torch.as_tensor(next(iter(output.values())))
