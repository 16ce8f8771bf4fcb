"""An interrupted search of a plan goes on where it stopped; its file, and its progress bar."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dit_rewrite.errors import BadParameter, BadPlan, MissingExtra, PlanMismatch
from dit_rewrite.search.greedy import Found, greedy
from tests.search.known_losses import ASC, AST, FULL, WA_RS, WA_RS_ASC, Fake, Interrupted, drawn, listed, names


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
