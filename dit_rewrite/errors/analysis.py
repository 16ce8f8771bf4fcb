"""Errors of redundancy analyses and of their files."""

from __future__ import annotations

from dit_rewrite.errors.models import ModelError


class BadAnalysis(ModelError, ValueError):
    template = (
        "{path} cannot be used as an analysis: {problem:.300}. Give a file that Analysis.save wrote, or analyze the "
        "model again."
    )


class OtherAnalysis(ModelError, ValueError):
    template = (
        "{what} belongs to another analysis ({differences}). Use the same model and settings, or give another file."
    )


class OverlappingAnalyses(ModelError, ValueError):
    template = "The analyses to merge both have prompt {prompt}. Give analyses of different prompts."


class NothingMeasured(ModelError, RuntimeError):
    template = (
        "Sampling prompt {prompt} never called the denoiser at two steps of one trajectory, so nothing could be "
        "compared. Call the denoiser that `sample` receives, at every step."
    )


class NoImage(ModelError, TypeError):
    template = (
        "Reuse errors compare the final images, but sampling returned {found}. Give a `sample` that returns the image "
        "or the latent as a tensor."
    )
