"""The file of an analysis: a round trip, and files that are damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_rewrite.analysis import store
from dit_rewrite.analysis.result import Analysis, ReuseErrors
from dit_rewrite.analysis.statistics import MEASURES, Row
from dit_rewrite.errors import BadAnalysis

ROWS = [Row(f"blocks.{i}.mlp", "mlp", i, "mlp", "all", "cond", None if i else 1, 1) for i in range(3)]


def made() -> Analysis:
    found = Analysis("fingerprint", "Model", {"keys": "core", "distances": [1]}, refused=["a: b"])
    for prompt in range(3):
        found.add(prompt, [{row: torch.rand(4, len(MEASURES), dtype=torch.float64) for row in ROWS}])
    found.errors = ReuseErrors(["blocks.1.mlp"], torch.rand(1, 4, dtype=torch.float64), 2)
    return found


def test_a_round_trip(tmp_path: Path) -> None:
    before = made()
    before.save(tmp_path / "a.safetensors")
    after = Analysis.load(tmp_path / "a.safetensors")
    assert (after.key, after.name, after.prompts, after.refused) == (before.key, "Model", [0, 1, 2], ["a: b"])
    assert after.table.rows == ROWS
    assert torch.equal(after.table.squares, before.table.squares)
    assert torch.equal(after.profile(2, ROWS[0]), before.profile(2, ROWS[0]))
    assert after.errors is not None
    assert torch.equal(after.errors.of("blocks.1.mlp"), before.errors.values[0])
    assert not list(tmp_path.glob("*.writing"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "header"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    made().save(path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-10]
    elif damage == "flipped":
        content[-20] ^= 1
    elif damage == "empty":
        content = bytearray()
    elif damage == "text":
        content = bytearray(b"{}")
    else:
        content[20] ^= 128
    path.write_bytes(content)
    with pytest.raises(BadAnalysis, match=r"a\.safetensors cannot be used as an analysis: .*damaged"):
        Analysis.load(path)


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(BadAnalysis, match=r"weights\.safetensors cannot .* something else"):
        Analysis.load(path)
    save_file({"weight": torch.ones(2)}, path, {"dit_rewrite": json.dumps({"format": "a plan"})})
    with pytest.raises(BadAnalysis, match="something else"):
        Analysis.load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "its version is 99"),
        ({"rows": 3}, "no valid rows"),
        ({"rows": [[1]]}, "do not fit together"),
        ({"rows": [list(row) for row in ROWS[:2]]}, "it has 2 rows, and statistics of 3"),
        ({"settings": None}, "no valid settings"),
    ],
)
def test_other_headers(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "a.safetensors"
    made().save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["dit_rewrite"])
    save_file(load_file(path), path, {"dit_rewrite": json.dumps(header | change)})
    with pytest.raises(BadAnalysis, match=says):
        Analysis.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Analysis.load(tmp_path / "none.safetensors")
    assert store.VERSION == 1
