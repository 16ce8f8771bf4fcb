"""Many prompts: resumed and merged runs, and the memory that they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dit_rewrite.analysis import analyze as module
from dit_rewrite.analysis.result import KEPT, Analysis
from dit_rewrite.analysis.statistics import MEASURES, Row, Table
from dit_rewrite.errors import (
    OverlappingAnalyses,
)
from tests.helpers.analyses import analyze, same
from tests.helpers.planted import CHANNELS, Planted, planted_calls


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    """It is killed after the second of four prompts, and continued from its file in another call."""
    sample = [planted_calls(3, seed) for seed in range(4)]
    whole = analyze(Planted(), sample)

    def kill(number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        analyze(Planted(), sample, path=path, progress=kill)
    assert Analysis.load(path).prompts == [0, 1]
    ran: list[int] = []
    found = analyze(Planted(), sample, path=path, progress=ran.append)
    assert ran == [2, 3]
    assert same(found, whole)
    assert same(Analysis.load(path), whole)


def test_processes_share_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank of torchrun writes a file of its own prompts; merged, they are those of a single process."""
    sample = [planted_calls(3, seed) for seed in range(5)]
    whole = analyze(Planted(), sample)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        analyze(Planted(), sample, path=tmp_path / "a.safetensors")
        parts.append(Analysis.load(tmp_path / f"a.{rank}-of-2.safetensors"))
    assert [part.prompts for part in parts] == [[0, 2, 4], [1, 3]]
    merged = Analysis.merge(parts)
    assert (merged.prompts, merged.table.rows) == (whole.prompts, whole.table.rows)
    assert torch.equal(merged.table.count, whole.table.count)
    assert torch.allclose(merged.table.mean, whole.table.mean, rtol=1e-12)
    assert torch.allclose(merged.table.squares, whole.table.squares, rtol=1e-9, atol=1e-15)
    assert all(torch.equal(merged._profile(p).nan_to_num(), whole._profile(p).nan_to_num()) for p in range(5))
    with pytest.raises(OverlappingAnalyses, match="both have prompt 0"):
        Analysis.merge([whole, parts[0]])


def test_memory_does_not_grow_with_prompts(tmp_path: Path) -> None:
    """100 observations take as much as 20: the profiles of 16 prompts are kept."""
    sizes = []
    found = Analysis("f", "Model", {"keys": "core"})
    rows = [Row(f"site {i}", "mlp", i, "mlp", "all", "0", None, 1) for i in range(10)]
    for prompt in range(100):
        found.add(prompt, [{row: torch.rand(20, len(MEASURES), dtype=torch.float64) for row in rows}])
        found.save(tmp_path / "a.safetensors")
        sizes.append((tmp_path / "a.safetensors").stat().st_size)
    assert len(found.profiles) == KEPT
    assert sizes[99] - sizes[20] < 600, "the numbers of 79 more prompts in the header"


def test_only_the_steps_that_are_compared_with_are_stored() -> None:
    """The cache holds the tensors of two steps at most, however long the trajectory is."""
    peaks = []
    for steps in (3, 9):
        with module.probed(Planted(), _backend(distances=(1, 2))) as (model, (backend,)), torch.no_grad():
            with model.trajectory(steps):
                for call in planted_calls(steps):
                    model(**call)
            peaks.append(model.stats().peak_bytes)
            tensor = 2 * 4 * CHANNELS * 4
            held = len(backend.runners[0].tapped.taps)
    assert peaks[0] == peaks[1]
    assert 0 < peaks[1] <= 2 * held * tensor


def _backend(**settings: Any) -> Any:
    from dit_rewrite.analysis.probing import ProbingBackend, Settings
    from dit_rewrite.compiler.lowering import Lowering

    return lambda model, prefix: ProbingBackend(model, Lowering.of("aot_eager"), Settings(**settings), prefix)


def test_chan_merge_equals_the_direct_formulas() -> None:
    values = torch.randn(7, 3, len(MEASURES), dtype=torch.float64)
    values[2, 1, 0] = float("nan")
    only = Row("a", "mlp", 0, "mlp", "all", "0", None, 1)
    table = Table()
    for value in values:
        table.add({only: value})
    expected = values.nanmean(0)
    assert torch.allclose(table.means[0], expected)
    assert table.count[0, 1, 0] == 6
    kept = values[[0, 1, 3, 4, 5, 6], 1, 0]
    assert table.deviations[0, 1, 0] == pytest.approx(float(kept.std()))
