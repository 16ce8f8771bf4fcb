"""The plain pipelines: each runs, draws the same image twice, and calls its denoisers as its case states."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.end_to_end.pipelines.case import PipelineCase
from tests.end_to_end.pipelines.registry import PIPELINES, SETTINGS

STEPS = 4


def count_calls(pipe: Any, case: PipelineCase) -> Counter[str]:
    """Counts the calls of each denoiser from here on."""
    counts: Counter[str] = Counter()
    for name in case.denoisers:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize(("name", "guidance"), SETTINGS)
def test_repeats_and_calls(name: str, guidance: bool) -> None:
    """Two runs are bit-equal, another seed's run is not, and every denoiser receives the calls that its case names."""
    case = PIPELINES[name]
    pipe = case.build()
    counts = count_calls(pipe, case)
    latents = case.call(pipe, STEPS, guidance=guidance)
    assert counts == case.calls(STEPS, guidance)
    assert latents.isfinite().all()
    assert torch.equal(latents, case.call(pipe, STEPS, guidance=guidance))
    assert not torch.equal(latents, case.call(pipe, STEPS, seed=1, guidance=guidance))


@pytest.mark.parametrize("name", [name for name, case in PIPELINES.items() if len(case.guidance) == 2])
def test_guidance_matters(name: str) -> None:
    """Guidance changes the image."""
    case = PIPELINES[name]
    pipe = case.build()
    assert not torch.equal(case.call(pipe, STEPS), case.call(pipe, STEPS, guidance=True))
