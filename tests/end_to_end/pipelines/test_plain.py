"""The plain pipelines: each runs, draws the same image twice, and calls its denoisers as its case states."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.end_to_end.pipelines.case import PipelineCase
from tests.end_to_end.pipelines.registry import PIPELINES

STEPS = 4


def count_calls(pipe: Any, case: PipelineCase) -> Counter[str]:
    """Counts the calls of each denoiser from here on."""
    counts: Counter[str] = Counter()
    for name in case.denoisers:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize("name", PIPELINES)
def test_repeats_and_calls(name: str) -> None:
    """Two runs are bit-equal, another seed's run is not, and every denoiser receives the calls that its case names.
    Guidance changes the image."""
    case = PIPELINES[name]
    pipe = case.build()
    counts = count_calls(pipe, case)
    images = []
    for guidance in case.guidance:
        counts.clear()
        latents = case.call(pipe, STEPS, guidance=guidance)
        assert counts == case.calls(STEPS, guidance)
        assert latents.isfinite().all()
        assert torch.equal(latents, case.call(pipe, STEPS, guidance=guidance))
        assert not torch.equal(latents, case.call(pipe, STEPS, seed=1, guidance=guidance))
        images.append(latents)
    assert len(images) == 1 or not torch.equal(*images)
