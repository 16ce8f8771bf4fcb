"""Errors of plans that are invalid or made for another model or trajectory, and of calibration."""

from __future__ import annotations

from dit_rewrite.errors.policy import PolicyError


class BadPlan(PolicyError):
    template = (
        "{path} cannot be used as a plan: {problem:.300}. Give a file that Plan.save or an unfinished search wrote, or "
        "delete it and search again."
    )


class PlanMismatch(PolicyError):
    """A plan, or the policy of a plan, was made for another model, trajectory or search."""


class OtherSearch(PlanMismatch):
    template = (
        "{path} belongs to another search ({differences}). Search with the same settings to continue it, or delete the "
        "file."
    )


class OtherStudy(PlanMismatch):
    template = (
        "The study {study!r} was made with other arguments ({differences:.300}). Give the same ones, another name of a "
        "study, or another storage."
    )


class BadStorage(PolicyError):
    template = (
        "The storage {storage} cannot be opened ({problem:.300}). Give a journal file that Optuna wrote, a path for a "
        "new one, or the URL of a database that SQLAlchemy can reach."
    )


class PlanForOtherModel(PlanMismatch):
    template = (
        "The plan was made for another model (its fingerprint is {fingerprint:.12}, that of this {model} is "
        "{found:.12}). Load the plan of this model, in the dtype that it runs in, or search one."
    )


class PlanForOtherSteps(PlanMismatch):
    template = (
        "The plan has {steps} steps, and the trajectory has {num_steps}. Sample with {steps} steps, or search a plan "
        "for {num_steps}."
    )


class PolicyForOtherModel(PlanMismatch):
    template = "{policy} was made for another model. Search a plan for this model, in its dtype."


class PolicyForOtherSteps(PlanMismatch):
    template = (
        "{policy} was made for {steps} steps, not {num_steps}. Sample with {steps} steps, or search a plan for "
        "{num_steps}."
    )


class PolicyForOtherScheduler(PlanMismatch):
    template = (
        "{policy} was made for the scheduler {scheduler}, not {found}. Sample with the scheduler and the settings that "
        "it was searched with, or search a policy for this one."
    )


class BadCertificate(PolicyError):
    template = (
        "{path} cannot be read as the result of autopolicy: {problem:.300}. Give a file that AutoPolicy.save wrote."
    )


class NothingFits(PolicyError):
    template = (
        "No placement of forecasts keeps {bound}: {problem}. Give a weaker bound, or other `places` such as "
        '("output", "stack").'
    )


class NotImages(PolicyError):
    template = (
        "The sampler returned {kind}, whose error cannot be measured. Give a function that returns the images or "
        "latents as one floating-point tensor: sample(denoiser, seed) -> Tensor."
    )


class NotCalibrated(PolicyError):
    """The parameters of a policy cannot be calibrated from a run."""


class TooFewChanges(NotCalibrated):
    template = (
        "TeaCache cannot be calibrated: it needs {least} changes of the modulated input and the output, but saw "
        "{count}. Call the denoiser that `sample` receives, at more steps."
    )


class PoorFit(NotCalibrated):
    template = (
        "TeaCache cannot be calibrated: the R² of the polynomial is {r2:.3f}, below min_r2 = {min_r2}. Sample more "
        "pictures or steps, or use another policy."
    )


class TooFewSteps(NotCalibrated):
    template = (
        "The policy cannot be calibrated: it needs values of 2 steps, but saw {count}. Call the denoiser that `sample` "
        "receives, at every step."
    )


class UnevenStreams(NotCalibrated):
    template = (
        "MagCache cannot be calibrated: its streams were called at different numbers of steps ({counts}). Sample so "
        "that all streams are called at every step."
    )


class NothingRecorded(NotCalibrated):
    template = (
        "The values of {place} cannot be recorded: they were computed at {counts} steps. Call the denoiser that "
        "`sample` receives at each of 3 or more steps, in all streams alike, or choose another place."
    )
