"""The search of a plan, against algorithm 1 of DiTFastAttn in plain Python, on models of exactly known losses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_rewrite.errors import BadParameter, BadPlan, MissingExtra, PlanMismatch
from dit_rewrite.policy.plan import Choice, PlanRow, Table
from dit_rewrite.search.greedy import DELTAS, STRATEGIES, Found, greedy, loss
from dit_rewrite.search.metrics import Metric, metric_of, relative_error

FULL, AST, ASC, WA_RS, WA_RS_ASC = Choice

# The loss of a step's output, from the rows of the steps before and the choices of all sites in this one.
Losses = Callable[[Table, PlanRow], Fraction]

LARGE = 2.0**60  # eps is far below its last digit, so that the error of LARGE * (1 - x) is x exactly


class Interrupted(Exception):
    pass


class Fake:
    """A model that consists of its losses; refuses calls that are out of order, and records those that cost a run."""

    def __init__(self, losses: Losses, sites: int, stop_at: tuple[int, int] | None = None) -> None:
        self.losses = losses
        self.sites = sites
        self.stop_at = stop_at  # the step and site whose first attempt is interrupted
        self.history: Table = ()
        self.row: PlanRow | None = None
        self.work = 0.0
        self.replayed: list[PlanRow] = []
        self.begun: list[int] = []
        self.attempts: list[tuple[int, int, Choice]] = []
        self.given = [torch.full((2, 3), LARGE), torch.full((2,), -LARGE)]

    def replay(self, row: PlanRow) -> None:
        assert self.row is None
        assert len(row) == self.sites
        self.history += (row,)
        self.replayed.append(row)
        self.work += 1

    def begin(self, step: int) -> None:
        assert self.row is None
        assert step == len(self.history)
        self.begun.append(step)
        self.row = ()

    def reference(self) -> list[Tensor]:
        assert self.row == ()
        self.work += 1
        return self.outputs((FULL,) * self.sites)

    def attempt(self, index: int, choice: Choice) -> list[Tensor]:
        assert self.row is not None
        assert index == len(self.row) < self.sites
        step = len(self.history)
        if (step, index) == self.stop_at:
            raise Interrupted
        self.attempts.append((step, index, choice))
        self.work += Fraction(self.sites - index, self.sites)
        return self.outputs((*self.row, choice, *(FULL,) * (self.sites - index - 1)))

    def fix(self, index: int, choice: Choice) -> None:
        assert self.row is not None
        assert index == len(self.row) < self.sites
        self.row += (choice,)

    def finish(self) -> None:
        assert self.row is not None
        assert len(self.row) == self.sites
        self.history, self.row = (*self.history, self.row), None
        self.work += 1

    def outputs(self, row: PlanRow) -> list[Tensor]:
        """Outputs in buffers that the next call overwrites."""
        error = float(self.losses(self.history, row))
        self.given[0].fill_(LARGE * (1 - error))
        self.given[1].fill_(-LARGE * (1 - error))
        return self.given


def algorithm_1(losses: Losses, sites: int, steps: int, delta: Fraction, choices: PlanRow) -> tuple[Table, int]:
    """The paper's algorithm, in fractions: layers count from 1; S is in ascending cost, so that the strategy "with the
    highest computation reduction ratio" is the first that passes; the first step is not compressed. Also returns the
    number of candidates tried."""
    table: list[list[Choice]] = [[FULL] * sites]
    tried = 0
    for t in range(1, steps):
        history = tuple(map(tuple, table))
        table.append([FULL] * sites)
        for i in range(1, sites + 1):
            for m in choices:
                table[t][i - 1] = m
                tried += 1
                if losses(history, tuple(table[t])) < Fraction(i, sites) * delta:
                    break
                table[t][i - 1] = FULL
    return tuple(map(tuple, table)), tried


def names(sites: int) -> list[str]:
    return [f"blocks.{i}.attn" for i in range(sites)]


def listed(losses: dict[Choice, list[Fraction]]) -> Losses:
    """A loss for each choice and site, the same at each step; the losses of one row add up."""

    def total(history: Table, row: PlanRow) -> Fraction:
        return sum((losses[choice][i] for i, choice in enumerate(row) if choice is not FULL), Fraction(0))

    return total


def drawn(seed: int) -> Losses:
    """Losses in 64ths that depend on the whole row and on the row before, and often equal a threshold."""

    def total(history: Table, row: PlanRow) -> Fraction:
        if all(choice is FULL for choice in row):
            return Fraction(0)
        before = history[-1] if history else ()
        return Fraction(random.Random(f"{seed} {len(history)} {before} {row}").randrange(0, 9), 64)

    return total


# --- the algorithm ----------------------------------------------------------------------------------------------------


def test_by_hand():
    """Two sites, delta 1/8: thresholds 1/16 and 1/8. The first takes WA-RS (1/32), which leaves the second 3/32."""
    n = 32
    losses = {
        AST: [Fraction(3, n), Fraction(3, n)],
        WA_RS_ASC: [Fraction(2, n), Fraction(2, n)],
        WA_RS: [Fraction(1, n), Fraction(0)],
        ASC: [Fraction(0), Fraction(0)],
    }
    fake = Fake(listed(losses), sites=2)
    found = greedy(fake, names(2), 3, 0.125)
    assert found.table == ((FULL, FULL), (WA_RS, WA_RS_ASC), (WA_RS, WA_RS_ASC))
    one_step = [(0, AST), (0, WA_RS_ASC), (0, WA_RS), (1, AST), (1, WA_RS_ASC)]
    assert fake.attempts == [(step, *tried) for step in (1, 2) for tried in one_step]
    assert fake.replayed == [(FULL, FULL)]
    assert fake.begun == [1, 2]
    assert found.evaluations == 10
    assert found.work == 1 + 2 * (1 + 3 * 1 + 2 * 0.5 + 1)  # step 0; reference, candidates, the step itself
    assert found.share(4) == found.work / (3 * 4 * 2)


def test_a_loss_at_the_threshold_does_not_pass():
    """Two sites, delta 1/8: 1/16 at the first is refused, and so is 1/8 at the last; a hair below passes."""
    border, hair = [Fraction(1, 16), Fraction(1, 8)], Fraction(1, 2**20)
    below = [loss - hair for loss in border]
    assert greedy(Fake(listed({AST: border}), 2), names(2), 2, 0.125, [AST]).table[1] == (FULL, FULL)
    first = {AST: [below[0], border[1]]}
    assert greedy(Fake(listed(first), 2), names(2), 2, 0.125, [AST]).table[1] == (AST, FULL)
    last = {AST: [border[0], below[1]]}
    assert greedy(Fake(listed(last), 2), names(2), 2, 0.125, [AST]).table[1] == (FULL, AST)


def test_candidates_are_tried_in_the_order_given():
    """The first candidate that passes is taken, even where a later one is closer."""
    losses = listed({choice: [Fraction(n, 64)] for n, choice in enumerate((ASC, WA_RS, AST))})
    for order in ([AST, WA_RS, ASC], [ASC, WA_RS, AST], [WA_RS]):
        found = greedy(Fake(losses, 1), ["attn"], 2, 0.125, order)
        assert (found.table[1], found.evaluations) == ((order[0],), 1)


def test_the_paper_tries_the_cheapest_first():
    assert STRATEGIES == (AST, WA_RS_ASC, WA_RS, ASC)
    assert list(DELTAS) == ["D1", "D2", "D3", "D4", "D5", "D6"]
    assert list(DELTAS.values()) == [0.025, 0.05, 0.075, 0.1, 0.125, 0.15]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([Fraction(0), Fraction(1, 32), Fraction(1, 16), Fraction(1, 8), Fraction(1, 4)]),
    st.permutations(STRATEGIES).flatmap(lambda order: st.integers(1, 4).map(lambda n: tuple(order[:n]))),
)
@example(0, 4, 1, Fraction(1, 8), STRATEGIES)
def test_tables_are_those_of_algorithm_1(seed: int, sites: int, steps: int, delta: Fraction, choices: PlanRow):
    losses = drawn(seed)
    fake = Fake(losses, sites)
    found = greedy(fake, names(sites), steps, float(delta), choices)
    assert (found.table, found.evaluations) == algorithm_1(losses, sites, steps, delta, choices)
    assert found.table[0] == (FULL,) * sites
    assert found.evaluations == len(fake.attempts)
    if steps > 1:
        assert found.table == fake.history
        assert found.work == pytest.approx(float(fake.work))


def test_the_drawn_losses_reach_every_case():
    """Each choice, a loss exactly at a threshold, and an effect of the step before occur in some of the tables
    above."""
    rows = [algorithm_1(drawn(seed), 4, 3, Fraction(1, 8), STRATEGIES)[0] for seed in range(50)]
    assert {choice for table in rows for row in table for choice in row} == set(Choice)
    assert any(drawn(seed)(((FULL,) * 4,), (AST, FULL, FULL, FULL)) == Fraction(1, 32) for seed in range(50))
    assert drawn(1)(((AST,),), (AST,)) != drawn(1)(((ASC,),), (AST,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_passes_on_a_broken_output(value: float):
    """An output that is not finite proves nothing, whether it is the candidate's or the reference's."""
    for broken in ("attempt", "reference", "both"):

        class Broken(Fake):
            def outputs(self, row: PlanRow, broken: str = broken) -> list[Tensor]:
                outputs = super().outputs(row)
                is_reference = all(choice is FULL for choice in row)
                if broken == "both" or is_reference == (broken == "reference"):
                    outputs[0][0, 0] = value
                return outputs

        found = greedy(Broken(listed({AST: [Fraction(0)]}), 1), ["attn"], 2, 1.0, [AST])
        assert found.table == ((FULL,), (FULL,))
    assert greedy(Fake(listed({AST: [Fraction(0)]}), 1), ["attn"], 2, 1.0, [AST]).table == ((FULL,), (AST,))


def test_one_step_needs_no_model():
    fake = Fake(listed({}), 2)
    assert greedy(fake, names(2), 1, 0.1) == Found(((FULL, FULL),), 0, 0.0)
    assert fake.work == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": []}, r"sites=\(\)"),
        ({"sites": ["a", "a"]}, "names, each once"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"delta": -0.1}, "delta=-0.1"),
        ({"delta": math.nan}, "delta=nan"),
        ({"choices": []}, r"choices=\(\)"),
        ({"choices": [AST, FULL]}, "without Choice.FULL"),
        ({"choices": [AST, AST]}, "each once"),
        ({"choices": ["AST"]}, r"choices=\('AST',\)"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], says: str):
    arguments: dict[str, Any] = {"sites": ["a"], "steps": 2, "delta": 0.1} | changes
    with pytest.raises(BadParameter, match=f"search: .*{says}"):
        greedy(Fake(listed({}), 1), **arguments)


# --- the loss ------------------------------------------------------------------------------------------------------


def test_a_loss_is_over_the_elements_of_all_trajectories():
    """One element that is wrong by half and three that are right: 1/8, and not the mean of 1/2 and 0."""
    reference = [torch.full((1,), LARGE), torch.full((3,), LARGE)]
    assert loss(reference, [reference[0] / 2, reference[1]]) == 1 / 8
    assert loss(reference, reference) == 0


def test_shapes_must_be_those_of_the_reference():
    with pytest.raises(BadParameter, match=r"output.shape=\(1, 2\)"):
        relative_error(torch.ones(2, 2), torch.ones(1, 2))
    for other in ([torch.ones(4)], [torch.ones(2, 2), torch.ones(1)], []):
        with pytest.raises(BadParameter, match="loss: shapes=.*those of the reference"):
            loss([torch.ones(2, 2)], other)


# --- resuming after an interruption -----------------------------------------------------------------------------------


def resumed(partial: Path, stop_at: tuple[int, int], seed: int = 5) -> tuple[Found, Fake, Fake]:
    """A search that is interrupted and resumes with another runner; returns both runners."""
    first, second = Fake(drawn(seed), 4, stop_at), Fake(drawn(seed), 4)
    with pytest.raises(Interrupted):
        greedy(first, names(4), 5, 0.125, partial=partial)
    return greedy(second, names(4), 5, 0.125, partial=partial), first, second


@pytest.mark.parametrize("stop_at", [(1, 0), (2, 0), (3, 2), (4, 3)])
def test_going_on_gives_the_same_table(tmp_path: Path, stop_at: tuple[int, int]):
    """No finished step is searched again; it is only replayed."""
    found, first, second = resumed(tmp_path / "plan.json.partial", stop_at)
    whole = Fake(drawn(5), 4)
    expected = greedy(whole, names(4), 5, 0.125)
    assert (found.table, found.evaluations) == (expected.table, expected.evaluations)
    assert first.begun == list(range(1, stop_at[0] + 1))
    assert second.begun == list(range(stop_at[0], 5))
    done = [attempt for attempt in first.attempts if attempt[0] < stop_at[0]]
    assert done + second.attempts == whole.attempts
    if stop_at[0] > 1:  # step 1 was saved
        assert tuple(second.replayed) == found.table[: stop_at[0]]
        assert found.work == pytest.approx(float(whole.work + stop_at[0]))


def test_what_is_done_is_not_run_again(tmp_path: Path):
    partial = tmp_path / "plan.json.partial"
    found = greedy(Fake(drawn(5), 4), names(4), 3, 0.125, partial=partial)
    fake = Fake(drawn(5), 4)
    assert greedy(fake, names(4), 3, 0.125, partial=partial) == found
    assert fake.work == 0


def test_without_a_partial_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    greedy(Fake(drawn(5), 2), names(2), 3, 0.125)
    assert list(tmp_path.iterdir()) == []
    greedy(Fake(drawn(5), 2), names(2), 3, 0.125, partial=tmp_path / "p")
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"delta": 0.1}, "delta: 0.125 there, 0.1 here"),
        ({"steps": 6}, "steps: 5 there, 6 here"),
        ({"sites": ["a", "b", "c", "d"]}, "sites: "),
        ({"choices": [AST]}, "choices: "),
        ({"key": "another model"}, "key: '' there, 'another model' here"),
        ({"delta": 0.1, "steps": 6}, "steps: 5 there, 6 here; delta: 0.125 there, 0.1 here"),
    ],
)
def test_another_search_does_not_go_on_with_it(tmp_path: Path, changes: dict[str, Any], says: str):
    partial = tmp_path / "plan.json.partial"
    with pytest.raises(Interrupted):
        greedy(Fake(drawn(5), 4, (3, 0)), names(4), 5, 0.125, partial=partial)
    before = partial.read_bytes()
    arguments: dict[str, Any] = {"sites": names(4), "steps": 5, "delta": 0.125} | changes
    with pytest.raises(PlanMismatch, match=rf"plan\.json\.partial belongs to another search \({says}"):
        greedy(Fake(drawn(5), 4), **arguments, partial=partial)
    assert partial.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"table": []}, "a table of 1 to 5 rows"),
        ({"table": ["full full full full"] * 6}, "a table of 1 to 5 rows"),
        ({"table": ["full full full"]}, "a row does not have 4 choices"),
        ({"table": ["full full full none"]}, "choice='none'"),
        ({"table": "full"}, "a table of"),
        ({"evaluations": "3"}, "a count"),
        ({"work": -1}, "a count"),
        ({"version": 0}, "its version is 0"),
        ({"more": 1}, "unknown fields more"),
    ],
)
def test_damaged_partial_files(tmp_path: Path, changes: dict[str, Any], says: str):
    partial = tmp_path / "plan.json.partial"
    with pytest.raises(Interrupted):
        greedy(Fake(drawn(5), 4, (3, 0)), names(4), 5, 0.125, partial=partial)
    good = json.loads(partial.read_text())
    assert len(good["table"]) == 3
    partial.write_text(json.dumps(good | changes))
    with pytest.raises(BadPlan, match=f"cannot be used as a plan: .*{says}"):
        greedy(Fake(drawn(5), 4), names(4), 5, 0.125, partial=partial)
    partial.write_text(partial.read_text()[:-20])
    with pytest.raises(BadPlan, match="it is not JSON"):
        greedy(Fake(drawn(5), 4), names(4), 5, 0.125, partial=partial)
    partial.write_text(json.dumps(good | {"search": None}))
    with pytest.raises(PlanMismatch, match="it has no settings"):
        greedy(Fake(drawn(5), 4), names(4), 5, 0.125, partial=partial)


# --- several calls a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [None, (2, 0), (4, 1)], ids=str)
def test_each_call_of_a_step_is_searched(tmp_path: Path, stop_at: tuple[int, int] | None):
    """The calls of the first step are not compressed, each other is a row of algorithm 1, also when interrupted."""
    partial, settings = tmp_path / "p", {"calls": 2, "partial": tmp_path / "p"}
    large = [Fraction(1), Fraction(1)]
    passing = listed({AST: [Fraction(1, 32), Fraction(1)], WA_RS_ASC: large, WA_RS: large, ASC: large})
    fake = Fake(passing, 2, stop_at)
    if stop_at is not None:
        with pytest.raises(Interrupted):
            greedy(fake, names(2), 3, 0.125, **settings)
        fake = Fake(passing, 2)
    found = greedy(fake, names(2), 3, 0.125, **settings)
    assert found.table == ((FULL, FULL),) * 2 + ((AST, FULL),) * 4
    with pytest.raises(PlanMismatch, match="calls: 2 there, 3 here"):
        greedy(Fake(passing, 2), names(2), 3, 0.125, calls=3, partial=partial)
    with pytest.raises(BadParameter, match="calls=0"):
        greedy(Fake(passing, 2), names(2), 3, 0.125, calls=0)


# --- the progress bar -------------------------------------------------------------------------------------------------


def test_the_bar_counts_sites(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It starts at the count of the earlier session, and ends full."""
    pytest.importorskip("rich")
    partial = tmp_path / "p"
    with pytest.raises(Interrupted):
        greedy(Fake(drawn(5), 4, (3, 1)), names(4), 5, 0.125, partial=partial, progress=True)
    assert "9/16" in capsys.readouterr().err
    greedy(Fake(drawn(5), 4), names(4), 5, 0.125, partial=partial, progress=True)
    assert "16/16" in capsys.readouterr().err
    greedy(Fake(drawn(5), 4), names(4), 5, 0.125)
    assert capsys.readouterr() == ("", "")


def test_no_bar_without_rich(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(MissingExtra, match=r"the progress bar needs rich.*dit_rewrite\[demo\]"):
        greedy(Fake(drawn(5), 2), names(2), 3, 0.125, progress=True)
    assert len(greedy(Fake(drawn(5), 2), names(2), 3, 0.125).table) == 3


# --- other metrics (appendix A.7) -------------------------------------------------------------------------------------


class Planted(Fake):
    """A model of one site whose output is an image under each choice, in two trajectories."""

    def __init__(self, reference: Tensor, outputs: dict[Choice, Tensor]) -> None:
        super().__init__(listed({}), 1)
        self.images = {FULL: reference, **outputs}

    def outputs(self, row: PlanRow) -> list[Tensor]:
        return [self.images[(row or (FULL,))[-1]][None, None].clone() for _ in range(2)]


def planted() -> Planted:
    """Four damages: small values change their sign, one pixel is far off, all is larger, and the upper half lighter."""
    reference = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).double()
    reference[8:] = torch.where(reference[8:] < 0.5, -0.03, 0.03)
    signs, pixel, light = (reference.clone() for _ in range(3))
    signs[8:] *= -1
    pixel[0, 0] += 1.5
    light[:8] += 0.08
    return Planted(reference, {AST: signs, WA_RS: pixel, ASC: 1.3 * reference, WA_RS_ASC: light})


def furthest(reference: Tensor, output: Tensor) -> float:
    return float((output - reference).abs().max())


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("relative_error", WA_RS),  # one element of 256
        ("mse", AST),  # the signs are of small values
        ("psnr", AST),
        ("relative_l2", AST),
        ("cosine", ASC),  # the same direction
        ("ssim", WA_RS_ASC),  # the same structure
        (furthest, AST),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_each_metric_leads_the_search(metric: str | Metric, expected: Choice):
    """Of four damages each metric lets another pass: all others are above the threshold, and are tried before."""
    name, function = metric_of(metric)
    fake = planted()
    reference = [fake.images[FULL][None, None]] * 2
    losses = {choice: loss(reference, fake.outputs((choice,)), function) for choice in STRATEGIES}
    assert min(losses, key=losses.__getitem__) is expected
    least, second = sorted(losses.values())[:2]
    assert second > 1.05 * least
    order = [*(choice for choice in STRATEGIES if choice is not expected), expected]
    found = greedy(fake, ["attn"], 2, (least + second) / 2, order, metric=metric)
    assert (found.table[1], found.evaluations) == ((expected,), 4)
    assert name == (metric if isinstance(metric, str) else f"{__name__}.furthest")


def test_a_search_by_another_metric_is_not_continued(tmp_path: Path):
    path = tmp_path / "plan.json.partial"
    greedy(planted(), ["attn"], 2, 0.1, partial=path, metric="mse")
    assert greedy(planted(), ["attn"], 2, 0.1, partial=path, metric="mse").table
    with pytest.raises(PlanMismatch, match="metric: 'mse' there, 'psnr' here"):
        greedy(planted(), ["attn"], 2, 0.1, partial=path, metric="psnr")
    with pytest.raises(BadParameter, match="metric=3.*a function of two tensors"):
        greedy(planted(), ["attn"], 2, 0.1, metric=3)  # type: ignore[arg-type]
