"""The page of DiTFastAttn's figures: rendered from its results, and a tiny run of each part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from benchmarks.ditfastattn import figures as bench  # noqa: E402
from benchmarks.ditfastattn.page import by_steps, draw, render  # noqa: E402
from benchmarks.record import Record  # noqa: E402
from dit_rewrite.policy.plan import Choice  # noqa: E402
from tests.benchmarks.test_tables import small_denoiser  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "ditfastattn_figures.json"


def test_the_page_is_rendered_from_its_results(tmp_path: Path) -> None:
    """`python -m benchmarks.ditfastattn.figures --page` renders it anew."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "ditfastattn.md").read_text(encoding="utf-8") == render(content)
    draw(content, tmp_path)
    names = {f"ditfastattn_{name}.png" for name in ("maps", "residual", "ablation")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert [*by_steps(content)] == sorted(by_steps(content), key=lambda name: (int(name.split()[0]), name))


def test_attention_inside_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without queries all keys are seen alike, and a window has as much attention as it has pairs, row by row."""
    denoiser = small_denoiser(1)
    for part in denoiser.transformer_blocks[0].attn1.to_q.parameters():
        part.zero_()
    monkeypatch.setattr(bench, "load_denoiser", lambda: denoiser)
    record = Record(tmp_path / "out.json", {})
    bench.measure_maps(record, 1)
    (found,) = record.sections["maps"].values()
    assert found["sequence"]["pairs"] == (64 * 17 - 8 * 9) / 64**2
    assert found["rows and columns"]["pairs"] == (8 * 5 - 2 * 3) ** 2 / 64**2
    for window in ("sequence", "rows and columns"):
        assert found[window]["inside"] == pytest.approx([found[window]["pairs"]], abs=1e-6)
    assert found["map"][3][5] == pytest.approx(1 / 64, abs=1e-5)


def test_an_effect_that_is_kept() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert bench.effect(2 * exact, exact) == pytest.approx(1)
    assert bench.effect(torch.tensor([4.0, -3.0]), exact) == pytest.approx(0, abs=1e-12)


def test_the_errors_are_those_of_the_searchs_images() -> None:
    """A threshold of zero gives the uncached images, one above all losses the cheapest choice."""
    denoiser, sample = small_denoiser(1), bench.sampler(1, 3)
    uncached = sample(denoiser)
    plans: list[dict[str, Any]] = []
    for delta in (0.0, 100.0):
        plans.append(bench.search(denoiser, sample, uncached, delta=delta, steps=3, strategies={Choice.AST})[1])
    exact, cheapest = plans
    assert (exact["attention"], exact["relative_l2"], exact["choices"]["full"]) == (1.0, 0.0, 3)
    assert cheapest["attention"] == pytest.approx(1 / 3) and cheapest["choices"]["AST"] == 2
    assert cheapest["relative_l2"] > 0 and cheapest["by_step"] == (1.0, 0.0, 0.0)


def test_a_residual_and_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each layer and half, and a change for each step but the first."""
    monkeypatch.setattr(bench, "load_denoiser", lambda: small_denoiser(2))
    record = Record(tmp_path / "out.json", {})
    bench.measure_residual(record, 1)
    (found,) = record.sections["residual"].values()
    assert found["rows"] == 2 * 2 and len(found["window"]) == len(found["window residual"]) == found["steps"] - 1
    assert all(value > 0 for value in found["window"])
