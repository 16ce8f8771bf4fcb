"""Plots: what they draw, and that files are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_rewrite.analysis import plots
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.analysis.statistics import MEASURES, Row
from dit_rewrite.errors import BadArgument

pytest.importorskip("matplotlib")
STEPS = 6


@pytest.fixture
def found() -> Analysis:
    """Two layers' branches, and the output at all distances, where the cosine is 1 / distance."""
    made = Analysis("f", "Model", {"keys": "core"})
    for prompt in range(2):
        profile = {Row(f"b{i}", "self", i, "branch", "all", "0", None, 1): torch.rand(STEPS, 5) for i in range(2)}
        for distance in range(1, STEPS):
            values = torch.full((STEPS, len(MEASURES)), 1 / distance)
            values[:distance] = torch.nan
            profile[Row("output", "span", 0, "output", "all", "0", None, distance)] = values
        made.add(prompt, [{row: values.double() for row, values in profile.items()}])
    return made


def test_all_plots_of_an_analysis(found: Analysis, tmp_path: Path) -> None:
    paths = plots.draw(found, tmp_path)
    names = ["branch_lines.png", "branch_map.png", "output_lines.png", "output_similarity.png"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000 for path in paths)
    path = plots.stability({"Euler": found, "Heun": found}, "branch", tmp_path / "stable.png")
    assert path.stat().st_size > 3000


def test_similarity_of_steps(found: Analysis) -> None:
    (row,) = found.rows(quantity="output")
    similarity = plots.step_similarity(found, row)
    for a in range(STEPS):
        for b in range(STEPS):
            if a == b:
                assert similarity[a, b].isnan()
            else:
                assert similarity[a, b] == pytest.approx(1 / abs(a - b))


def test_a_quantity_that_was_not_measured(found: Analysis, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="quantity='keys' .*branch, output"):
        plots.lines(found, "keys", tmp_path / "a.png")
