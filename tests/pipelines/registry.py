"""Every pipeline under test, by name."""

from __future__ import annotations

import pytest

from tests.pipelines import image, image_streams, video
from tests.pipelines.case import PipelineCase

PIPELINES: dict[str, PipelineCase] = {case.name: case for case in (*image.CASES, *image_streams.CASES, *video.CASES)}
SETTINGS = [(name, guidance) for name, case in PIPELINES.items() for guidance in case.guidance]

WITHOUT_GUIDANCE = ("flux", "sd3", "z_image")
"""Where both kinds of guidance are compiled in every run of the tests: two names, one batch, lists. Others have one."""

COMPILED = [
    setting
    if setting[1] or len(PIPELINES[setting[0]].guidance) == 1 or setting[0] in WITHOUT_GUIDANCE
    else pytest.param(*setting, marks=pytest.mark.slow)
    for setting in SETTINGS
]
