"""Every pipeline under test, by name."""

from __future__ import annotations

from tests.pipelines import image, image_streams, video
from tests.pipelines.case import PipelineCase

PIPELINES: dict[str, PipelineCase] = {case.name: case for case in (*image.CASES, *image_streams.CASES, *video.CASES)}
SETTINGS = [(name, guidance) for name, case in PIPELINES.items() for guidance in case.guidance]
