"""`dit-rewrite autopolicy`, `search` and `tune`: factories, pipelines, and the files that `generate` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")

from dit_rewrite.cli.factory import BUNDLED, from_factory  # noqa: E402
from dit_rewrite.cli.main import FAILED, main  # noqa: E402
from dit_rewrite.cli.tune import maker, parse_values  # noqa: E402
from dit_rewrite.errors import BadOption, BadSampler  # noqa: E402
from dit_rewrite.policies import FORA, Never, parse  # noqa: E402
from dit_rewrite.policy.plan import Choice, Plan  # noqa: E402
from dit_rewrite.policy.serialise import to_json  # noqa: E402
from dit_rewrite.search.certificate import AutoPolicy  # noqa: E402
from dit_rewrite.search.tune import Range  # noqa: E402
from tests.cli.test_generate import STEPS, build_dit_pipeline, generate  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.search.test_autopolicy import sample  # noqa: E402

QUICK = ["--backend", "aot_eager"]


def factory() -> tuple[Any, Any]:
    return tiny.build(), sample


def broken() -> tuple[Any]:
    return (tiny.build(),)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline's folder, and the file of the policy that the command found for it."""
    folder = tmp_path_factory.mktemp("searched")
    build_dit_pipeline().save_pretrained(folder / "dit")
    command = ["autopolicy", "--model", str(folder / "dit"), "--label", "3", "--steps", str(STEPS), "--speedup", "2"]
    command += ["--places", "output", "--measure", "flops", "--calibration", "1", "--held-out", "2", "--trials", "2"]
    assert main([*command, *QUICK, "--out", str(folder / "policy.json")]) == 0
    return folder / "dit", folder / "policy.json"


def test_a_pipeline_gets_a_policy_with_controls_from_its_scheduler(searched: tuple[Path, Path]) -> None:
    found = AutoPolicy.load(searched[1])
    assert len(found.computed) == 3 and found.steps == STEPS and found.control is not None
    assert found.control.steps == 3 and found.control.solver.endswith("Scheduler")
    assert found.scheduler is not None and found.scheduler.startswith("DDIMScheduler:")


def test_generate_takes_the_file(
    searched: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever won: the policy computes half of the steps, or the control's solver runs with as many."""
    folder, policy = searched
    content = json.loads(policy.read_text())
    asked = ["--label", "3", "--policy", str(policy)]
    assert generate(folder, tmp_path / "a.png", *asked) == 0
    said = capsys.readouterr().out
    assert ("the control won" in said) == (content["certificate"]["winner"] == "control")
    for winner in ("policy", "control"):
        content["certificate"]["winner"] = winner
        used = AutoPolicy.load(policy).policy if winner == "policy" else Never()
        policy_file = tmp_path / f"{winner}.json"
        certificate = {"certificate": content["certificate"]}
        policy_file.write_text(json.dumps(json.loads(to_json(used)) | certificate))
        assert generate(folder, tmp_path / "b.png", "--label", "3", "--policy", str(policy_file)) == 0
        said = capsys.readouterr().out
        assert ("3 calls" in said) == (winner == "control")


def test_generate_refuses_other_steps_and_schedules(
    searched: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, policy = searched
    asked = ["--label", "3", "--policy", str(policy)]
    assert generate(folder, tmp_path / "a.png", *asked, "--steps", "5") == FAILED
    assert f"was made for {STEPS} steps, not 5" in capsys.readouterr().err
    pipeline = build_dit_pipeline()
    pipeline.scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    pipeline.save_pretrained(tmp_path / "other")
    assert generate(tmp_path / "other", tmp_path / "a.png", *asked) == FAILED
    assert "was made for the scheduler DDIMScheduler:" in capsys.readouterr().err


def test_a_factory_gives_model_and_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["autopolicy", "--model", f"{__name__}:factory", "--max-error", "0.9", "--places", "output", "--json"]
    command += ["--measure", "flops", "--calibration", "1", "--held-out", "2", "--trials", "1", *QUICK]
    assert main([*command, "--out", str(tmp_path / "policy.json")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["bound"] == "max_error=0.9"
    assert "recorded the output" in said.err
    assert len(from_factory(BUNDLED).controls) == 3
    with pytest.raises(BadSampler, match="not enough values"):
        from_factory(f"{__name__}:broken")


def test_tune_writes_a_front_of_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "--model", f"{__name__}:factory", "--policy", "fora:anchor=paper", "--space", "interval=2|5"]
    command += ["--sampler", "grid", "--seeds", "1", "--out", str(tmp_path), *QUICK]
    assert main(command) == 0
    assert "| interval |" in capsys.readouterr().out
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["front.json", "front.md", "trial-000.json", "trial-001.json"]
    twice = command.index("--sampler")
    assert main([*command[:twice], "interval=3", *command[twice:]]) == FAILED
    assert "each parameter once" in capsys.readouterr().err


def test_search_writes_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is a policy; without `--conditional`, guidance is not shared."""
    path = tmp_path / "plan.json"
    command = ["search", "--model", f"{__name__}:factory", "--steps", "10", "--out", str(path), *QUICK]
    assert main([*command, "--delta", "0.9", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    plan = Plan.load(path)
    assert said["choices"] == {str(choice): count for choice, count in plan.counts.items()}
    assert plan.steps == 10 and plan.counts[Choice.AST] > 0 and plan.conditional is None
    assert parse(f"ditfastattn:plan={path}").rules
    assert main([*command, "--delta", "D9"]) == FAILED
    assert "one of D1, D2" in capsys.readouterr().err


def test_spaces_are_parsed() -> None:
    assert parse_values("a=1|2.5|x|None") == ("a", [1, 2.5, "x", None])
    assert parse_values("a=2..8") == ("a", Range(2, 8)) and parse_values("a=0.1..1.0:log") == (
        "a",
        Range(0.1, 1.0, True),
    )
    for text in ("a", "a=", "=1", "a=5..2", "a=1..2:linear", "a=x..y"):
        with pytest.raises(BadOption):
            parse_values(text)
    assert maker("fora:anchor=paper")(interval=3) == FORA(3, anchor="paper") and maker("fora")(interval=2) == FORA(2)


def test_what_cannot_be_written_is_found_before_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    model = ["--model", f"{__name__}:factory", *QUICK]
    policy = ["autopolicy", *model, "--speedup", "2", "--out"]
    front = ["tune", *model, "--policy", "fora", "--space", "interval=2|3", "--sampler", "grid", "--out"]
    for command, out in ((policy, tmp_path), (policy, tmp_path / "file" / "x"), (front, tmp_path / "file")):
        assert main([*command, str(out)]) == FAILED
        said = capsys.readouterr().err
        assert str(tmp_path) in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
