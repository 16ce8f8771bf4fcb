"""How an analysis samples: a function of the caller, the call of a pipeline, or recorded calls of a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.errors import BadArgument, NoImage
from dit_rewrite.module import unwrapped
from dit_rewrite.torch_compat import tree_leaves

Sample = Callable[[Any, Any], Any] | Sequence[Any]
Run = Callable[[Any, Any], Any]  # samples with the compiled model, or pipeline, for one prompt


def sampler(
    where: str, model: Any, sample: Sample, prompts: Sequence[Any] | None, steps: int | None
) -> tuple[Run, Sequence[Any]]:
    """Return a function that samples for a prompt, and the prompts. Raises BadArgument."""
    if callable(sample):
        if prompts is None or isinstance(prompts, str) or not len(prompts):
            raise BadArgument(where, "prompts", prompts, "a list with an argument of `sample` for each run")
        return sample, list(prompts)
    if not isinstance(sample, Sequence) or isinstance(sample, str) or not len(sample):
        raise BadArgument(where, "sample", type(sample).__name__, "a function, or a list of prompts or trajectories")
    if prompts is not None:
        raise BadArgument(where, "prompts", "…", "None, as `sample` is a list")
    if isinstance(model, nn.Module):
        for i, calls in enumerate(sample):
            good = isinstance(calls, Sequence) and len(calls) and all(isinstance(call, Mapping) for call in calls)
            if not good:
                raise BadArgument(where, f"sample[{i}]", type(calls).__name__, "a list with the arguments of each call")
        return replay, list(sample)
    return _pipeline_call(model, steps), list(sample)


def blamed(model: Any, sample: Sample) -> object:
    """Return what an error of sampling names: `sample`, or the call of the model or pipeline without one."""
    return sample if callable(sample) else type(unwrapped(model))


def replay(model: Any, calls: Sequence[Mapping[str, Any]]) -> None:
    """Call a module with the arguments of each step of a trajectory."""
    with model.trajectory(len(calls)):
        for call in calls:
            model(**call)


def _pipeline_call(pipeline: Any, steps: int | None) -> Run:
    known = inspect.signature(pipeline.__call__).parameters

    def run(ours: Any, prompt: Any) -> Any:
        subject = "class_labels" if "class_labels" in known else "prompt"
        labels = [prompt] if isinstance(prompt, int) else prompt
        asked = dict(prompt) if isinstance(prompt, Mapping) else {subject: labels}
        asked.setdefault("generator", torch.Generator().manual_seed(0))
        if steps is not None:
            asked.setdefault("num_inference_steps", steps)
        if "output_type" in known:
            asked.setdefault("output_type", "pt" if subject == "class_labels" else "latent")
        return ours(**asked)

    return run


def image_of(result: Any) -> Tensor:
    """Return the first tensor of the result of sampling. Raises NoImage."""
    parts = [result, *(getattr(result, name, None) for name in ("images", "frames"))]
    for part in parts:
        for leaf in tree_leaves(part):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf
    raise NoImage(type(result).__name__)
