"""Trajectories that cannot be told, or over which a plan cannot be searched."""

from __future__ import annotations

from dit_rewrite.errors.base import DitRewriteError


class BadTrajectory(DitRewriteError, ValueError):
    """A trajectory that does not fit its calls, or a way to call the model that does not fit the trajectory."""


class NestedTrajectory(BadTrajectory):
    template = "A trajectory was opened inside another. Leave the outer context first."


class NumStepsNotWhole(BadTrajectory):
    template = (
        "trajectory(num_steps=…) was given a {type}. Give num_steps as a whole number, or the scheduler by name: "
        "trajectory(scheduler=pipe.scheduler)."
    )


class NoSteps(BadTrajectory):
    template = "A trajectory of {num_steps} steps has no step. Give num_steps >= 1."


class NoTimesteps(BadTrajectory):
    template = (
        "The scheduler that trajectory was given, a {type}, has no timesteps. Give a diffusers scheduler, or an object "
        "with `timesteps` (and `sigmas` or `alphas_cumprod`)."
    )


class NoiseUnknown(BadTrajectory):
    template = (
        "{policy} needs the signal-to-noise ratio of each step, and {known}. Give trajectory(scheduler=pipe.scheduler) "
        "one with alphas_cumprod or sigmas, its timesteps set."
    )

    def __init__(self, policy: object, scheduler: object) -> None:
        known = "no scheduler was given" if scheduler is None else f"{type(scheduler).__name__} does not provide it"
        super().__init__(policy=policy, known=known)


class SamplerEnded(BadTrajectory):
    template = "The sampler has ended before its steps were done. Give the number of steps that it takes."


class SearchOutsideTrajectory(BadTrajectory):
    template = "A plan is searched inside marked trajectories only. Use `with model.trajectory(…)` in the sampler."


class SearchRecompiled(BadTrajectory):
    template = (
        "At step {step} the denoiser was compiled again, for other shapes or arguments. Search over trajectories that "
        "call it with the same batch, resolution and arguments."
    )


class SearchOverGraphs(BadTrajectory):
    template = (
        "The denoiser runs in several graphs (graph breaks), and a plan is searched over one. Find the breaks with "
        "dit_rewrite.compile(model, policy, fullgraph=True), and remove them."
    )


class SearchCalledTwice(BadTrajectory):
    template = (
        "The denoiser is called more than once at step {step}: guidance takes a call for each of its streams, or the "
        "solver evaluates twice. A plan has one choice for each step. Give both halves of the guidance in one batch, "
        'with conditional="first" or "second", and take a solver that calls once a step.'
    )


class SearchRestarted(BadTrajectory):
    template = (
        "The sampler's call for step {expected} is of step {found} of another trajectory. Sample once, with a single "
        "`with model.trajectory(num_steps=…)` around all steps."
    )
