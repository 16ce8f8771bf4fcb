"""Errors of explicit trajectories, and of trajectories over which a plan cannot be searched."""

from __future__ import annotations

from dit_rewrite.errors.base import DitRewriteError


class BadTrajectory(DitRewriteError, ValueError):
    """A trajectory is invalid, or the calls of the model do not fit it."""


class NestedTrajectory(BadTrajectory):
    template = "A trajectory was opened inside another. Leave the outer context first."


class NumStepsNotWhole(BadTrajectory):
    template = (
        "trajectory(num_steps=…) was given a {type}. Give num_steps as a whole number, or the scheduler as a keyword: "
        "trajectory(scheduler=pipe.scheduler)."
    )


class NoSteps(BadTrajectory):
    template = "num_steps={num_steps} is not positive. Give num_steps >= 1."


class NoTimesteps(BadTrajectory):
    template = (
        "trajectory(scheduler=…) was given a {type}, which has no timesteps. Give a diffusers scheduler, or an object "
        "with `timesteps` (and `sigmas` or `alphas_cumprod`)."
    )


class NoiseUnknown(BadTrajectory):
    template = (
        "{policy} needs the signal-to-noise ratio of each step, but {known}. Use trajectory(scheduler=pipe.scheduler) "
        "with a scheduler that has alphas_cumprod or sigmas, and set its timesteps."
    )

    def __init__(self, policy: object, scheduler: object) -> None:
        known = "no scheduler was given" if scheduler is None else f"{type(scheduler).__name__} does not provide it"
        super().__init__(policy=policy, known=known)


class SamplerEnded(BadTrajectory):
    template = "The sampler ended before the last step. Give the number of steps that it takes."


class SearchOutsideTrajectory(BadTrajectory):
    template = "A plan is searched only in explicit trajectories. Use `with model.trajectory(…)` in the sampler."


class SearchRecompiled(BadTrajectory):
    template = (
        "At step {step} the denoiser was compiled again, for other shapes or arguments. Search over trajectories that "
        "call it with the same batch, resolution and arguments."
    )


class SearchOverGraphs(BadTrajectory):
    template = (
        "The denoiser runs in several graphs (graph breaks), but a plan is searched over one graph. Find the breaks "
        "with dit_rewrite.compile(model, policy, fullgraph=True), and remove them."
    )


class SearchCalledTwice(BadTrajectory):
    template = (
        "The denoiser was called more than once at step {step}: guidance makes a call for each stream, or the solver "
        "evaluates the model twice. A plan has one choice per step and stream. Give both halves of the guidance in one "
        'batch, with conditional="first" or "second", or name each call, `with model.cache_context("cond"):`. Use a '
        "solver with one call per step."
    )


class SearchOtherStreams(BadTrajectory):
    template = (
        "At step {step} the denoiser was called for the stream {found} instead of {expected}. Search over trajectories "
        "whose steps all make the same calls, in the same order, with the same arguments except latent and timestep."
    )


class SearchRestarted(BadTrajectory):
    template = (
        "The sampler's call for step {expected} belongs to step {found} of another trajectory. Sample once, with a "
        "single `with model.trajectory(num_steps=…)` around all steps."
    )
