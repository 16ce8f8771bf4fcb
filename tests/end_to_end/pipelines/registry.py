"""Every pipeline under test, by name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.end_to_end.pipelines import image, image_streams, video
from tests.end_to_end.pipelines.case import PipelineCase

PIPELINES: dict[str, PipelineCase] = {case.name: case for case in (*image.CASES, *image_streams.CASES, *video.CASES)}
SETTINGS = [(name, guidance) for name, case in PIPELINES.items() for guidance in case.guidance]

WITHOUT_GUIDANCE = ("flux",)
SAME_DENOISER = (
    "pixart_sigma", "sd3_controlnet", "flux_img2img", "flux_inpaint", "flux2_klein", "flux2_image", "cogvideox_video",
    "wan_image",
)  # fmt: skip
"""Both save time: what is compiled without guidance in every run of the tests (two names), and the pipelines whose
denoiser another one has, which is proven in every run anyhow. The rest is slow."""


def marked(name: str, guidance: bool, slow: bool) -> Any:
    """A setting, as a pytest parameter."""
    without = not guidance and len(PIPELINES[name].guidance) == 2 and name not in WITHOUT_GUIDANCE
    return pytest.param(name, guidance, marks=[pytest.mark.slow] if slow or without else [])


ENABLED = [marked(*setting, slow=setting[0] in SAME_DENOISER) for setting in SETTINGS]
