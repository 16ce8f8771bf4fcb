"""The reuse ratios of DQAR's paper: the policy's ratios, and which reading gives the paper's own figures."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from benchmarks import dqar_tables
from benchmarks.dqar_tables import LAYERS, SETTINGS, STEPS, Result, Setting, ddim
from tests.references import policies as reference

EQUATION_2 = {
    # warmup, share of the layers, SNR threshold: pairs of 1400 at which equation 2 reuses
    ("0.1", "0.33", None): 187,
    ("0.2", "0.33", None): 166,
    ("0.3", "0.33", None): 146,
    ("0.4", "0.33", None): 126,
    ("0.5", "0.33", None): 105,
    ("0.6", "0.33", None): 85,
    ("0.2", "0.5", None): 263,
    ("0.2", "0.66", None): 352,
    ("0.2", "0.75", None): 403,
    ("0.2", "1.0", None): 546,
    ("0.4", "0.33", "0.1"): 124,
    ("0.4", "0.33", "0.5"): 106,
}


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return dqar_tables.results()


def test_the_policy_counts_as_equation_2(results: list[Result]) -> None:
    """The counts above, and those of plain fractions (the reference of the models' tests)."""
    found = {(r.setting.warmup, r.setting.fraction, r.setting.snr): r.ours for r in results}
    assert {key: found[key] for key in EQUATION_2} == EQUATION_2
    snrs = reference.snr_table(ddim())
    for (warmup, fraction, snr), count in found.items():
        rows = reference.linear_schedule(STEPS, LAYERS, Fraction(warmup), Fraction(fraction))
        rows = rows if snr is None else reference.gated(rows, snrs, float(snr))
        assert sum(map(sum, rows)) == count


def test_by_hand() -> None:
    """Warmup 0.6, all layers of 28: step 30 is the first after 0.6 * 49 = 29.4; step 39 has (39 / 49 - 0.6) / 0.4 * 28
    = 13.71; the last step reuses all."""
    counts = [reference.reusable_layers(step, 50, Fraction("0.6"), Fraction(1), 28) for step in (29, 30, 31, 39, 49)]
    assert counts == [0, 0, 2, 13, 28]
    whole = Setting(0, "0.6", "1.0", None, "")
    assert dqar_tables.decided(whole, dqar_tables.levels_of(ddim())) == sum(
        (10 * step - 294) // 7 for step in range(30, 50)
    )


def test_capping_first_in_floating_point_gives_the_papers_figures(results: list[Result]) -> None:
    assert len(results) == len(SETTINGS) == 6 + 5 + 3 + 6
    assert [r.setting for r in results if not r.as_printed] == []
    assert [r.cap_first for r in results][:11] == [181, 162, 142, 123, 103, 84, 162, 262, 343, 402, 542]


def test_equation_2_reuses_more_than_the_paper_did(results: list[Result]) -> None:
    """By less than one percentage point, and never less; so no figure of the paper equals ours to its last digit."""
    for r in results:
        assert 0 < r.ours - r.cap_first <= 9
        assert dqar_tables.printed(r.ours, r.setting) != r.setting.ratio


def test_where_only_rounding_differs(results: list[Result]) -> None:
    """An integer number of layers rounded down from just below: 50, 75 and 100 % of the layers, whose caps are
    integers."""
    rounded = {r.setting.fraction: r.cap_first_exact - r.cap_first for r in results if r.cap_first_exact != r.cap_first}
    assert rounded == {"0.5": 1, "0.75": 1, "1.0": 4}
    assert all(r.cap_first_exact == r.ours for r in results if r.setting.fraction in rounded)


@pytest.mark.parametrize(
    ("spacing", "offset", "as_printed"),
    [("leading", 0, True), ("leading", 1, True), ("linspace", 0, False), ("trailing", 0, False)],
)
def test_which_timesteps_give_tables_10_and_11(spacing: str, offset: int, as_printed: bool) -> None:
    """diffusers' default spacing, with either offset; the other spacings give other figures."""
    snrs = dqar_tables.levels_of(ddim(spacing, offset)).snrs
    settings = [s for s in SETTINGS if s.table >= 10]
    found = [dqar_tables.printed(dqar_tables.cap_first(s, snrs), s) for s in settings]
    assert (found == [s.ratio for s in settings]) == as_printed


def test_the_written_results_are_current(results: list[Result]) -> None:
    written = json.loads((dqar_tables.RESULTS / "dqar_tables.json").read_text())
    assert written == json.loads(json.dumps(dqar_tables.as_json(results)))
