"""`python -m dit_rewrite latency`: the parts of each time, the sums, the command line. No time is compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from dit_rewrite.cli import latency  # noqa: E402
from dit_rewrite.cli.latency import BATCH, WARM_UP, Breakdown, Geometry, build, make_call, measure, split, watch  # noqa: E402
from dit_rewrite.cli.main import FAILED, build_parser, lengths, main  # noqa: E402
from dit_rewrite.errors import BadOption  # noqa: E402

TINY = Geometry(width=72, tokens=16, layers=2)
CPU = torch.device("cpu")
PARTS = ["self-attention", "cross-attention", "MLP", "other"]


class Work(nn.Module):
    """Advances a clock by this many ticks."""

    def __init__(self, clock: Ticks, ticks: int) -> None:
        super().__init__()
        self.clock, self.ticks = clock, ticks

    def forward(self) -> None:
        self.clock.time += self.ticks


class Ticks:
    """A clock that only work advances; a tick is a millisecond."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> int:
        return self.time

    def milliseconds(self, begin: int, end: int) -> float:
        return float(end - begin)


class Block(nn.Module):
    """A block with the parts' names, and work between them."""

    def __init__(self, clock: Ticks, ticks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.attn1, self.attn2, self.ff, self.norm = (Work(clock, n) for n in ticks)

    def forward(self) -> None:
        for part in (self.norm, self.attn1, self.attn2, self.norm, self.ff):
            part()


class Model(nn.Module):
    """Two blocks, and work before them that belongs to no block; records its arguments."""

    def __init__(self, clock: Ticks) -> None:
        super().__init__()
        self.embed = Work(clock, 1000)
        self.transformer_blocks = nn.ModuleList([Block(clock, (10, 20, 30, 1)), Block(clock, (14, 20, 50, 3))])
        self.calls: list[str] = []

    def forward(self, name: str) -> None:
        self.calls.append(name)
        self.embed()
        for block in self.transformer_blocks:
            block()


# --- what is measured -------------------------------------------------------------------------------------------------


def test_parts_are_the_mean_over_the_blocks_and_other_is_the_remainder() -> None:
    """(10 + 14) / 2, (20 + 20) / 2, (30 + 50) / 2, and the norm twice in each block: (2 * 1 + 2 * 3) / 2."""
    clock = Ticks()
    model = Model(clock)
    with watch(list(model.transformer_blocks), clock) as intervals:
        model("")
    assert {name: len(found) for name, found in intervals.items()} == {**dict.fromkeys(PARTS[:3], 2), "block": 2}
    assert split(intervals, clock) == {"self-attention": 12, "cross-attention": 20, "MLP": 40, "other": 4}
    assert clock.time == 2 * (12 + 20 + 40 + 4) + 1000, "time outside the blocks is not counted"


def test_no_hook_is_left_behind_even_after_an_error() -> None:
    clock = Ticks()
    model = Model(clock)
    with pytest.raises(RuntimeError, match="stop"), watch(list(model.transformer_blocks), clock) as intervals:
        raise RuntimeError("stop")
    model("")
    assert not any(intervals.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rounds_alternate_between_the_lengths_and_the_first_are_not_counted() -> None:
    clock = Ticks()
    model = Model(clock)
    found = measure(model, {16: {"name": "a"}, 64: {"name": "b"}}, 3, clock)
    assert model.calls == ["a", "b"] * (WARM_UP + 3)
    assert [(b.length, len(b.rounds)) for b in found] == [(16, 3), (64, 3)]


def test_medians_are_taken_of_each_part_and_shares_of_their_sum() -> None:
    """The medians come from different rounds: 2 and 30, whose sum occurred in no round."""
    found = Breakdown.of(16, [{"MLP": 1, "other": 99}, {"MLP": 2, "other": 30}, {"MLP": 7, "other": 0}])
    assert found.median == {"MLP": 2, "other": 30}
    assert found.total == 32
    assert (found.share("MLP"), found.share("other")) == (1 / 16, 15 / 16)
    assert latency.cells(found) == ["16", "2.000   6%", "30.00  94%", "32.00"]


def test_the_hosts_clock() -> None:
    assert latency.HostClock().milliseconds(1.5, 1.75) == 250


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(TINY, CPU, torch.float32)


def test_the_model_has_the_geometry(model: nn.Module) -> None:
    """Its blocks see 16 image tokens of width 72 and the condition's tokens, and every part runs once in each."""
    seen: list[tuple[int, ...]] = []
    block = model.transformer_blocks[0]  # type: ignore[index]
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend((tuple(args[0].shape), tuple(kwargs["encoder_hidden_states"].shape))),
        with_kwargs=True,
    )
    clock = latency.HostClock()
    with torch.no_grad(), watch(list(model.transformer_blocks), clock) as intervals:  # type: ignore[arg-type]
        model(**make_call(TINY, 5, CPU, torch.float32))
    handle.remove()
    assert seen == [(BATCH, 16, 72), (BATCH, 5, 72)]
    assert [len(found) for found in intervals.values()] == [2, 2, 2, 2]


def test_parts_lie_within_their_block_one_after_the_other(model: nn.Module) -> None:
    """Their times therefore sum to the block's with a remainder that is not negative."""
    (found,) = measure(model, {5: make_call(TINY, 5, CPU, torch.float32)}, 2, latency.HostClock())
    for times in found.rounds:
        assert list(times) == PARTS
        assert all(ms > 0 for ms in times.values())


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((71, 16, 1), "width=71.*multiple of 72"),
        ((0, 16, 1), "width=0"),
        ((72, 15, 1), "tokens=15.*square number"),
        ((72, 0, 1), "tokens=0"),
        ((72, 16, 0), "layers=0"),
    ],
)
def test_a_geometry_that_cannot_be(sizes: tuple[int, int, int], match: str) -> None:
    with pytest.raises(BadOption, match=match):
        Geometry(*sizes)


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_list_of_lengths() -> None:
    assert lengths("16,64, 256") == (16, 64, 256)
    assert build_parser().parse_args(["latency"]).conditions == (16, 64, 256, 1024)


@pytest.mark.parametrize("text", ["", "16,", "16,,64", "1.5", "many", "0", "16,-4", "16,16", "16 64"])
def test_a_list_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse's exit code, and a message that names the option and its value."""
    with pytest.raises(SystemExit) as stopped:
        main(["latency", f"--conditions={text}"])
    assert stopped.value.code == 2
    assert f"argument --conditions: {text!r} " in capsys.readouterr().err


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, figures and picture of a tiny model; parts sum to the total, shares to 1."""
    sizes = ["--width", "72", "--tokens", "16", "--layers", "2", "--rounds", "3"]
    assert main(["latency", "--conditions", "4,9", *sizes, "--out", str(tmp_path / "new" / "out")]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in PARTS), "no heading is cut"
    written = json.loads((tmp_path / "new" / "out" / "latency.json").read_text())
    assert written["geometry"] == {"width": 72, "tokens": 16, "layers": 2}
    assert (written["dtype"], written["hardware"]["threads"]) == ("float32", 1)
    assert {"torch", "diffusers"} <= set(written["versions"])
    assert [(row["length"], len(row["rounds"])) for row in written["lengths"]] == [(4, 3), (9, 3)]
    for row in written["lengths"]:
        assert list(row["median"]) == PARTS
        assert row["total"] == pytest.approx(sum(row["median"].values()))
        assert sum(row["share"].values()) == pytest.approx(1)
    with Image.open(tmp_path / "new" / "out" / "latency.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > len(PARTS), "bars of as many colours as parts"


def test_wide_figures_cut_no_heading_and_no_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slow machine: the table is wider than the 80 columns that a log is assumed to have."""
    times = {"self-attention": 1.5e7, "cross-attention": 3.25e8, "MLP": 2.125e9, "other": 4.25e10}
    found = [Breakdown.of(1 << 40, [times])]
    latency.write(found, "PixArt", {}, tmp_path)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) > 80
    assert all(text in said for text in ("length", *PARTS, "block", *latency.cells(found[0])))
    assert "1,099,511,627,776" in said and "4.250e+10  95%" in said and "…" not in said


@pytest.mark.parametrize("package", ["diffusers", "matplotlib", "rich"])
def test_a_missing_package_is_named_before_anything_runs(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["latency", "--out", str(tmp_path / "out")]) == FAILED
    assert f"latency needs {package}. Install it: pip install 'dit_rewrite[benchmark]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--width", "100"), ("--tokens", "200")])
def test_sizes_that_do_not_fit_are_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", option, value]) == FAILED
    assert f"latency: {option[2:]}={value} is out of range" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["latency", "--device", "cuda"]) == FAILED
    assert "device='cuda' is out of range" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_events_of_a_gpu() -> None:
    """The same intervals, measured with CUDA events."""
    device = torch.device("cuda")
    model = build(TINY, device, torch.bfloat16)
    calls = {n: make_call(TINY, n, device, torch.bfloat16) for n in (4, 9)}
    for found in measure(model, calls, 2, latency.DeviceClock()):
        assert list(found.median) == PARTS
        assert found.total > 0
