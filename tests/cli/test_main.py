"""The parser of all commands: examples, errors in one line, exit codes and progress."""

from __future__ import annotations

import io
import shlex
import time
from typing import Any

import pytest

from dit_rewrite.cli import explain, main, progress
from dit_rewrite.cli.generate import call_arguments
from dit_rewrite.cli.main import COMMANDS, EXAMPLES, FAILED, INTERRUPTED, build_parser
from dit_rewrite.errors import UnknownInput


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each example is a command line that the parser takes."""
    with pytest.raises(SystemExit) as left:
        main.main([command, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "exit codes: 0 success" in said
    for line in EXAMPLES[command]:
        assert f"python -m dit_rewrite {line}" in said
        assert build_parser().parse_args(shlex.split(line)).command == command


def failing(error: BaseException) -> Any:
    def run(arguments: object) -> int:
        raise error

    return run


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an error that is not in the catalogue too; with --debug it is raised."""
    monkeypatch.setattr(explain, "run", failing(ValueError("first\nsecond")))
    assert main.main(["explain"]) == FAILED
    assert capsys.readouterr().err == "error: ValueError: first second (--debug shows where)\n"
    with pytest.raises(ValueError, match="first"):
        main.main(["explain", "--debug"])
    monkeypatch.setattr(explain, "run", failing(KeyboardInterrupt()))
    assert main.main(["explain"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


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
