"""``python -m dit_rewrite verify``: run `verify` as a command, with an exit code for CI."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_rewrite import policies
from dit_rewrite.cli.generate import load_pipeline
from dit_rewrite.cli.modules import factory_of
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.cli.pipeline_call import parsed_call, refuse_for_factory
from dit_rewrite.cli.progress import progress
from dit_rewrite.enable import denoisers
from dit_rewrite.errors import BadOption, NoTransformer
from dit_rewrite.proof.verify import Verification, verify

Calls = Sequence[Mapping[str, Any]]
RUNS = 4  # of the trajectory by `verify`: reuse 0, the original model, and the policy twice


class _Recorder(nn.Module):
    """Replaces a pipeline's denoiser, and records the arguments and the stream of each call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[dict[str, Any]] = []
        self.streams: list[str] = []
        self.stream = "main"

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """As diffusers calls it, with fields such as ``step_index``. The replay reads the step from the schedule."""
        before, self.stream = self.stream, name
        try:
            yield
        finally:
            self.stream = before

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(self.model.forward).parameters)
        self.streams.append(self.stream)
        self.calls.append({**dict(zip(names, args, strict=False)), **kwargs})
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Loaded:
    """A denoiser, the calls of one trajectory with their streams, and the scheduler of the trajectory."""

    model: nn.Module
    calls: Calls
    streams: Sequence[str] | None = None
    scheduler: Any = None


def from_factory(text: str, steps: int) -> Loaded:
    """Call the factory ``module:factory``, with `steps` if it takes an argument. Raises BadModel.

    The factory returns (model, calls), or (model, calls, scheduler) for policies that need the noise level.
    """
    with factory_of(text) as factory:
        model, calls, *scheduler = factory(steps) if inspect.signature(factory).parameters else factory()
        return Loaded(model, list(calls)[:steps], None, *scheduler)


def load(arguments: argparse.Namespace) -> Loaded:
    """Return the denoiser and the calls that the options name."""
    if ":" in arguments.model:
        refuse_for_factory(arguments.model, call=arguments.call)
        return from_factory(arguments.model, arguments.steps)
    return from_pipeline(arguments.model, arguments.steps, arguments.component, arguments.call)


def from_pipeline(model: str, steps: int, component: str = "transformer", call: Sequence[str] = ()) -> Loaded:
    """Load a pipeline from a folder or hub id, and record the calls of a denoiser for one sample.

    `call` has further arguments of the pipeline's call, as text.
    """
    pipeline = load_pipeline(model, torch.float32)
    known = denoisers(pipeline)
    if not known:
        raise NoTransformer(type(pipeline).__name__, getattr(pipeline, "components", ()))
    if component not in known:
        raise BadOption("--component", "component", component, f"one of {', '.join(known)}")
    if len(known) > 1:
        print(f"{component} of {', '.join(known)} (--component chooses)", file=sys.stderr)
    denoiser = known[component]
    more = parsed_call(pipeline, call)
    recorder = _Recorder(denoiser)
    pipeline.register_modules(**{component: recorder})
    labels = "class_labels" in inspect.signature(pipeline.__call__).parameters
    subject: dict[str, Any] = {"class_labels": [0]} if labels else {"prompt": "a cat"}
    with torch.no_grad():
        pipeline(**{**subject, **more}, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    return Loaded(denoiser, recorder.calls, recorder.streams, pipeline.scheduler)


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``python -m dit_rewrite verify``; the exit code is 0 if the verification passed, else 1.

    `verify` itself prints its line.
    """
    policy = policies.parse(arguments.policy)
    loaded = load(arguments)
    with progress("verifying", RUNS * len(loaded.calls)) as tick:
        result = verify(
            loaded.model,
            loaded.calls,
            policy,
            backend=arguments.backend,
            lowering=arguments.lowering,
            streams=loaded.streams,
            scheduler=loaded.scheduler,
            dump=arguments.dump,
            progress=tick,
        )
    return Outcome("", as_json(result), 0 if result.passed else 1)


def as_json(result: Verification) -> dict[str, Any]:
    """Return a verification in numbers and texts."""
    names = ("passed", "exact", "max_abs_error", "sites", "values", "calls", "decisions", "reused", "notes")
    difference = result.first_difference
    return {
        **{name: getattr(result, name) for name in names},
        "reuse0": str(result.reuse0),
        "replay": str(result.replay),
        "first_difference": None if difference is None else str(difference),
    }
