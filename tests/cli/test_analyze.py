"""`python -m dit_rewrite analyze`: a run that is continued, merged files, and options that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dit_rewrite.analysis.result import Analysis
from dit_rewrite.cli.main import FAILED, main
from tests.cli.test_generate import build_dit_pipeline
from tests.helpers.planted import Planted, planted_calls

pytest.importorskip("matplotlib")
FACTORY = "tests.cli.test_analyze:build"
ONE = "tests.cli.test_analyze:build_one"


def build(steps: int, seed: int) -> tuple[Planted, list[dict[str, Any]]]:
    return Planted(), planted_calls(steps, seed)


def build_one(steps: int) -> tuple[Planted, list[dict[str, Any]]]:
    return build(steps, 0)


def test_an_analysis_is_written_drawn_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["analyze", "--model", FACTORY, "--prompts", "2", "--steps", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Planted: 2 prompts, 4 steps; keys and values behind norms and rotations")
    assert said.err.splitlines()[-2:] == ["prompt 1", "prompt 2"]
    assert Analysis.load(tmp_path / "analysis.safetensors").prompts == [0, 1]
    assert {"mlp_lines.png", "mlp_map.png", "keys_lines.png"} <= {path.name for path in tmp_path.iterdir()}
    assert main([*command, "--no-plots"]) == 0
    assert "prompt 1" not in capsys.readouterr().err, "both were there"
    command[command.index("4")] = "3"
    assert main([*command, "--no-plots"]) == FAILED
    assert "steps: 4, not 3" in capsys.readouterr().err


def test_a_pipeline_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class-conditional pipeline takes the first classes, or the numbers in a file."""
    pytest.importorskip("diffusers")
    build_dit_pipeline().save_pretrained(tmp_path / "dit")
    (tmp_path / "classes.txt").write_text("3\n\n1\n")
    command = ["analyze", "--model", str(tmp_path / "dit"), "--steps", "3", "--no-plots", "--out", str(tmp_path)]
    command += ["--prompts", str(tmp_path / "classes.txt")]
    assert main([*command, "--call", "guidance_scale=1.0"]) == 0
    found = Analysis.load(tmp_path / "analysis.safetensors")
    assert (found.prompts, found.steps) == ([0, 1], 3)
    assert "analyzing 2 prompts" in capsys.readouterr().err
    assert main(command) == FAILED, "with guidance it is another analysis"
    assert "prompts: " in capsys.readouterr().err


def test_merged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["analyze", "--model", FACTORY, "--prompts", "2", "--steps", "3", "--no-plots", "--out"]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main([*command, str(tmp_path)]) == 0
    parts = sorted(map(str, tmp_path.glob("*.safetensors")))
    assert len(parts) == 2
    assert main(["analyze", "--merge", *parts, "--no-plots", "--out", str(tmp_path / "all")]) == 0
    assert Analysis.load(tmp_path / "all" / "analysis.safetensors").prompts == [0, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "no.such:build"], "--model no.such:build cannot be used"),
        (["--model", FACTORY, "--prompts", "none"], "prompts='none'"),
        (["--model", ONE, "--prompts", "2"], "prompts='2'"),
        (["--model", ONE, "--prompts", "1", "--steps", "1"], "steps=1"),
        (["--model", ONE, "--prompts", "1", "--steps", "3", "--distances", "3", "4"], "one is below the 3 steps"),
        (["--model", ONE, "--prompts", "1", "--call", "height=8"], f"{ONE} takes no --call"),
    ],
)
def test_options_that_cannot_be_used(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "--out", str(tmp_path), *options]) == FAILED
    assert says in capsys.readouterr().err


def test_a_damaged_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "analysis.safetensors"
    path.write_bytes(b"nothing")
    assert main(["analyze", "--model", ONE, "--prompts", "1", "--steps", "2", "--out", str(tmp_path)]) == FAILED
    assert f"{path} cannot be used as an analysis" in capsys.readouterr().err
