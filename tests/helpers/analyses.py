"""Analyses by the fastest backend, and how they are compared."""

from __future__ import annotations

from typing import Any

import torch

import dit_rewrite
from dit_rewrite.analysis.result import Analysis
from tests.helpers.planted import CHANNELS, planted_calls


def analyze(model: Any, sample: Any, *args: Any, **options: Any) -> Analysis:
    return dit_rewrite.analyze(model, sample, *args, backend="aot_eager", **options)


def same(a: Analysis, b: Analysis) -> bool:
    """Whether two analyses are equal bit for bit."""
    tables = (a.table.count, a.table.mean, a.table.squares), (b.table.count, b.table.mean, b.table.squares)
    kept = a.profiles.keys() == b.profiles.keys()
    kept = kept and all(torch.equal(a._profile(p).nan_to_num(), b._profile(p).nan_to_num()) for p in a.profiles)
    equal = all(map(torch.equal, *tables))
    return equal and kept and (a.table.rows, a.prompts, a.settings) == (b.table.rows, b.prompts, b.settings)


def two_streams(model: Any, steps: int) -> None:
    """Each step calls the model for a conditional and an unconditional stream, whose numbers differ by 1."""
    with model.trajectory(steps):
        for call in planted_calls(steps):
            with model.cache_context("cond"):
                model(**call)
            with model.cache_context("uncond"):
                model(call["latent"] + torch.eye(CHANNELS)[0], call["timestep"])
