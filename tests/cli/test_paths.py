"""Paths of every command: missing files, folders, damaged files and full disks are one line that names them."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dit_rewrite.cli.main import COMMANDS, FAILED, main
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.policies import FORA
from dit_rewrite.policy.plan import Choice, Plan
from dit_rewrite.policy.serialise import to_json
from tests.cli.test_main import shortest

FOLDERS = {"analyze": "--out", "demo": "--out", "latency": "--out", "tune": "--out", "verify": "--dump"}
FILES = dict.fromkeys(("autopolicy", "generate", "report", "search"), "--out")
OUTPUTS = {**FOLDERS, **FILES}


def refused(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """The line with which a command fails; libraries may warn before it."""
    assert main(line) == FAILED
    said = capsys.readouterr()
    last = said.err.splitlines(keepends=True)[-1]
    assert said.out == "" and last.startswith("error: "), said.err
    return last


def idle(arguments: object) -> Outcome:
    return Outcome("done", {})


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_are_checked_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing folder is no fault: the command makes it."""
    monkeypatch.setattr(import_module(COMMANDS[command][1]), "run", idle)
    (file := tmp_path / "file").touch()
    option, line = OUTPUTS[command], shortest(command)
    for good in (tmp_path / "new" / "result", tmp_path if command in FOLDERS else file):
        assert main([*line, option, str(good)]) == 0
        assert capsys.readouterr().out == "done\n"
    assert not (tmp_path / "new").exists()
    wrong = file if command in FOLDERS else tmp_path
    problem = "not a directory" if command in FOLDERS else "is a directory"
    assert f"{option}: {wrong} cannot be used ({problem}). Give" in refused(capsys, *line, option, str(wrong))
    below = file / "result"
    assert f"{option}: {below} cannot be used (not a directory)" in refused(capsys, *line, option, str(below))
    monkeypatch.setattr(os, "access", lambda *_: False)
    below = tmp_path / "new" / "result"
    assert f"{option}: {below} cannot be used (permission denied)" in refused(capsys, *line, option, str(below))
    with pytest.raises(PermissionError):
        main([*line, option, str(below), "--debug"])


def test_every_path_that_is_written_is_an_output() -> None:
    assert set(OUTPUTS) == set(COMMANDS) - {"explain"}


INPUTS = {
    "explain": ["--policy"],
    "verify": ["--policy"],
    "generate": ["--policy", "--model"],
    "report": ["--policy", "--analysis", "--plan", "--front", "--images"],
    "analyze": ["--merge"],
    "tune": ["--storage"],
}


@pytest.mark.parametrize(("command", "option"), [(name, each) for name, given in INPUTS.items() for each in given])
def test_inputs_that_cannot_be_read(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing files, folders and damaged files are named."""
    suffix = {"--images": ".png", "--analysis": ".safetensors", "--merge": ".safetensors"}.get(option, ".json")
    line = [*shortest(command), *(["--sampler", "grid"] if command == "tune" else [])]
    missing, folder, damaged = (tmp_path / f"{name}{suffix}" for name in ("missing", "folder", "damaged"))
    folder.mkdir()
    damaged.write_bytes(b"\xff\xfe{\n\n")
    for path in (missing, folder, damaged):
        if option == "--storage" and path == missing:
            continue  # a new journal
        said = refused(capsys, *line, option, str(path))
        assert str(path) in said and "Give " in said and "--debug" not in said, said
    with pytest.raises(Exception, match=r"folder|directory"):
        main([*line, option, str(folder), "--debug"])


def test_a_folder_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.svg").touch()
    (tmp_path / "notes.txt").touch()
    said = refused(capsys, "report", "--figures", str(tmp_path))
    assert f"pictures='{tmp_path}/empty.svg'" in said and "this is no SVG" in said
    said = refused(capsys, "report", "--figures", str(tmp_path / "empty.svg"))
    assert f"--figures: {tmp_path}/empty.svg cannot be used (not a directory)" in said
    shutil.rmtree(tmp_path)
    assert f"--figures: {tmp_path} cannot be used (no such file" in refused(
        capsys, "report", "--figures", str(tmp_path)
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2}', to_json(FORA(3)).replace("step", "speed")])
def test_a_damaged_policy_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "policy.json").write_text(content)
    assert f"{path} cannot be used as a policy (" in refused(capsys, "verify", "--policy", str(path))


def test_files_that_no_option_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a compiler that is not installed: nothing is said about an option."""

    def run(arguments: Any) -> Outcome:
        raise FileNotFoundError(2, "No such file or directory", "g++")

    monkeypatch.setattr(import_module(COMMANDS["verify"][1]), "run", run)
    said = refused(capsys, "verify")
    assert said == "error: FileNotFoundError: [Errno 2] No such file or directory: 'g++' (--debug shows where)\n"


def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file beside the output, which takes its place when it is whole, is told as the output."""

    def run(arguments: Any) -> Outcome:
        raise OSError(28, "No space left on device", f"{arguments.out}.writing")

    monkeypatch.setattr(import_module(COMMANDS["search"][1]), "run", run)
    said = refused(capsys, "search", "--out", str(tmp_path / "plan.json"))
    assert said == f"error: --out: {tmp_path}/plan.json.writing cannot be used (no space left on device). " + (
        "Check the path and its disk.\n"
    )


def test_a_plan_within_the_text_of_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no certificate, and is not taken for the file of a policy."""
    path = tmp_path / "plan.json"
    Plan("a fingerprint", 4, "none", ("blocks.0.attn1",), ((Choice.FULL,),) * 4, 0.0).save(path)
    said = refused(capsys, "report", "--policy", f"ditfastattn:plan={path}", "--steps", "4")
    assert "DiTFastAttn(delta=0.0) was made for another model" in said


@pytest.mark.parametrize(
    ("option", "value", "says"), [("--policy", "forra", "called 'forra'"), ("--space", "x=2|3", "x")]
)
def test_tune_refuses_policies_and_parameters_that_do_not_exist(
    option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be pruned in every trial."""
    assert says in refused(capsys, *shortest("tune"), "--sampler", "grid", option, value)


def test_a_storage_whose_folder_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    line = [*shortest("tune"), "--sampler", "grid", "--storage", str(tmp_path / "file" / "new" / "journal")]
    assert f"--storage: {tmp_path}/file/new cannot be used (not a directory). Give" in refused(capsys, *line)
