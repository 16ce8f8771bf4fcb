"""Factories and samplers of the caller that fail end a command with one line, which names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from dit_rewrite.cli.main import COMMANDS, main
from dit_rewrite.errors import FunctionFailed
from tests.cli.test_main import shortest
from tests.cli.test_paths import refused
from tests.helpers import tiny

HERE = __name__


def raising(*_: Any) -> Any:
    raise OSError(2, "no such file", "weights.safetensors")


def factory() -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    return tiny.build(), raising


def calls_of(steps: int, seed: int) -> Any:
    return (tiny.build(), tiny.calls(steps)) if seed == 0 else raising()


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"demo", "generate", "latency"}))
def test_a_factory_that_fails(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*shortest(command), "--model", f"{HERE}:raising"]
    said = refused(capsys, *line)
    assert f"--model {HERE}:raising cannot be used (FileNotFoundError: " in said and "weights.safetensors" in said


@pytest.mark.parametrize(
    ("command", "options", "run"),
    [
        ("tune", ("--sampler", "grid"), "with seed 0 under FORA(interval="),
        ("autopolicy", ("--speedup", "2"), "with seed 0 ("),
        ("search", (), "with seed 0 ("),
    ],
)
def test_a_sampler_that_fails(
    command: str,
    options: tuple[str, ...],
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [*shortest(command), "--model", f"{HERE}:factory", "--backend", "aot_eager", *options]
    said = refused(capsys, *line)
    assert said.startswith(f"error: {HERE}.raising failed {run}") and "weights.safetensors" in said
    with pytest.raises(FunctionFailed) as caught:
        main([*line, "--debug"])
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_factory_that_fails_for_a_later_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["analyze", "--model", f"{HERE}:calls_of", "--steps", "2", "--prompts", "2", "--out", str(tmp_path)]
    assert f"{HERE}.calls_of failed for prompt 1 (FileNotFoundError: " in refused(capsys, *line)
