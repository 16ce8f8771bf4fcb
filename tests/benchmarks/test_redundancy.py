"""The redundancy benchmark: its numbers on a planted analysis, its claims, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("rich")

import dit_rewrite
from benchmarks.redundancy import run as redundancy
from benchmarks.redundancy.claims import judge
from benchmarks.redundancy.report import render
from tests.helpers.planted import CHANNELS, RATES, Planted, planted_calls

ROOT = Path(__file__).parents[2]


def quantity(first: float = 1.0, last: float = 1.0, **other: Any) -> dict[str, Any]:
    """The numbers of one quantity, as `redundancy.shape` returns them."""
    thirds = {"first_third": first, "middle_third": 0.5, "last_third": last}
    found = {"l1": 1.0, "relative_l1": 0.5, "cosine": 0.9, "with_depth": 0.9, "profile": [3.0, 2.0, 1.0, 0.5]}
    return found | thirds | {"variation": [0.1, 0.0, 0.2], "prompts": [0.9, 0.8, 3]} | other


def toy(**changes: Any) -> dict[str, Any]:
    """The results of one toy."""
    quantities = {name: quantity() for name in ("keys", "values", "mlp", "block")}
    quantities |= {name: quantity(relative_l1=0.8) for name in ("attention", "branch")} | changes
    stable = {name: [0.9, 0.8, 5] for name in ("keys", "values", "attention", "branch", "mlp")}
    base = {
        "quantities": quantities,
        "trends": {"values": 0.9, "attention": 0.7},
        "guidance": {"relative_l1": 0.2},
        "windows": {"residual": 0.1, "mse": 0.2},
    }
    best = {"quantity": "value", "measure": "l1", "overall": 0.6, "among_sites": 0.2, "pairs": 9}
    return {"base": base, "14 steps": stable, "Heun": stable, "errors": {"predictions": [best]}}


def test_numbers_of_a_planted_model() -> None:
    """Steps fall by 1 to 4, so that later ones change more; all MLPs alike relative to their size."""
    found = dit_rewrite.analyze(Planted(), [planted_calls(5), planted_calls(5, 1)], backend="aot_eager")
    shape = redundancy.shape(found, "mlp")
    assert shape["rows"] == len(RATES)
    assert shape["l1"] == pytest.approx(1.5 * 2.5 * sum(RATES) / len(RATES) / CHANNELS)
    assert shape["with_progress"] == pytest.approx(1)
    assert shape["last_third"] == pytest.approx(4 * shape["first_third"])
    assert shape["variation"][0] == pytest.approx(0.5 * 2**0.5 / 1.5)
    assert shape["prompts"] == [pytest.approx(1), pytest.approx(1), len(RATES)]
    assert redundancy.same_trend(found, "keys", "attention") == pytest.approx(1)
    json.dumps(shape, allow_nan=False)


def test_claims_are_judged_by_their_numbers() -> None:
    claims = {claim.claim: claim for claim in judge({"class": toy(), "flow": toy(attention=quantity(last=3.0))})}
    held = {claim.partition(" (")[0]: found.held for claim, found in claims.items()}
    assert held["Prompts change the L1 distances by 10 to 15 %"]
    assert held["It is the same with 14 and with 56 steps"]
    assert held["It is the same under another scheduler"]
    assert held["Keys, values and attention have one trend"] is False, "0.7 is below the bound"
    assert held["Attention changes more than keys and values"] is False, "in the second toy they change alike"
    assert held["Later steps change more than early ones"] is False
    assert held["The middle steps change least"]
    assert held["The distribution over steps differs between models"] is False, "both have one profile"
    evidence = claims["It is the same under another scheduler"].evidence
    assert {each["what"] for each in evidence} == {f"Heun: {name}" for name in ("keys", "values", "attention")}
    assert all(claim.held is None for claim in judge({}))


def test_the_page_is_rendered_from_its_results() -> None:
    """`python -m benchmarks.redundancy --page` renders it anew."""
    content = json.loads((ROOT / "benchmarks" / "results" / "redundancy.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "redundancy.md").read_text(encoding="utf-8") == render(content)
    assert {"class", "text", "flow", "families"} <= content["sections"].keys()
