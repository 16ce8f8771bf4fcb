"""The parser of all commands: examples, errors in one line, exit codes and progress."""

from __future__ import annotations

import io
import json
import math
import shlex
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dit_rewrite.cli import main, progress
from dit_rewrite.cli.generate import call_arguments
from dit_rewrite.cli.main import COMMANDS, EXAMPLES, FAILED, INTERRUPTED, build_parser
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.cli.texts import DESCRIPTIONS
from dit_rewrite.errors import UnknownInput

NEEDED = {"generate": ["--model", "m", "--label", "1"], "tune": ["--policy", "fora", "--space", "interval=2|3"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each example is a command line that the parser takes."""
    with pytest.raises(SystemExit) as left:
        main.main([command, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "exit codes: 0 success, 1 a check failed, 2 an error, 130 interrupted" in said
    assert "--json" in said and "--debug" in said
    assert " ".join(DESCRIPTIONS[command].split()) in " ".join(said.split())
    assert "(default: None)" not in said and "(default: False)" not in said
    options = next(iter(build_parser()._subparsers._group_actions)).choices[command]._actions  # type: ignore[union-attr, index]
    assert all(option.help for option in options), "each option says what it is"
    for line in EXAMPLES[command]:
        assert f"python -m dit_rewrite {line}" in said
        assert build_parser().parse_args(shlex.split(line)).command == command


def failing(error: BaseException) -> Any:
    def run(arguments: object) -> Outcome:
        raise error

    return run


def shortest(command: str) -> list[str]:
    """The command with the options that it needs."""
    return [command, *NEEDED.get(command, [])]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an error that is not in the catalogue too; with --debug it is raised."""
    module = import_module(COMMANDS[command][1])
    monkeypatch.setattr(module, "run", failing(ValueError("first\nsecond")))
    assert main.main(shortest(command)) == FAILED
    assert capsys.readouterr().err == "error: ValueError: first second (--debug shows where)\n"
    assert main.main([*shortest(command), "--json"]) == FAILED
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="first"):
        main.main([*shortest(command), "--debug"])
    monkeypatch.setattr(module, "run", failing(KeyboardInterrupt()))
    assert main.main(shortest(command)) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_line_on_stdout(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command prints itself goes to stderr then. Numbers that JSON does not have are null."""

    def run(arguments: object) -> Outcome:
        print("half of it is done")
        return Outcome("a\nb", {"file": Path("a/b"), "steps": (1, 2.5), "worst": math.inf, "kind": {"x": True}}, 1)

    monkeypatch.setattr(import_module(COMMANDS[command][1]), "run", run)
    assert main.main(shortest(command)) == 1
    assert capsys.readouterr() == ("half of it is done\na\nb\n", "")
    assert main.main([*shortest(command), "--json"]) == 1
    said = capsys.readouterr()
    assert said.err == "half of it is done\n" and said.out.count("\n") == 1
    assert json.loads(said.out) == {"file": "a/b", "steps": [1, 2.5], "worst": None, "kind": {"x": True}}


def test_a_wrong_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["explain", "--nonsense"], ["explian"], ["verify", "--steps", "0"]):
        with pytest.raises(SystemExit) as left:
            main.main(line)
        assert left.value.code == FAILED
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "--help" in said


class VideoPipeline:
    def __call__(
        self, prompt, negative_prompt=None, height=1, width=1, num_frames=1, num_inference_steps=1, generator=None
    ):
        """The arguments of a text-to-video pipeline."""


class ImagePipeline:
    def __call__(self, prompt, num_inference_steps=1, generator=None):
        """The arguments of a pipeline with one size."""


def parsed(*more: str) -> Any:
    return build_parser().parse_args(["generate", "--model", "x", *more])


def test_a_video_pipeline_is_asked_in_its_own_words() -> None:
    line = parsed("--prompt", "a", "b", "--height", "64", "--width", "96", "--frames", "9", "--negative-prompt", "c")
    asked = call_arguments(VideoPipeline(), line)  # type: ignore[arg-type]
    assert [each.initial_seed() for each in asked.pop("generator")] == [0, 1]
    sizes = {"height": 64, "width": 96, "num_frames": 9}
    assert asked == {"prompt": ["a", "b"], "negative_prompt": ["c", "c"], "num_inference_steps": 50, **sizes}


@pytest.mark.parametrize("option", ["--height", "--width", "--frames", "--negative-prompt", "--guidance"])
def test_what_a_pipeline_does_not_take_is_named(option: str) -> None:
    with pytest.raises(UnknownInput, match=f"ImagePipeline takes no {option}. Leave it out"):
        call_arguments(ImagePipeline(), parsed("--prompt", "a", option, "8"))  # type: ignore[arg-type]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("patience", "terminal", "shown"), [(0.0, True, True), (60.0, True, False), (0.0, False, False)]
)
def test_a_bar_appears_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch, patience: float, terminal: bool, shown: bool
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    with progress.progress("sampling", 2) as tick:
        for _ in range(2):
            time.sleep(0.001)
            tick()
    assert ("sampling" in stream.getvalue()) is shown
