"""Tuning: fronts of known functions, resuming from a journal, pruning, and a run on a model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_rewrite import Evaluation, Range, tune
from dit_rewrite.errors import AllRefused, BadParameter, MissingExtra, OtherStudy
from dit_rewrite.policies import FORA, parse
from dit_rewrite.policy.rules import Policy
from dit_rewrite.search.front import Front, Point
from dit_rewrite.search.tune import is_hopeless
from tests.helpers import tiny
from tests.search.test_autopolicy import sample

pytest.importorskip("optuna")


def made(**parameters: Any) -> Policy:
    """A policy that only carries its parameters in its name."""
    return Policy(name=json.dumps(parameters))


class Known:
    """The error falls with x and the cost rises; y above 0 only costs. Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, policy: Policy) -> Iterator[dict[str, float]]:
        self.calls += 1
        p = json.loads(policy.name)
        yield {"error": 1 / p["x"], "flops": p["x"] + p["y"]}


SPACE: dict[str, Any] = {"x": [1, 2, 4], "y": [0, 1]}


def test_a_grid_finds_the_known_front() -> None:
    known = Known()
    front = tune(made, SPACE, known, sampler="grid")
    assert known.calls == len(front.points) == 6
    assert [(p.parameters, p.values) for p in front.best] == [
        ({"x": x, "y": 0}, {"error": 1 / x, "flops": float(x)}) for x in (1, 2, 4)
    ]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_approach_the_front(sampler: Any) -> None:
    space = {"x": Range(1, 8), "y": Range(0.0, 2.0)}
    front = tune(made, space, Known(), sampler=sampler, trials=25)
    assert len(front.points) == 25
    assert all(1 <= p.parameters["x"] <= 8 and isinstance(p.parameters["x"], int) for p in front.points)
    assert min(p.parameters["y"] for p in front.best) < 0.3


def test_a_study_goes_on_from_its_journal(tmp_path: Path) -> None:
    journal, known = tmp_path / "study.journal", Known()
    first = tune(made, SPACE, known, sampler="tpe", trials=4, storage=journal)
    again = tune(made, SPACE, known, sampler="tpe", trials=6, storage=journal)
    assert known.calls == 6 and again.points[:4] == first.points
    assert tune(made, SPACE, known, sampler="tpe", trials=6, storage=journal) == again and known.calls == 6
    tune(made, SPACE, known, sampler="tpe", trials=1, storage=journal, study="other")
    assert known.calls == 7


def test_a_study_with_other_arguments_is_not_continued(tmp_path: Path) -> None:
    """Otherwise its trials would get the names of other objectives, or lack parameters."""
    arguments = {"space": SPACE, "objectives": ("error", "flops"), "make_policy": made, "evaluate": Known()}
    stored: dict[str, Any] = {"sampler": "grid", "storage": tmp_path / "a.journal"}
    tune(**arguments, **stored)

    def other(**parameters: Any) -> Policy:
        return made(**parameters)

    for name, value, says in (
        ("objectives", ("flops", "error"), "objectives: error, flops, not flops, error"),
        ("space", SPACE | {"x": [1, 2]}, r"space of x: \[1, 2, 4\], not \[1, 2\]"),
        ("make_policy", other, "policy: made, not .*other"),
        ("evaluate", Evaluation(tiny.build(), sample, seeds=(3,)), r"model: None.*seeds: None, not \[3\]"),
    ):
        with pytest.raises(OtherStudy, match=f"'dit_rewrite' was made with other arguments .*{says}"):
            tune(**arguments | {name: value}, **stored)
    assert len(tune(**arguments, **stored).points) == 6


def test_arguments_that_fail_in_a_trial_are_refused() -> None:
    def run(make_policy: Any = FORA, space: Any = None, objectives: Any = ("error", "flops")) -> Front:
        return tune(make_policy, space or {"interval": [2]}, lambda _: [{"error": 1.0, "flops": 1.0}], trials=1,
                    objectives=objectives)  # fmt: skip

    assert len(run().points) == 1
    for given, says in (
        ({"make_policy": "fora"}, "make_policy='fora'"),
        ({"space": {"intervall": [2]}}, "parameters of the policy: interval, kinds"),
        ({"space": {"interval": Range(5, 2)}}, "low <= high"),
        ({"space": {"interval": Range(0.0, 1.0, log=True)}}, "low > 0 with log"),
        ({"objectives": ("error", "lpips")}, "names that `evaluate` yields: error, flops"),
    ):
        with pytest.raises(BadParameter, match=says):
            run(**given)


def test_no_trial_begins_after_the_timeout(tmp_path: Path) -> None:
    def slow(policy: Policy) -> Iterator[dict[str, float]]:
        time.sleep(0.3)
        yield from Known()(policy)

    journal = tmp_path / "study.journal"
    assert 0 < len(tune(made, SPACE, slow, sampler="grid", storage=journal, timeout=0.5).points) < 6
    assert len(tune(made, SPACE, Known(), sampler="grid", storage=journal).points) == 6


def test_a_database_is_shared(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    tune(made, SPACE, Known(), sampler="grid", trials=2, storage=url)
    assert len(tune(made, SPACE, Known(), sampler="grid", storage=url).points) == 6


class Slow(Known):
    """Yields the same after each of three seeds."""

    def __call__(self, policy: Policy) -> Iterator[dict[str, float]]:
        for _ in range(3):
            yield from super().__call__(policy)


def test_hopeless_trials_are_pruned_after_a_seed() -> None:
    space = {"x": [1], "y": [0, 4]}
    slow = Slow()
    front = tune(made, space, slow, sampler="grid", seed=1)
    first = front.points[0].parameters["y"]
    assert (slow.calls, front.pruned) == ((4, 1) if first == 0 else (6, 0))
    plain = Slow()
    assert tune(made, space, plain, sampler="grid", prune=False).pruned == 0 and plain.calls == 6


def test_hopeless() -> None:
    finished = [[[0.1, 0.5], [0.1, 0.5]]]
    assert is_hopeless([[0.3, 0.5]], finished)
    assert not is_hopeless([[0.15, 0.5]], finished)  # not half as bad
    assert not is_hopeless([[0.3, 0.4]], finished)  # cheaper
    assert not is_hopeless([[0.3, 0.5], [0.3, 0.5]], finished)  # at the end
    assert not is_hopeless([[0.3, 0.5]], [])


def test_refused_parameters_are_pruned() -> None:
    front = tune(FORA, {"interval": [0, 2]}, lambda policy: [{"error": 1.0, "flops": 1.0}], sampler="grid")
    assert [p.parameters for p in front.points] == [{"interval": 2}] and front.pruned == 1


def test_the_reason_for_a_refusal_is_reported() -> None:
    """If all trials were refused, there is no front: an error has the reason."""
    lines: list[str] = []

    def never(policy: Policy) -> list[dict[str, float]]:
        raise AssertionError(policy)

    for space in ({"interval": [0, 2.5]}, {"interval": Range(2.1, 2.9)}):
        with pytest.raises(AllRefused, match=r"all 2 trials\..*The last reason: FORA: interval=.* is out of range"):
            tune(FORA, space, never, sampler="tpe", trials=2, report=lines.append)
    assert all("interval as a whole number" in line for line in lines) and len(lines) == 4


def test_files_of_a_front(tmp_path: Path) -> None:
    space: dict[str, Any] = {"interval": [2, 3], "anchor": ["start", "paper"]}

    def evaluate(policy: Policy) -> list[dict[str, float]]:
        interval = 2 if "interval=2" in policy.name else 3
        return [{"error": float(interval), "flops": 1 / interval + ("paper" in policy.name)}]

    front = tune(FORA, space, evaluate, sampler="grid")
    folder = front.save(tmp_path / "front")
    listed = json.loads((folder / "front.json").read_text())["trials"]
    best = [t for t in listed if t["front"]]
    assert len(listed) == 4 and len(best) == 2
    for trial in best:
        assert parse(str(folder / trial["policy"])) == FORA(**trial["parameters"])
    assert (folder / "front.md").read_text().count("\n| ") == 2
    assert front.plot(tmp_path / "front.png").stat().st_size > 1000


def test_equal_points_stand_once_in_the_front() -> None:
    points = tuple(Point(i, {}, {"error": e, "flops": 1.0}, Policy()) for i, e in enumerate((0.2, 0.1, 0.1)))
    assert [p.number for p in Front(("error", "flops"), points).best] == [1]


def test_fora_on_a_model() -> None:
    """Longer intervals cost less and err more; the plain policy errs nothing."""
    evaluate = Evaluation(tiny.build(), sample, (0, 1), backend="aot_eager")
    front = tune(FORA, {"interval": [1, 2, 5]}, evaluate, sampler="grid")
    found = {p.parameters["interval"]: p.values for p in front.points}
    assert found[1]["flops"] == 1 and found[1]["error"] < 1e-5
    assert found[5]["flops"] < found[2]["flops"] < 1 and 0 < found[2]["error"] < found[5]["error"]


@pytest.mark.parametrize(
    "given",
    [
        {"space": {}, "sampler": "grid"},
        {"space": {"x": []}, "sampler": "grid"},
        {"space": {"x": Range(0, 1)}, "sampler": "grid"},
        {"space": SPACE, "sampler": "random"},
        {"space": SPACE, "sampler": "tpe"},
        {"space": SPACE, "sampler": "grid", "objectives": ("error", "error")},
    ],
)
def test_invalid_arguments_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter):
        tune(made, given.pop("space"), Known(), **given)


def test_optuna_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"dit_rewrite\[tune\]"):
        tune(made, SPACE, Known(), sampler="grid")
