"""The speed of the machine: interpolated, kept in a file, and measured again if the file is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dit_rewrite.compiler import roofline
from dit_rewrite.compiler.roofline import Machine, Roofline
from dit_rewrite.passes.analysis.work import Work

CPU = torch.device("cpu")
KNOWN = Roofline(((100.0, 1.0), (10_000.0, 4.0)), ((10.0, 0.25), (1000.0, 16.0)), ((10.0, 0.5), (1000.0, 8.0)))


def test_interpolation() -> None:
    """On a logarithmic scale; a smaller kernel takes no less than the smallest, a larger one keeps the speed."""
    assert KNOWN.seconds(Work(0, 0)) == 0
    assert KNOWN.seconds(Work(1, 0)) == KNOWN.seconds(Work(100, 0)) == 1
    assert KNOWN.seconds(Work(1000, 0)) == pytest.approx(2)
    assert KNOWN.seconds(Work(20_000, 0)) == 8
    assert KNOWN.seconds(Work(0, 100)) == pytest.approx(2)
    assert KNOWN.seconds(Work(1000, 1000)) == 16, "the bytes of a product with few rows take longer"
    assert KNOWN.total([Work(100, 0), Work(0, 10)]) == 1.5


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """An empty cache folder, and the dtypes that were measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found: list[torch.dtype] = []
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: (found.append(dtype), KNOWN)[1])
    return found


def test_measured_once_per_machine(measured: list[torch.dtype], tmp_path: Path) -> None:
    assert Roofline.of(CPU, torch.float32) == Roofline.of(CPU, torch.float32) == KNOWN
    assert measured == [torch.float32]
    Roofline.of(CPU, torch.bfloat16)
    assert measured == [torch.float32, torch.bfloat16]
    torch.set_num_threads(2)
    Roofline.of(CPU, torch.float32)
    torch.set_num_threads(1)
    assert len(measured) == len(list((tmp_path / "dit_rewrite").iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "version": 99}),
        lambda text: json.dumps({**json.loads(text), "products": []}),
        lambda text: json.dumps({**json.loads(text), "copies": [[10, float("nan")]]}),
        lambda text: json.dumps({**json.loads(text), "copies": [[10, 2], [5, 3]]}),
        lambda text: text.replace(torch.__version__, "0.1"),
    ],
)
def test_a_damaged_file_is_measured_again(measured: list[torch.dtype], damage: object) -> None:
    Roofline.of(CPU, torch.float32)
    path = Machine.of(CPU, torch.float32).file
    whole = path.read_text()
    path.write_text(damage(whole))  # type: ignore[operator]
    assert Roofline.of(CPU, torch.float32) == KNOWN
    assert (len(measured), path.read_text()) == (2, whole)


def test_a_folder_that_cannot_be_written(measured: list[torch.dtype], tmp_path: Path) -> None:
    (tmp_path / "dit_rewrite").write_text("a file")
    assert Roofline.of(CPU, torch.float32) == KNOWN


def test_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not fall with the size, so that an interpolated one is between its neighbours."""
    monkeypatch.setattr(roofline, "ROUNDS", 1)
    monkeypatch.setitem(roofline.SIDES, "cpu", (8, 64))
    monkeypatch.setattr(roofline, "BYTES", (1 << 10, 1 << 16))
    monkeypatch.setitem(roofline.WIDTHS, "cpu", (8, 16))
    monkeypatch.setattr(roofline, "OUT_OF_CACHE", 1 << 14)
    found = roofline.measure(CPU, torch.float32)
    assert [size for size, _ in found.thin] == [4 * (6 * 8 * 8 + 2 * 8 + 3 * 48), 4 * (6 * 16 * 16 + 2 * 16 + 3 * 96)]
    for points in (found.products, found.thin, found.copies):
        (a, begin), (b, end) = points
        assert 0 < a < b
        assert 0 < begin <= end
