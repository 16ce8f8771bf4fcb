"""``python -m dit_rewrite generate``: run a diffusers pipeline with a rewritten denoiser."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import socket
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import dit_rewrite
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.enable import denoisers
from dit_rewrite.errors import (
    BadOption,
    HubUnreachable,
    MissingExtra,
    PipelineNotLoaded,
    PolicyForOtherSteps,
    UnknownInput,
    WrongInput,
)
from dit_rewrite.module import RewrittenModule
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.search.certificate import AutoPolicy
from dit_rewrite.search.pipeline_sampler import compatible

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


FRAMES = ("num_frames", "video_length", "frames")  # the keywords of the pipelines that make videos
# the options that only some pipelines take, with the keywords that pipelines have for them
OPTIONS = {
    "guidance": ("guidance_scale",),
    "negative_prompt": ("negative_prompt",),
    "height": ("height",),
    "width": ("width",),
    "frames": FRAMES,
}
COUNTS = ("calls", "computed", "reused", "peak_bytes")  # of all denoisers together
TRANSPORTS = ("httpx", "httpx2", "requests")  # HTTP clients that versions of huggingface_hub use


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and the chain of its causes."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def is_unreachable(error: BaseException) -> bool:
    """Return whether the hub did not answer, as opposed to answering with an HTTP error."""
    for cause in causes(error):
        name, package = type(cause).__name__, type(cause).__module__.partition(".")[0]
        if isinstance(cause, (ConnectionError, TimeoutError, socket.gaierror)):
            return True
        if package in TRANSPORTS and name not in ("HTTPStatusError", "HTTPError"):
            return True
    return False


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": a GPU if there is one, with bfloat16; otherwise the CPU, with float32. Raises BadOption."""
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    name = dtype if dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadOption("generate", "device", device, '"cpu" or "auto": torch finds no GPU')
    return torch.device(kind), getattr(torch, name)


def load_pipeline(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the pipeline of a folder or hub id. Raises MissingExtra, HubUnreachable or PipelineNotLoaded."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingExtra("diffusers", "generate") from error
    thrifty = importlib.util.find_spec("accelerate") is not None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`torch_dtype` is deprecated", FutureWarning
            )  # diffusers up to 0.39 has only this name
            return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, low_cpu_mem_usage=thrifty)
    except (OSError, ValueError) as error:
        if not Path(model).exists() and is_unreachable(error):
            raise HubUnreachable(model, error) from error
        raise PipelineNotLoaded(model, error) from error


def call_arguments(pipeline: DiffusionPipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments for the call of the pipeline. Raises WrongInput, UnknownInput or
    BadOption."""
    name, known = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    if arguments.label is not None and "class_labels" not in known:
        raise WrongInput(name, "--label", "--prompt")
    if arguments.prompt is not None and "prompt" not in known:
        raise WrongInput(name, "--prompt", "--label")
    _check_labels(pipeline, arguments.label or ())
    asked = {"prompt": _prompts(arguments)} if arguments.label is None else {"class_labels": arguments.label}
    asked |= _options(name, known, arguments)
    if "output_type" in known:  # some pipelines return arrays by default
        asked["output_type"] = "pil"
    return {**asked, "num_inference_steps": arguments.steps, "generator": _generators(arguments)}


def _prompts(arguments: argparse.Namespace) -> str | list[str]:
    return arguments.prompt[0] if len(arguments.prompt) == 1 else list(arguments.prompt)


def _options(name: str, known: Collection[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that only some pipelines take. Raises UnknownInput for one that this pipeline does not."""
    found = {}
    for option, keywords in OPTIONS.items():
        value = getattr(arguments, option)
        keyword = next((each for each in keywords if each in known), None)
        if value is not None and keyword is None:
            raise UnknownInput(name, f"--{option.replace('_', '-')}")
        if value is not None and keyword is not None:
            several = option == "negative_prompt" and len(arguments.prompt or ()) > 1
            found[keyword] = [value] * len(arguments.prompt) if several else value
    return found


def _generators(arguments: argparse.Namespace) -> torch.Generator | list[torch.Generator]:
    """Return a generator, or one for each of several prompts, so that an image does not depend on the others."""
    count = len(arguments.prompt or ())
    seeds = range(arguments.seed, arguments.seed + max(count, 1))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if count < 2 else generators


def _check_labels(pipeline: DiffusionPipeline, labels: Sequence[int]) -> None:
    """Raise BadOption for a class that the denoiser does not have, if its config has the number of classes."""
    config = getattr(getattr(pipeline, "transformer", None), "config", None)
    classes = getattr(config, "num_embeds_ada_norm", None)
    for label in labels:
        if classes is not None and not 0 <= label < classes:
            raise BadOption("generate", "label", label, f"class numbers from 0 to {classes - 1}")


def pictures_of(output: Any) -> list[list[Any]]:
    """Return the PIL images of a pipeline's output, each as a list of frames."""
    if hasattr(output, "frames"):
        return [list(frames) for frames in output.frames]
    return [[image] for image in output.images]


def save_pictures(pictures: Sequence[Sequence[Any]], out: Path) -> list[Path]:
    """Write each picture and return the paths. Frames become one animated file; further pictures get a number."""
    paths = []
    for index, (first, *rest) in enumerate(pictures):
        path = out if index == 0 else out.with_stem(f"{out.stem}-{index}")
        first.save(path, **({"save_all": True, "append_images": rest} if rest else {}))
        paths.append(path)
    return paths


def check_format(pipeline: DiffusionPipeline, out: Path) -> None:
    """Raise BadOption unless the format of this file can have the pictures of a pipeline."""
    from PIL import Image

    video = any(keyword in inspect.signature(pipeline.__call__).parameters for keyword in FRAMES)
    formats = Image.registered_extensions()  # also loads the plugins that fill SAVE and SAVE_ALL
    if formats.get(out.suffix.lower()) not in (Image.SAVE_ALL if video else Image.SAVE):
        raise BadOption("generate", "out", str(out), f"a file such as {'video.gif' if video else 'image.png'}")


def follow_certificate(arguments: argparse.Namespace, policy: dit_rewrite.Policy, pipeline: DiffusionPipeline) -> None:
    """Check the certificate of a policy that `autopolicy` found, and take over the control's solver where that won.

    Raises PlanMismatch if the policy was made for another model, number of steps or scheduler.
    """
    if policy.made_for is not None and arguments.steps != policy.made_for.steps:
        raise PolicyForOtherSteps(policy, policy.made_for.steps, arguments.steps)
    found = AutoPolicy.of(arguments.policy)
    if found is None:
        return
    found.check(pipeline.transformer, arguments.steps, pipeline.scheduler)
    if found.winner == "control" and found.control is not None:
        kinds: dict[str, Any] = {kind.__name__: kind for kind in compatible(pipeline.scheduler)}
        if found.control.solver not in kinds:
            raise BadOption("generate", "policy", arguments.policy, f"a file whose control is among {', '.join(kinds)}")
        pipeline.scheduler = kinds[found.control.solver].from_config(pipeline.scheduler.config)
        arguments.steps = found.control.steps
        print(f"the control won: {found.control.solver} with {found.control.steps} steps, nothing is reused")


def told(pipeline: DiffusionPipeline) -> dict[str, Stats]:
    """Return the statistics of each denoiser of a pipeline, by its name."""
    return {name: part.stats() for name, part in denoisers(pipeline).items() if isinstance(part, RewrittenModule)}


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``python -m dit_rewrite generate``."""
    policy = dit_rewrite.policies.parse(arguments.policy)
    device, dtype = choose_device(arguments.device, arguments.dtype)
    pipeline = load_pipeline(arguments.model, dtype).to(device)
    check_format(pipeline, arguments.out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    follow_certificate(arguments, policy, pipeline)
    dit_rewrite.enable(pipeline, policy, backend=arguments.backend)
    asked = call_arguments(pipeline, arguments)
    began = time.perf_counter()
    with torch.no_grad():
        output = pipeline(**asked)
    seconds = time.perf_counter() - began
    paths, stats = save_pictures(pictures_of(output), arguments.out), told(pipeline)
    counts = {name: sum(getattr(s, name) for s in stats.values()) for name in COUNTS}
    own = [f"{name}: {each}" if len(stats) > 1 else str(each) for name, each in stats.items()]
    lines = [*(f"wrote {path}" for path in paths), f"{seconds:.1f} s with compilation; {own[0]}", *own[1:]]
    return Outcome("\n".join(lines), {"files": paths, "seconds": seconds, **counts})
