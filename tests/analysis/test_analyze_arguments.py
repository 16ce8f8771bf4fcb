"""Arguments of `analyze`, and files of other runs, that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dit_rewrite.errors import (
    BadArgument,
    NotAModule,
    NothingMeasured,
    OtherAnalysis,
)
from tests.helpers.analyses import analyze, two_streams
from tests.helpers.planted import Planted, planted_calls


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"distances": ()}, "distances"),
        ({"distances": (0,)}, "distances"),
        ({"keys": "norm"}, "keys"),
        ({"window": 1.0}, "window"),
        ({"conditional": ""}, "conditional"),
        ({"conditional": "cond"}, "conditional='cond' .* one of the streams 0"),
        ({"steps": 1}, "steps"),
        ({"steps": 2.5}, "steps"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], named: str) -> None:
    with pytest.raises(BadArgument, match=f"analyze: {named}{'' if '=' in named else '='}"):
        analyze(Planted(), [planted_calls(2)], **options)


def test_what_cannot_be_sampled() -> None:
    model = Planted()
    for sample, prompts in (("a cat", None), ([], None), (two_streams, None), (two_streams, []), ([3], None)):
        with pytest.raises(BadArgument, match="analyze: "):
            analyze(model, sample, prompts)
    with pytest.raises(NotAModule):
        analyze(3, [planted_calls(2)])
    with pytest.raises(NothingMeasured, match="prompt 0 never called the denoiser at two steps"):
        analyze(model, lambda *_: None, [0])


def test_a_file_of_another_analysis_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    analyze(Planted(), [planted_calls(2)], path=path)
    with pytest.raises(
        OtherAnalysis, match=r"a\.safetensors belongs to another analysis \(keys: 'core', not 'projection'"
    ):
        analyze(Planted(), [planted_calls(2)], path=path, keys="projection")
    with pytest.raises(OtherAnalysis, match="model: "):
        analyze(Planted(rates=(1.0,)), [planted_calls(2)], path=path)
    for other in (planted_calls(2, seed=1), planted_calls(3)):
        with pytest.raises(OtherAnalysis, match="prompts: "):
            analyze(Planted(), [other], path=path)


def test_a_file_of_another_run_of_a_pipeline_is_not_continued(tmp_path: Path) -> None:
    """Other prompts as dicts, another number of steps, or another scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    from tests.cli.test_generate import build_dit_pipeline

    pipeline, path, prompt = build_dit_pipeline(), tmp_path / "a.safetensors", {"class_labels": [2]}
    pipeline.set_progress_bar_config(disable=True)
    analyze(pipeline, [prompt], steps=2, path=path)
    assert analyze(pipeline, [dict(prompt)], steps=2, path=path).prompts == [0]
    with pytest.raises(OtherAnalysis, match="prompts: "):
        analyze(pipeline, [{"class_labels": [3]}], steps=2, path=path)
    with pytest.raises(OtherAnalysis, match="steps: 2, not 3"):
        analyze(pipeline, [prompt], steps=3, path=path)
    pipeline.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(OtherAnalysis, match="scheduler: 'DDIMScheduler:.*, not 'DPMSolver"):
        analyze(pipeline, [prompt], steps=2, path=path)
