"""Numbers that compare profiles, against values computed by hand or by scipy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_rewrite.analysis.compare import (
    coefficient_of_variation,
    predictions,
    prompt_stability,
    ranks,
    resampled,
    spearman,
    stability,
    summary,
)
from dit_rewrite.analysis.result import Analysis, ReuseErrors
from dit_rewrite.analysis.statistics import MEASURES, Row
from dit_rewrite.errors import BadArgument


def row(i: int, quantity: str = "branch", kind: str = "self") -> Row:
    return Row(f"site {i}", kind, i, quantity, "all", "0", None, 1)


def analysis(profiles: list[Tensor], quantity: str = "branch") -> Analysis:
    """An analysis of prompts with the given L1 profiles (layers, steps); other measures are its square."""
    found = Analysis("f", "Model", {"keys": "core"})
    for prompt, values in enumerate(profiles):
        profile = {}
        for i, line in enumerate(values.double()):
            wide = torch.stack([line, *[line.square()] * (len(MEASURES) - 1)], dim=-1)
            profile[row(i, quantity)] = wide
        found.add(prompt, [profile])
    return found


def test_ranks_and_rank_correlation() -> None:
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    a, b = torch.tensor([1.0, 2, 3, 4, 4, 9]), torch.tensor([2.0, 1, 7, 7, 8, 3])
    scipy = pytest.importorskip("scipy.stats")
    assert spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    holes = torch.tensor([1.0, math.nan, 2, 3])
    assert spearman(holes, torch.tensor([3.0, 0, 2, 1])) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(6)))
    assert math.isnan(spearman(a[:2], b[:2]))


def test_coefficient_of_variation() -> None:
    """Values of a known spread: the interval contains it, and shrinks with the number of prompts."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Analysis:
        return analysis([1 + 0.1 * torch.randn(5, 6, generator=generator) for _ in range(count)])

    few, many = (coefficient_of_variation(draw(count), "branch") for count in (8, 128))
    assert many.mean == pytest.approx(0.1, rel=0.05)
    assert few.low < 0.1 < few.high
    assert many.low < 0.1 < many.high
    assert many.high - many.low < (few.high - few.low) / 3
    exact = coefficient_of_variation(analysis([torch.full((1, 2), 1.0), torch.full((1, 2), 3.0)]), "branch")
    assert exact.mean == pytest.approx(math.sqrt(2) / 2)
    assert math.isnan(coefficient_of_variation(analysis([torch.ones(1, 3)]), "branch").mean)


def test_prompts_and_schedules_are_compared_over_progress() -> None:
    shape = torch.linspace(0, 1, 29).square()[None] + 1
    same = analysis([shape, 2 * shape, shape + 3])
    assert prompt_stability(same, "branch") == (pytest.approx(1), pytest.approx(1), 3)
    assert prompt_stability(analysis([shape, -shape]), "branch").mean == pytest.approx(-1)
    longer = analysis([torch.linspace(0, 1, 57).square()[None] + 1])
    other = analysis([torch.linspace(1, 0, 57)[None]])
    assert stability(same, longer, "branch").mean == pytest.approx(1)
    assert stability(longer, same, "branch").mean == pytest.approx(1)
    assert stability(same, other, "branch").mean == pytest.approx(-1)
    assert stability(same, analysis([shape], "keys"), "branch").number == 0
    assert resampled(torch.tensor([0.0, 2.0, 4.0]), 5).tolist() == [0, 1, 2, 3, 4]


def test_what_predicts_the_errors() -> None:
    """Errors that grow with the L1 of the branch, and not with that of the keys."""
    values = torch.tensor([[math.nan, 1, 2, 3], [math.nan, 5, 4, 6]], dtype=torch.float64)
    found = analysis([values])
    found.add(1, [{row(i, "keys"): line[:, None].expand(-1, 5) for i, line in enumerate(values.flip(1).roll(1, 1))}])
    found.errors = ReuseErrors(["site 0", "site 1"], values.square(), 1)
    best, *others = predictions(found)
    assert (best.quantity, best.overall, best.pairs) == ("value", pytest.approx(1), 6)
    keys = [other for other in others if other.quantity == "keys"]
    assert keys
    assert all(other.overall < 1 for other in keys)
    assert "best predictor of reuse errors: l1 of value, rank correlation 1.00" in summary(found)
    found.errors = None
    assert predictions(found) == []


def test_the_summary_names_where_keys_were_tapped() -> None:
    found = analysis([torch.rand(2, 4) for _ in range(3)])
    assert repr(found) == "Analysis of Model: 3 prompts, 4 steps, 2 rows"
    assert summary(found).startswith("Model: 3 prompts, 4 steps; keys and values behind norms and rotations")
    found.settings["keys"] = "projection"
    assert "keys and values as projected" in summary(found)
    assert "varies over prompts" in summary(found) and "nan" not in summary(found)
    assert "over prompts" not in summary(analysis([torch.rand(2, 4)])), "one prompt says nothing of it"


def test_rows_are_selected_by_their_fields() -> None:
    found = analysis([torch.rand(2, 4)])
    assert found.rows(layer=1) == [row(1)]
    assert found.rows(distance=2) == []
    with pytest.raises(BadArgument, match="layr"):
        found.rows(layr=1)
    with pytest.raises(BadArgument, match="measure"):
        found.mean(row(0), "l2")
