"""Samplers for commands: from a factory in a module, or of a pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NamedTuple

import torch

from dit_rewrite.cli.generate import load_pipeline
from dit_rewrite.cli.modules import factory_of
from dit_rewrite.cli.pipeline_call import add_call, parsed_call, refuse_for_factory
from dit_rewrite.search.controls import Solver
from dit_rewrite.search.pipeline_sampler import of_pipeline
from dit_rewrite.search.trials import Sample

BUNDLED = "dit_rewrite.demo.shapes.calls:sampler"
MODEL = "a pipeline's folder or hub id, or module:factory, where factory() returns (model, sample) or adds controls"


class Loaded(NamedTuple):
    """A denoiser, its sampler, and the solvers of the controls."""

    model: torch.nn.Module
    sample: Sample
    controls: Mapping[str, Solver]


def add_model(parser: argparse.ArgumentParser, steps: str = "steps of a pipeline") -> None:
    """Add the options that name a model and its sampler. `steps` is the help of the number of steps."""
    parser.add_argument("--model", default=BUNDLED, help=MODEL)
    parser.add_argument("--prompt", help="prompt, for a text-conditional pipeline")
    parser.add_argument("--label", type=int, nargs="+", help="class numbers, for a class-conditional pipeline")
    parser.add_argument("--steps", type=int, default=50, help=steps)
    add_call(parser)


def load(arguments: argparse.Namespace) -> Loaded:
    """Return the model and sampler that the options name. Raises BadSampler, UnknownInput for options
    of pipelines beside a factory, or the errors of `load_pipeline` and `parsed_call`."""
    negative = getattr(arguments, "negative_prompt", None)
    call = getattr(arguments, "call", ())
    if ":" in arguments.model:
        given = {"prompt": arguments.prompt, "label": arguments.label, "negative_prompt": negative, "call": call}
        refuse_for_factory(arguments.model, **given)
        return from_factory(arguments.model)
    pipeline = load_pipeline(arguments.model, torch.float32)
    subject = {"prompt": arguments.prompt} if arguments.label is None else {"class_labels": arguments.label}
    subject |= {} if negative is None else {"negative_prompt": negative}
    subject |= parsed_call(pipeline, call)
    return Loaded(*of_pipeline(pipeline, {**subject, "num_inference_steps": arguments.steps}))


def from_factory(text: str) -> Loaded:
    """Call the factory ``module:factory``, which returns (model, sample) or (model, sample, controls)."""
    with factory_of(text, sampler=True) as factory:
        model, sample, *controls = factory()
        return Loaded(model, sample, *(controls or [{}]))
