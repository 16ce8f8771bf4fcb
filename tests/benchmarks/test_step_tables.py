"""The figures of step tables on paper: linear in the number of blocks, as counted by hand, and on their page."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("rich")

from benchmarks.step_tables import run as bench  # noqa: E402
from benchmarks.step_tables.models import MODELS  # noqa: E402
from benchmarks.step_tables.report import count, percent, render, size  # noqa: E402
from benchmarks.timing import RESULTS  # noqa: E402

BY_NAME = {model.name: model for model in MODELS}
BFLOAT16 = 2


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / "step_tables.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def rows(content: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in content["rows"]}


def test_the_page_is_that_of_the_figures(content: dict[str, Any]) -> None:
    assert bench.PAGE.read_text() == render(content)


def test_every_model_has_a_row(rows: dict[str, Any]) -> None:
    """With the numbers of blocks that are declared now."""
    assert {name: row["depths"] for name, row in rows.items()} == {m.name: dict(m.depths) for m in MODELS}


@pytest.mark.parametrize(
    ("name", "depths"),
    [("PixArt-Σ", {"num_layers": 5}), ("SD3.5-L", {"num_layers": 4})],
)
def test_figures_are_linear_in_the_number_of_blocks(name: str, depths: dict[str, int]) -> None:
    """From two blocks on; of SD3.5 the first and the last differ from those between them."""
    model = BY_NAME[name]
    two, three = (bench.measured(model, dict.fromkeys(depths, blocks))[0] for blocks in (2, 3))
    deep, _ = bench.measured(model, depths)
    (blocks,) = depths.values()
    assert bench.combined(two, two, three, blocks - 2) == deep
    assert three != two


def test_fresh_figures_are_those_on_record(rows: dict[str, Any]) -> None:
    assert bench.row(BY_NAME["Wan 2.2 A14B"]) == rows["Wan 2.2 A14B"]


@pytest.mark.parametrize(
    ("name", "values", "width", "read"),
    [
        # 6 parts a block, of them 2 gates; shift and scale at the end
        ("DiT-XL/2", 6 * 28 + 2, 1152, 2 * 28 + 2),
        # 6 parts a block and stream, but 2 of the last text block's, which ends there; no text gate reaches the output
        ("SD3.5-L", 6 * 38 + 6 * 37 + 2 + 2, 2432, 2 * 38 + 2),
        # 6 parts a block and stream, but no gate of the text's last MLP; of the last block's text gates none is read
        ("Qwen-Image", (12 * 60 - 3 - 1) + 2, 3072, 2 * 60 + 2),
        # two streams of 6 parts for all 8 blocks, 3 parts for all 48, and 2 at the end; gates: 4, 1 and those 2
        ("FLUX.2-dev", 12 + 3 + 2, 6144, 4 + 1 + 2),
        # 4 parts (no shift) in 2 refiner blocks and 30 others, and a scale at the end
        ("Z-Image", 4 * 32 + 1, 3840, 2 * 32 + 1),
        # 6 parts a block and stream, but 2 of the last text block's, which ends there; 2 gates in each of 2 refiner
        # blocks, whose text is in the cached values; shift and scale at the end
        ("HunyuanVideo-1.5", (12 * 54 - 4) + 2 * 2 + 2, 2048, 2 * 54 + 2),
    ],
)
def test_counts_by_hand(rows: dict[str, Any], name: str, values: int, width: int, read: int) -> None:
    """Every value is one vector of the model's width."""
    found = rows[name]["samples"]
    assert (found["values"], found["reuse_values"]) == (values, read)
    assert (found["row_bytes"], found["reuse_bytes"]) == (values * width * BFLOAT16, read * width * BFLOAT16)


def test_weights_by_hand(rows: dict[str, Any]) -> None:
    """Qwen-Image: two projections to six parts a block, the final one, and the embedder of the timestep."""
    width, blocks = 3072, 60
    modulation = blocks * 2 * 6 * (width * width + width)
    final = 2 * (width * width + width)
    embedder = (256 * width + width) + (width * width + width)
    row = rows["Qwen-Image"]
    assert row["samples"]["released_bytes"] == BFLOAT16 * (modulation + final + embedder)
    assert row["timestep"] == row["samples"]
    assert row["conditioning"]["samples"] == []


@pytest.mark.parametrize(
    ("bytes", "written"), [(0, "0 B"), (1023, "1.02e+03 B"), (1536, "1.5 KiB"), (3 * 2**40, "3 TiB")]
)
def test_size(bytes: int, written: str) -> None:
    assert size(bytes) == written


def test_numbers() -> None:
    assert [count(n) for n in (5, 1234, 5.5e12)] == ["5", "1.23 k", "5.5 T"]
    assert [percent(1, 3), percent(1, 10**6), percent(0, 3), percent(1, 0)] == ["33 %", "< 0.01 %", "0 %", "unknown"]
