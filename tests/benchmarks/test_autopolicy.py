"""What the autopolicy and tuning benchmarks conclude from made rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.autopolicy.report import write_page
from benchmarks.autopolicy.run import hand_set, judge
from benchmarks.fidelity.rows import STEPS as CONTROLS
from benchmarks.record import Record
from benchmarks.tuning import shares


@pytest.fixture
def fidelity(tmp_path: Path) -> Path:
    """Two policies on the front, one that is dominated, and a control."""

    def row(name: str, family: str, flops: float, error: float) -> dict[str, object]:
        return {"key": {"name": name, "family": family}, "flops": flops, "error": error}

    rows = [row("a", "FORA", 0.2, 0.04), row("b", "FoCa", 0.4, 0.01), row("c", "FORA", 0.3, 0.05)]
    rows.append(row("d", CONTROLS, 0.1, 0.001))
    path = tmp_path / "fidelity.json"
    path.write_text(json.dumps({"sections": {"errors, class": {str(i): r for i, r in enumerate(rows)}}}))
    return path


def test_hand_set_policies_are_interpolated_along_their_front(fidelity: Path) -> None:
    assert hand_set("class", 0.3, fidelity) == (pytest.approx(0.02), "a")
    assert hand_set("class", 0.39, fidelity) == (pytest.approx(0.01072, rel=1e-3), "b")
    assert hand_set("class", 0.1, fidelity) is None and hand_set("text", 0.3, fidelity) is None


def found(cost: float, error: float) -> dict[str, object]:
    control = {"solver": "UniPC", "steps": 15, "error": 0.03}
    return {
        "cost": cost, "error": error, "low": 0.0, "high": 0.1, "computed": [0, 1], "style": "fitted", "place": "output",
        "winner": "policy", "rank_correlation": 0.9, "search_seconds": 9.0, "measuring_seconds": 9.0,
        "control": control,
    }  # fmt: skip


def test_claims_and_page(fidelity: Path, tmp_path: Path) -> None:
    """One bound holds and one does not; half of the control's error is kept once of two."""
    record = Record(tmp_path / "out.json", {})
    record.sections["class"] = {
        "speedup=3": found(0.3, 0.014),
        "speedup=2": found(0.6, 0.016),
        "max_error=0.01": found(0.3, 0.01),
    }
    unseen = {"unseen": 96, "mean": 0.011, "typical": 0.005, "fidelity": 0.015}
    record.sections["class, unseen"] = {"speedup=3": unseen, "speedup=2": unseen, "max_error=0.01": unseen}
    record.sections["class, even"] = {"speedup=3": {"mean": 0.022, "typical": 0.01}, "speedup=2": {"mean": 0.012}}
    bounds, even, typical, best, fewer = judge(record, fidelity)
    assert [e["held"] for e in even.evidence] == [True, False]
    assert [e["share"] for e in typical.evidence] == [0.5], "older rows have no typical error"
    assert [e["held"] for e in bounds.evidence] == [True, False, False]
    assert [e["bound"] for e in best.evidence] == ["speedup=3", "max_error=0.01"]
    assert [e["share"] for e in best.evidence] == pytest.approx([0.75, 0.75])
    assert [e["held"] for e in fewer.evidence] == [True, False]
    page = write_page(record, [bounds, even, typical, best, fewer], tmp_path).read_text()
    assert "| 0.0220 | 0.0050, even 0.0100 |" in page
    assert "| speedup=3 | 0.300 | 2 | fitted |" in page and "**not held** (1 of 2;" in page


def test_shares_of_variance() -> None:
    """The error depends on a alone; b varies independently."""
    trials = [{"parameters": {"a": a, "b": b}, "values": {"error": 10.0**-a}} for a in (1, 2, 3) for b in ("x", "y")]
    assert shares(trials) == pytest.approx({"a": 1.0, "b": 0.0})
    ranged = [{"parameters": {"a": i / 40}, "values": {"error": 10.0 ** (-i / 10)}} for i in range(40)]
    assert shares(ranged)["a"] > 0.9
