"""`dit-rewrite search`: options, a search with a factory, and the negative prompt of a pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_rewrite.cli import factory, search
from dit_rewrite.cli.main import FAILED, build_parser, main
from dit_rewrite.errors import BadOption
from dit_rewrite.policy.plan import Choice, Plan
from tests.helpers import tiny
from tests.helpers.drawn import prepare
from tests.report.test_prediction import latent_calls

STEPS = 3


def build() -> tuple[Any, Any]:
    """The tiny model of an image, and its sampler."""

    def sample(model: Any, seed: int) -> None:
        with torch.no_grad(), model.trajectory(num_steps=STEPS):
            for call in latent_calls(STEPS):
                model(**{**call, "latent": call["latent"] + seed})

    return prepare(tiny.Patched(), torch.float32), sample


COMMAND = ["search", "--model", f"{__name__}:build", "--steps", str(STEPS), "--delta", "100", "--backend", "aot_eager"]


def test_a_plan_with_windows_of_the_latent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    asked = ["--window", "1,1", "--grid", "latent", "--strategies", "WA-RS", "--metric", "mse", "--seeds", "2"]
    assert main([*COMMAND, *asked, "--out", str(path), "--json"]) == 0
    said, found = json.loads(capsys.readouterr().out), Plan.load(path)
    assert (found.window, found.grid, found.metric, found.delta) == ((1, 1), "latent", "mse", 100.0)
    assert found.counts[Choice.WA_RS] == 2 * (STEPS - 1) == said["choices"]["WA-RS"]
    assert said["attention_shares"] == list(found.attention) and said["attention_share"] == found.attention_share
    text = search.as_text(found, path)
    assert (
        f"attention FLOPs: {found.attention_share:.1%} of full" in text
        and "mse below 100: full 33.3%, WA-RS 66.7%" in text
    )


def test_a_window_that_fits_no_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--window", "1,1,1", "--grid", "latent", "--out", str(tmp_path / "plan.json")]
    assert main([*COMMAND, *asked]) == FAILED
    assert "greedy_plan: grid='latent'" in capsys.readouterr().err


def test_a_plan_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This is found out before the search."""
    assert main([*COMMAND, "--out", str(tmp_path)]) == FAILED
    assert f"--out: {tmp_path} cannot be used (is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "window"),
    [("0.125", 0.125), ("4", (4,)), ("4,4", (4, 4)), ("0.25, 2", (0.25, 2)), ("1,2,3", (1, 2, 3))],
)
def test_windows_and_grids(text: str, window: Any) -> None:
    assert search.window_of(text) == window
    assert search.grid_of("latent") == "latent" and search.grid_of("2,4,6") == (2, 4, 6)
    for wrong in ("a", "1,", "1x2", "True"):
        with pytest.raises(BadOption, match="search"):
            search.window_of(wrong)


def test_candidates() -> None:
    """Without a conditional half nothing is shared; what is given keeps its order."""
    assert search.candidates(None, None) == {Choice.AST, Choice.WA_RS}
    assert len(search.candidates(None, "first")) == 4
    assert search.candidates(["WA-RS", "AST"], None) == [Choice.WA_RS, Choice.AST]


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_the_negative_prompt_reaches_the_pipeline(monkeypatch: pytest.MonkeyPatch, negative: str | None) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(factory, "load_pipeline", lambda *_: "pipeline")
    monkeypatch.setattr(factory, "of_pipeline", lambda _, call: seen.append(call) or (torch.nn.Identity(), None, {}))
    given = argparse.Namespace(model="folder", prompt="a cat", label=None, steps=4, negative_prompt=negative)
    factory.load(given)
    expected = {"prompt": "a cat", "num_inference_steps": 4}
    assert seen == [expected if negative is None else {**expected, "negative_prompt": negative}]


def test_further_arguments_reach_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--call`` of the commands that search: literals, or else texts."""

    class Pipeline:
        def __call__(self, prompt: str, height: int, output: str) -> None: ...

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(factory, "load_pipeline", lambda *_: Pipeline())
    monkeypatch.setattr(factory, "of_pipeline", lambda _, call: seen.append(call) or (torch.nn.Identity(), None, {}))
    for command in (["autopolicy"], ["tune", "--policy", "fora", "--space", "interval=2|3"], ["search"]):
        line = [*command, "--model", "m", "--prompt", "a", "--steps", "4", "--call", "height=8", "output=raw"]
        factory.load(build_parser().parse_args(line))
    assert seen == [{"prompt": "a", "height": 8, "output": "raw", "num_inference_steps": 4}] * 3
