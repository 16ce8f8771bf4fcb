"""Plans that cannot be used or were made for something else, and policies that cannot be calibrated."""

from __future__ import annotations

from dit_rewrite.errors.policy import PolicyError


class BadPlan(PolicyError):
    template = (
        "{path} cannot be used as a plan: {problem:.300}. Give a file that Plan.save or an unfinished search has "
        "written, or delete it and search again."
    )


class PlanMismatch(PolicyError):
    """A plan, or a policy that was made of one, for another model, trajectory or search."""


class OtherSearch(PlanMismatch):
    template = (
        "{path} is of another search than this one ({differences}). Search with the same settings to go on with it, or "
        "delete it."
    )


class PlanForOtherModel(PlanMismatch):
    template = (
        "The plan was made for another model (fingerprint {fingerprint:.12}, and this {model} has {found:.12}). Load "
        "the plan of this model, in the dtype that it runs in, or search one."
    )


class PlanForOtherSteps(PlanMismatch):
    template = (
        "The plan has {steps} steps, and the trajectory has {num_steps}. Sample with {steps} steps, or search a plan "
        "for {num_steps}."
    )


class PolicyForOtherModel(PlanMismatch):
    template = "{policy} was made for another model. Search a plan for this one, in its dtype."


class PolicyForOtherSteps(PlanMismatch):
    template = (
        "{policy} was made for {steps} steps, not {num_steps}. Sample with {steps} steps, or search a plan for "
        "{num_steps}."
    )


class NotCalibrated(PolicyError):
    """A run from which the parameters of a policy cannot be found."""


class TooFewChanges(NotCalibrated):
    template = (
        "TeaCache cannot be calibrated: {count} changes of the modulated input and the output were seen, and {least} "
        "are needed. Call the denoiser that `sample` is given, at more steps."
    )


class PoorFit(NotCalibrated):
    template = (
        "TeaCache cannot be calibrated: the polynomial explains R² = {r2:.3f} of the output's changes, and min_r2 is "
        "{min_r2}. Sample more pictures or steps, or take another policy."
    )


class TooFewSteps(NotCalibrated):
    template = (
        "MagCache cannot be calibrated: the number of steps where a value was seen is {count}, and 2 are needed. "
        "Call the denoiser that `sample` is given, at every step."
    )


class UnevenStreams(NotCalibrated):
    template = (
        "MagCache cannot be calibrated: its streams were called at {counts} steps. Sample such that all streams are "
        "called at every step."
    )
