"""The demo's arithmetic, its table, its files, and the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("rich")
pytest.importorskip("diffusers")

from dit_rewrite.cli.main import build_parser, main  # noqa: E402
from dit_rewrite.demo import report  # noqa: E402
from dit_rewrite.demo.report import Result, verdict  # noqa: E402
from dit_rewrite.demo.run import choose_labels, control_steps  # noqa: E402
from dit_rewrite.demo.shapes.data import CLASSES, SIZE  # noqa: E402
from dit_rewrite.demo.shapes.picture import GAP, HEADER, MARGIN, save_rows, to_bytes  # noqa: E402
from dit_rewrite.proof import image_metrics  # noqa: E402


def test_relative_l2_by_hand():
    assert image_metrics.relative_l2(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])) == pytest.approx(
        math.sqrt(10) / 5
    )
    assert image_metrics.relative_l2(torch.ones(4), torch.ones(4)) == 0


def test_psnr_by_hand():
    reference = torch.zeros(8)
    assert image_metrics.psnr(reference + 0.2, reference) == pytest.approx(20.0)  # 2^2 / 0.2^2 = 100
    assert image_metrics.psnr(reference + 0.1, reference, data_range=1.0) == pytest.approx(20.0)
    assert image_metrics.psnr(reference, reference) == math.inf


def test_metrics_do_not_round_in_half_precision():
    reference = torch.full((4096,), 100.0, dtype=torch.float16)
    assert image_metrics.relative_l2(reference * 1.5, reference) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("cached", "uncached", "steps"), [(1.0, 2.0, 25), (2.0, 2.0, 50), (0.36, 1.0, 18), (0.001, 1.0, 1), (3.0, 2.0, 75)]
)
def test_the_control_has_the_steps_that_fit_into_the_time(cached, uncached, steps):
    assert control_steps(50, cached, uncached) == steps


def test_the_labels_show_every_shape():
    names = [CLASSES[label] for label in choose_labels(16).tolist()]
    assert len(set(names)) == 16
    assert {name.split()[1] for name in names} == {"circle", "square", "triangle", "cross"}
    assert len(choose_labels(40)) == 40


def make_result(name: str, control_of: str | None = None, **values: float) -> Result:
    figures = {"seconds": 1.0, "speed_up": 2.0, "recomputed": 0.5, "relative_l2": 0.1, "psnr": 30.0, "accuracy": 1.0}
    return Result(name, control_of, steps=50, all_seconds=[1.0], compile_seconds=None, stats=None, **(figures | values))


def test_the_verdict_names_the_winner_of_each_metric():
    fora = make_result("FORA(2)")
    fewer = make_result("25 steps", "FORA(2)", relative_l2=0.05, psnr=36.0)
    said = verdict(fora, fewer)
    assert "25 steps by relative L2 and PSNR" in said
    assert "neither by class accuracy" in said
    assert "FORA(2) by relative L2" in verdict(fora, make_result("25 steps", "FORA(2)", relative_l2=0.2, psnr=20.0))


def test_each_control_is_paired_with_its_own_method():
    results = [make_result("uncached"), make_result("FORA(2)"), make_result("9 steps", "FORA(2)")]
    results += [make_result("FORA(5)"), make_result("9 steps", "FORA(5)")]
    assert [(a.name, b.control_of) for a, b in report.pairs(results)] == [
        ("FORA(2)", "FORA(2)"),
        ("FORA(5)", "FORA(5)"),
    ]


def test_wide_figures_cut_no_heading_and_no_cell(capsys):
    """A slow machine: the table is wider than the 80 columns that a log is assumed to have."""
    slow = make_result("FORA(1000000)", seconds=123456789.125, speed_up=123456.75, relative_l2=98765.4321)
    report.print_table(report.build_table([slow]))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) > 80
    assert all(text in said for text in ("speed-up", "Recomp%", "PSNR dB", "class", *report.figures(slow)))
    assert "123456789.12" in said and "98765.4321" in said and "…" not in said


def test_a_terminal_keeps_its_width(capsys, monkeypatch):
    monkeypatch.setattr(report, "console", report.Console(force_terminal=True, color_system=None, width=40))
    report.print_table(report.build_table([make_result("FORA(2)")]))
    assert max(map(len, capsys.readouterr().out.splitlines())) == 40


def test_pixels_are_enlarged_without_smoothing(tmp_path):
    images = torch.full((2, 3, SIZE, SIZE), -1.0)
    images[0, :, 0, 0] = 1.0
    enlarged = to_bytes(images, 8)
    assert enlarged.shape == (2, 8 * SIZE, 8 * SIZE, 3)
    assert enlarged[0, :8, :8].eq(255).all() and enlarged.sum() == 255 * 64 * 3
    save_rows(tmp_path / "rows.png", [("a", images), ("b", images)], ["one", "two"])
    cell = 8 * SIZE + GAP
    assert Image.open(tmp_path / "rows.png").size == (MARGIN + 2 * cell, HEADER + 2 * cell)


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["paint"],
        ["demo", "--steps", "0"],
        ["demo", "--intervals", "two"],
        ["generate", "--label", "1"],
        ["generate", "--model", "x"],
        ["generate", "--model", "x", "--prompt", "a", "--label", "1"],
        ["verify", "--steps", "none"],
    ],
)
def test_a_wrong_command_line_is_one_line(line, capsys):
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith("--help shows the options)\n") and said.count("\n") == 1


def test_verify_is_told_what_to_prove():
    arguments = build_parser().parse_args(["verify", "--model", "a:b", "--dump", "d"])
    assert (arguments.model, arguments.policy, arguments.dump) == ("a:b", "fora:interval=3", Path("d"))
    assert (arguments.backend, arguments.steps) == ("aot_eager", 12)


def test_a_small_demo_leaves_its_files(tmp_path, capsys):
    line = ["demo", "--out", str(tmp_path), "--backend", "aot_eager", "--images", "2", "--steps", "6", "--rounds", "1"]
    assert main([*line, "--intervals", "2"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    uncached, fora, control, forecast, other = found["methods"]
    assert (uncached["name"], fora["name"], control["control_of"]) == ("uncached", "FORA(2)", "FORA(2)")
    assert (forecast["name"], other["control_of"]) == ("forecast(2)", "forecast(2)")
    assert forecast["recomputed"] == pytest.approx(4 / 6), "order 2: the first two steps, then every other one"
    assert (uncached["relative_l2"], uncached["psnr"]) == (0, None)
    assert fora["recomputed"] == pytest.approx(0.5)
    assert (fora["stats"]["recompiles"], fora["stats"]["graph_breaks"], fora["stats"]["misses"]) == (0, 0, {})
    assert 0 < fora["relative_l2"] < 1
    assert {"cpu", "cores"} <= found["hardware"].keys() and {"torch", "python"} <= found["versions"].keys()
    assert Image.open(tmp_path / "images.png").height == HEADER + 5 * (8 * SIZE + GAP)
    assert (tmp_path / "graph.diff").stat().st_size and (tmp_path / "explain.txt").stat().st_size
    said = capsys.readouterr().out
    assert "Better of FORA(2)" in said and "By relative L2, " in said


def test_the_summary_says_where_forecasts_win_and_stop_winning():
    results = [make_result("uncached")]
    for name, own, controls in (("FORA(2)", 0.1, 0.2), ("forecast(2)", 0.1, 0.2), ("forecast(4)", 0.2, 0.2)):
        results += [make_result(name, relative_l2=own), make_result("9 steps", name, relative_l2=controls)]
    assert report.summary(results) == (
        "By relative L2, closer than fewer steps: forecast(2) at 2.00x; "
        "fewer steps are as close or closer: forecast(4) at 2.00x."
    )
