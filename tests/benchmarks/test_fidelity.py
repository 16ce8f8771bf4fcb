"""The fidelity benchmark: its claims by hand, its counts, its toys and solvers, and a few rows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

import dit_rewrite  # noqa: E402
from benchmarks.fidelity import run as fidelity  # noqa: E402
from benchmarks.fidelity.claims import best_control, by_calls, by_flops, by_time, judge  # noqa: E402
from benchmarks.fidelity.report import front  # noqa: E402
from benchmarks.fidelity.rows import (  # noqa: E402
    STEPS,
    UNCACHED,
    Result,
    Row,
    Timing,
    control,
    forecast,
    policies,
    recipes,
)
from benchmarks.fidelity.toys import TOYS, Toy, calls  # noqa: E402
from benchmarks.record import Claim  # noqa: E402
from benchmarks.timing import Spread  # noqa: E402
from dit_rewrite.module import twin  # noqa: E402
from dit_rewrite.policies import as_policy  # noqa: E402
from dit_rewrite.policy.rules import Policy  # noqa: E402


def row(
    name: str, error: float, computed: int, *, family: str = "Forecast", time: float | None = None, **more: Any
) -> Row:
    """A row with calls / 50 as its FLOPs, and twice the other error to the reference, unless given."""
    reference, flops = more.pop("reference", 2 * error), more.pop("flops", computed / 50)
    key = {"name": name, "family": family, "policy": None, "solver": None, "steps": 0, "settings": more}
    spread = None if time is None else Spread(time, time, time, 3)
    result = Result(key, computed, flops, error, [error], reference, [reference])
    return Row("class", result, None if spread is None else Timing(spread, spread))


def fewer(solver: str, steps: int, error: float, **more: Any) -> Row:
    return row(f"{solver}, {steps} steps", error, steps, family=STEPS, solver=solver, **more)


CONTROLS = [
    row(UNCACHED, 0.0, 50, family=STEPS, solver="DDIM", time=1.0),
    fewer("DDIM", 20, 0.04, time=0.4),
    fewer("DDIM", 10, 0.16, time=0.2),
    fewer("UniPC", 10, 0.09, time=0.3),
]


def claim_of(rows: list[Row], name: str) -> Claim:
    (claim,) = (claim for claim in judge(rows) if claim.claim == name)
    return claim


# --- the best run with fewer steps ------------------------------------------------------------------------------------


def test_the_best_control_is_the_least_error_of_any_solver_at_the_cost() -> None:
    assert best_control(CONTROLS, by_calls, 10) == (0.09, "UniPC")
    assert best_control(CONTROLS, by_calls, 9) is None
    assert best_control(CONTROLS, by_calls, 20) == (0.04, "DDIM")
    assert best_control(CONTROLS, by_calls, 10, "reference_error") == (0.18, "UniPC")


def test_between_two_controls_of_a_solver_the_logarithm_is_interpolated() -> None:
    assert best_control(CONTROLS, by_calls, 15) == (pytest.approx(0.08), "DDIM")  # sqrt(0.04 * 0.16)
    assert best_control(CONTROLS, by_calls, 18) == (pytest.approx(0.16**0.2 * 0.04**0.8), "DDIM")
    assert best_control(CONTROLS, by_calls, 35) == (pytest.approx(0.02), "DDIM")  # towards 0, in a straight line


def test_more_steps_that_are_worse_do_not_hide_fewer_that_are_better() -> None:
    rows = [fewer("DDIM", 10, 0.05), fewer("DDIM", 20, 0.2)]
    assert best_control(rows, by_calls, 20) == (0.05, "DDIM")


def test_time_and_calls_are_different_costs() -> None:
    assert best_control(CONTROLS, by_time, 0.25) == (pytest.approx(0.16**0.75 * 0.04**0.25), "DDIM")
    assert best_control(CONTROLS, by_flops, 0.2) == (0.09, "UniPC")


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "held"), [(0.079, True), (0.081, False)])
def test_policies_are_judged_at_equal_time_and_equal_flops(error: float, held: bool) -> None:
    rows = [*CONTROLS, row("policy", error, 15, time=0.3), row("untimed", 0.001, 15)]
    by_the_clock = claim_of(rows, "class: Forecast beats fewer steps at equal time")
    assert (by_the_clock.held, len(by_the_clock.evidence)) == (held, 1)
    computed = claim_of(rows, "class: A policy beats fewer steps at equal FLOPs")
    assert (computed.held, len(computed.evidence)) == (held, 2)


def test_most_settings_are_more_than_half_of_them() -> None:
    name = "class: In most settings, a policy beats fewer steps at equal FLOPs"
    rows = [*CONTROLS, row("worse", 9.0, 15), row("closer", 0.001, 15)]
    assert claim_of(rows, name).held is False
    assert claim_of([*rows, row("closer too", 0.001, 15)], name).held is True
    assert claim_of(CONTROLS, name).held is None


def test_more_than_a_fourfold_saving_is_not_asked_of_a_policy() -> None:
    rows = [*CONTROLS, row("policy", 9.0, 12)]
    assert claim_of(rows, "class: A policy beats fewer steps at equal FLOPs").held is None
    assert claim_of([*rows, row("other", 9.0, 13)], "class: A policy beats fewer steps at equal FLOPs").held is False


def test_the_reference_is_a_judge_of_its_own() -> None:
    rows = [*CONTROLS, row("policy", 0.01, 20, reference=0.09)]
    assert claim_of(rows, "class: A policy beats fewer steps at equal FLOPs").held is True
    assert claim_of(rows, "class: Judged by the reference, a policy beats fewer steps at equal FLOPs").held is False


def setting(error: float, order: int, place: str, interval: int = 2, basis: str = "taylor", computed: int = 25) -> Row:
    name = f"{order} {place} {interval} {basis}"
    return row(name, error, computed, order=order, place=place, interval=interval, basis=basis)


def test_a_forecast_is_compared_with_reuse_at_its_place_and_interval() -> None:
    rows = [setting(0.1, 0, "output"), setting(0.2, 0, "branches"), setting(0.3, 0, "output", 3)]
    claim = claim_of([*rows, setting(0.15, 1, "branches"), setting(0.09, 2, "output")], "class: A forecast beats reuse")
    assert [e["held"] for e in claim.evidence] == [True, True]
    assert claim_of([*rows, setting(0.15, 1, "output")], "class: A forecast beats reuse").held is False


def test_the_output_may_be_a_tenth_worse_than_branches() -> None:
    name = "class: Forecasting the output is as good as forecasting branches"
    rows = [setting(0.1, 1, "branches"), setting(0.5, 1, "branches", 3)]
    assert claim_of([*rows, setting(0.109, 1, "output")], name).held is True
    assert claim_of([*rows, setting(0.111, 1, "output")], name).held is False
    assert claim_of(rows, name).held is None


def test_targets_ask_for_a_bound_and_for_a_share_of_the_best_control() -> None:
    name = "class: Order 1 at its best place is as close as was aimed at"
    rows = [*CONTROLS, setting(0.0109, 1, "output"), setting(0.5, 1, "branches")]
    (met,) = claim_of(rows, name).evidence
    assert met["held"] and met["row"] == "1 output 2 taylor" and met["solver"] == "DDIM"
    assert claim_of([*CONTROLS, setting(0.0111, 1, "output")], name).held is False
    near = [*CONTROLS, fewer("UniPC", 25, 0.021)]  # 0.0109 is more than half of it
    assert claim_of([*near, setting(0.0109, 1, "output")], name).held is False


def test_the_best_policy_at_a_number_of_calls_may_not_cost_more_flops() -> None:
    name = "class: The best policy at about 17 computed steps"
    dear = row("dear", 0.001, 2, flops=0.9)  # nearly all calls compute some of the sites
    late = row("late", 0.001, 19)
    assert claim_of([*CONTROLS, dear, late], name).held is None
    assert claim_of([*CONTROLS, dear, late, row("good", 0.0119, 18)], name).held is True
    assert claim_of([*CONTROLS, dear, late, row("bad", 0.0121, 17)], name).held is False


def test_without_an_aim_the_best_policy_is_judged_by_fewer_steps() -> None:
    name = "class: The best policy at about 10 computed steps"
    assert claim_of([*CONTROLS, fewer("UniPC", 11, 0.05), row("good", 0.049, 10)], name).held is True
    assert claim_of([*CONTROLS, fewer("UniPC", 11, 0.05), row("bad", 0.051, 10)], name).held is False


def test_the_front_has_what_nothing_is_both_cheaper_and_closer_than() -> None:
    rows = [row("a", 0.1, 10), row("b", 0.2, 20), row("c", 0.05, 30), row("d", 0.05, 31)]
    assert [r.name for r in front(rows, by_flops, "error")] == ["a", "c"]
    assert front(rows, by_time, "error") == []


# --- rows and toys ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys() -> dict[str, Toy]:
    return {name: make() for name, make in TOYS.items()}


def test_every_row_of_a_toy_has_a_name_of_its_own(toys: dict[str, Toy]) -> None:
    for toy in toys.values():
        names = [recipe.name for recipe in recipes(toy, 50)]
        assert len(set(names)) == len(names)
    assert {r.settings["order"] for r in policies() if r.family == "Forecast"} == {1, 2}


def test_solvers_call_the_denoiser_as_often_as_they_are_said_to(toys: dict[str, Toy]) -> None:
    for toy in toys.values():
        for solver, make in toy.solvers.items():
            scheduler = make()
            scheduler.set_timesteps(5)
            assert len(scheduler.timesteps) == calls(solver, 5)


def test_solvers_of_flow_matching_end_in_a_whole_step(toys: dict[str, Toy]) -> None:
    for make in toys["flow"].solvers.values():
        scheduler = make()
        scheduler.set_timesteps(4)
        levels = torch.unique(scheduler.sigmas).flip(0)
        assert torch.allclose(levels, torch.tensor([1, 0.75, 0.5, 0.25, 0]), atol=2e-3)


def test_solvers_without_clipping_approach_one_solution(toys: dict[str, Toy]) -> None:
    toy = toys["class_unclipped"]
    images = {solver: toy.run(toy.denoiser, 2, 25, solver) for solver in toy.solvers}
    assert all(fidelity.relative_l2(images[solver], images[toy.sampler]) < 0.03 for solver in images)


@pytest.mark.parametrize(
    ("place", "low", "high"), [("branches", 0.5, 0.52), ("stack", 0.5, 0.52), ("output", 0.5, 0.5)]
)
def test_computed_calls_and_flops_are_counted(toys: dict[str, Toy], place: str, low: float, high: float) -> None:
    toy = toys["class"]
    model = dit_rewrite.compile(twin(toy.denoiser), forecast(2, 1, place).policy, backend="aot_eager")
    toy.run(model, 1, 4)
    computed, flops = fidelity.flops_of(model)
    assert computed == 2
    assert low <= flops <= high


def test_rows_of_step_tables_are_counted_for_all_steps(toys: dict[str, Toy]) -> None:
    """Reusing steps read the modulation from rows, which are computed for the computing steps too."""
    with_table, without = (_flops(toys["class"], forecast(2, 0, "branches").policy, off) for off in (False, True))
    assert with_table > without > 0.5


def test_steps_that_decide_in_the_middle_of_a_call_read_no_step_table(toys: dict[str, Toy]) -> None:
    policy = as_policy("first_block_cache:threshold=1000")
    with_table, without = (_flops(toys["class"], policy, off) for off in (False, True))
    assert with_table == without < 0.5


def _flops(toy: Toy, policy: Policy | None, off: bool) -> float:
    assert policy is not None
    disabled = ("step_tables",) if off else ()
    model = dit_rewrite.compile(twin(toy.denoiser), policy, backend="aot_eager", disable_passes=disabled)
    toy.run(model, 1, 4)
    return fidelity.flops_of(model)[1]


# --- a run ------------------------------------------------------------------------------------------------------------


def arguments(folder: Path, *more: str) -> list[str]:
    small = ["--toys", "class", "--images", "2", "--timed-images", "1", "--steps", "4", "--backend", "aot_eager"]
    return [*small, "--out", str(folder / "out.json"), "--docs", str(folder / "docs"), *more]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fidelity.toys.DIFFUSION_REFERENCE", 8)
    monkeypatch.setattr("benchmarks.fidelity.rows.NUMBERS", (2,))


@pytest.mark.usefixtures("quick")
def test_rows_are_measured_once_and_times_can_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["--rows", "order 1, output, 2", "UniPC*", "--rounds", "1"]
    fidelity.main(arguments(tmp_path, *wanted, "--no-time"))
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content["sections"]) == ["errors, class"]
    rows = content["sections"]["errors, class"]
    assert list(rows) == [UNCACHED, "UniPC, 2 steps", "order 1, output, 2"]
    assert rows[UNCACHED]["error"] == 0 and rows[UNCACHED]["reference_error"] > 0
    assert (rows["UniPC, 2 steps"]["computed"], rows["UniPC, 2 steps"]["flops"]) == (2, 0.5)
    forecasted = rows["order 1, output, 2"]
    assert (forecasted["computed"], forecasted["flops"]) == (2, 0.5)
    assert forecasted["error"] > 0 and len(forecasted["errors"]) == 2

    monkeypatch.setattr(fidelity.Bench, "errors", None)  # measuring would need it
    fidelity.main(arguments(tmp_path, *wanted, "--timed", "Forecast"))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["sections"]["errors, class"] == rows
    (timed,) = content["sections"]["times, class"].values()
    assert timed["ratio"]["runs"] == 1 and timed["late_variants"] == 0
    assert (tmp_path / "docs" / "fidelity_class.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "docs" / "fidelity.md").read_text()
    assert "| order 1, output, 2 | 2 | 0.500 |" in page and "- A forecast beats reuse: **open**" in page


@pytest.mark.usefixtures("quick")
def test_a_row_of_another_policy_under_its_name_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "draw", lambda *_: None)
    out = tmp_path / "out.json"
    fidelity.main(arguments(tmp_path, "--rows", "UniPC*", "--no-time"))
    content = json.loads(out.read_text())
    content["sections"]["errors, class"]["UniPC, 2 steps"]["key"]["steps"] = 3
    content["sections"]["errors, class"]["UniPC, 2 steps"]["error"] = 9.0
    out.write_text(json.dumps(content))
    fidelity.main(arguments(tmp_path, "--rows", "UniPC*", "--no-time"))
    assert json.loads(out.read_text())["sections"]["errors, class"]["UniPC, 2 steps"]["error"] < 9


@pytest.mark.usefixtures("quick")
def test_outdated_counts_are_made_again_without_the_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decisions of a policy that measures depend on the images: its errors are measured anew too."""
    monkeypatch.setattr(fidelity, "draw", lambda *_: None)
    out, wanted = tmp_path / "out.json", ["--rows", "order 1, output, 2", "first_block_cache:threshold=0.02", "UniPC*"]
    fidelity.main(arguments(tmp_path, *wanted, "--no-time"))
    right = json.loads(out.read_text())["sections"]["errors, class"]
    wrong = {name: {**found, "flops": 9.0, "error": 9.0, "counted": 1} for name, found in right.items()}
    out.write_text(json.dumps({**json.loads(out.read_text()), "sections": {"errors, class": wrong}}))
    fidelity.main(arguments(tmp_path, *wanted, "--recount"))
    again = json.loads(out.read_text())["sections"]["errors, class"]
    follows, measures = "order 1, output, 2", "first_block_cache:threshold=0.02"
    assert again[follows] == {**right[follows], "error": 9.0}
    assert again[measures] == right[measures]
    assert again["UniPC, 2 steps"]["flops"] == 9.0, "a control is counted in calls"


def test_controls_have_no_policy_and_policies_no_solver(toys: dict[str, Toy]) -> None:
    assert control("UniPC", 8).is_control and control("UniPC", 8).steps == 8
    assert all((r.policy is None) != (r.calibrated is None) and r.solver is None for r in policies())
