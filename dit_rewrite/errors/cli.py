"""Errors of commands: options, models and extras that they cannot use."""

from __future__ import annotations

from dit_rewrite.errors.base import DitRewriteError


class CommandError(DitRewriteError):
    """A command, or a function that needs an extra, cannot run."""


class BadOption(CommandError, ValueError):
    template = "{where}: {name}={value!r} is out of range. Give {name} as {allowed}."


class BadPath(CommandError, OSError):
    template = "{option}: {path} cannot be used ({problem}). {remedy}."


class WrongInput(CommandError, ValueError):
    template = "{pipeline} takes no {given}. Give {wanted} instead."


class UnknownInput(CommandError, ValueError):
    template = "{pipeline} takes no {given}. Leave it out, or use a pipeline that does."


class BadModel(CommandError, ValueError):
    template = (
        "--model {text} cannot be used ({cause}). Give module:factory, where factory(steps) returns (model, calls) or "
        "(model, calls, scheduler). calls is a list with a dict of keyword arguments for each step."
    )


class BadSampler(CommandError, ValueError):
    template = (
        "--model {text} cannot be used ({cause}). Give module:factory, where factory() returns (model, sample) or "
        "(model, sample, controls). sample(denoiser, seed) returns images as a tensor, and controls maps names of "
        "solvers to functions (denoiser, steps, seed) -> images."
    )


class MissingExtra(CommandError, ImportError):
    template = "{purpose} needs {package}. Install it: pip install 'dit_rewrite[{extra}]'."

    def __init__(self, package: str, purpose: str, extra: str = "diffusers") -> None:
        super().__init__(package=package, purpose=purpose, extra=extra)


class HubUnreachable(CommandError, OSError):
    template = (
        "{model!r} is not a local folder, and the hub could not be reached ({cause.__class__.__name__}). Give --model "
        "the path of a folder that was saved with save_pretrained, or go online."
    )


class PipelineNotLoaded(CommandError, OSError):
    template = (
        "No pipeline could be loaded from {model!r} ({cause.__class__.__name__}: {cause!s:.300}). Give --model a hub "
        "id such as facebook/DiT-XL-2-256, or a folder that a pipeline's save_pretrained has written."
    )
