"""`python -m dit_rewrite verify`: exit codes, artefacts, and models that cannot be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_rewrite.cli.main import FAILED, main
from dit_rewrite.cli.verify import _Recorder, from_pipeline
from dit_rewrite.errors import BadOption
from dit_rewrite.proof.verify import Verification, verify
from tests.cli.test_generate import build_dit_pipeline
from tests.helpers import tiny

SMALL = f"{__name__}:small"


def small() -> tuple[nn.Module, list[dict[str, Any]]]:
    """A factory for --model: a module and the calls of a trajectory."""
    return tiny.build(), tiny.calls(2)


def test_the_bundled_denoiser_is_proven_and_its_graphs_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that a user's CI runs: exit code 0, one line, numbered graphs and diffs."""
    command = ["verify", "--model", "dit_rewrite.demo.shapes.calls:build", "--steps", "4", "--dump", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("ok: reuse 0 exact (16 sites forced, 16 values exported), replay exact")
    names = sorted(path.name for path in (tmp_path / "graph0").iterdir())
    assert names[1:4] == ["01_find_sites.txt", "03_step_tables.txt", "05_insert_guards.diff"]
    assert {"09_variant0_all_reuse.py", "09_variant1_all_compute.py"} <= set(names)


def test_a_pipeline_folder_is_proven_on_the_calls_that_it_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a factory the calls are recorded from the pipeline itself, with the arguments that ``--call`` names."""
    batches: list[int] = []
    original = _Recorder.forward

    def forward(self: _Recorder, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.append(len(hidden_states))
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(_Recorder, "forward", forward)
    build_dit_pipeline().save_pretrained(tmp_path / "dit")
    command = ["verify", "--model", str(tmp_path / "dit"), "--steps", "4"]
    assert main([*command, "--call", "class_labels=[1, 2, 3]", "guidance_scale=1"]) == 0
    for wrong, says in (("height=8", "DiTPipeline takes no height"), ("class_labels", "item='class_labels'")):
        assert main([*command, "--call", wrong]) == FAILED
        assert says in capsys.readouterr().err
    assert batches == [3] * 4, "three images, without guidance"


def test_calls_are_recorded_with_their_streams() -> None:
    """Wan's pipeline gives the context more than a name."""
    recorder = _Recorder(tiny.build())
    with pytest.raises(KeyError), recorder.cache_context("cond", step_index=0, sigma=1.0, num_inference_steps=2):
        recorder(*tiny.calls(1)[0].values())
        raise KeyError
    with torch.no_grad():
        recorder(**tiny.calls(1)[0])
    assert recorder.streams == ["cond", "main"]
    assert [list(call) for call in recorder.calls] == [["hidden_states", "timestep", "condition"]] * 2


class Experts:
    """A pipeline whose second denoiser runs the last two of three steps."""

    scheduler = None

    def __init__(self) -> None:
        self.components = {"transformer": tiny.build(), "transformer_2": tiny.build(), "vae": nn.Identity()}
        self.register_modules(**self.components)

    def register_modules(self, **modules: nn.Module) -> None:
        self.__dict__.update(modules)

    def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator) -> None:
        for i, call in enumerate(tiny.calls(num_inference_steps)):
            (self.transformer if i < 1 else self.transformer_2)(**call)  # type: ignore[attr-defined]


def test_each_denoiser_of_a_pipeline_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Experts()
    monkeypatch.setattr("dit_rewrite.cli.verify.load_pipeline", lambda *_: pipeline)
    for component, calls in (("transformer", 1), ("transformer_2", 2)):
        pipeline.register_modules(**pipeline.components)
        found = from_pipeline("folder", 3, component)
        assert found.model is pipeline.components[component] and len(found.calls) == calls
        assert capsys.readouterr().err.startswith(f"{component} of transformer, transformer_2")
    pipeline.register_modules(**pipeline.components)
    with pytest.raises(BadOption, match="component='vae' is out of range. Give component as one of transformer, "):
        from_pipeline("folder", 3, "vae")


def test_progress_counts_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is full at the end: `verify` runs the trajectory as often as the command says."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def bar(text: str, total: int) -> Iterator[Any]:
        ticks: list[None] = []
        yield lambda: ticks.append(None)
        seen.append((text, total, len(ticks)))

    monkeypatch.setattr("dit_rewrite.cli.verify.progress", bar)
    assert main(["verify", "--model", SMALL, "--steps", "2", "--backend", "aot_eager"]) == 0
    assert seen == [("verifying", 4 * 2, 4 * 2)]


def test_what_fails_the_proof_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification that did not pass is an exit code, not only a line."""

    def failing(*args: object, **kwargs: object) -> Verification:
        result = verify(*args, **kwargs)  # type: ignore[arg-type]
        result.replay.within = False
        return result

    monkeypatch.setattr("dit_rewrite.cli.verify.verify", failing)
    assert main(["verify", "--model", SMALL, "--steps", "2"]) == 1


def test_a_factory_makes_its_own_calls(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["verify"], ["tune", "--policy", "fora", "--space", "interval=2|3"]):
        assert main([*command, "--model", SMALL, "--call", "height=8"]) == FAILED
        assert f"{SMALL} takes no --call" in capsys.readouterr().err
    assert main(["autopolicy", "--model", SMALL, "--speedup", "2", "--prompt", "a cat"]) == FAILED
    assert f"{SMALL} takes no --prompt" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["no.such.module:build", "dit_rewrite.demo.shapes.calls:nothing", "math:pi"])
def test_a_factory_that_cannot_be_used_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the model, and says what a factory must return."""
    assert main(["verify", "--model", model]) == FAILED
    said = capsys.readouterr().err
    assert model in said
    assert "module:factory" in said


def test_a_policy_that_reaches_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Such a verification would check nothing."""
    assert main(["verify", "--model", SMALL, "--policy", "fora:interval=3,kinds=cross", "--steps", "2"]) == FAILED
    assert f"reaches none of the model's {tiny.SITES} sites" in capsys.readouterr().err
