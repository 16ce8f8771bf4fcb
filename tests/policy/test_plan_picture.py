"""The picture of a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dit_rewrite.errors import MissingExtra
from tests.helpers.plans import ASC, AST, FULL, PLAN, TWO_STREAMS


def test_panels_by_kind():
    pytest.importorskip("matplotlib")
    from dit_rewrite.report.plan_picture import panels

    assert panels(PLAN.columns) == {"blocks.attn1": [0, 2], "blocks.attn2": [1, 3]}
    sites = ("blocks.0.attn", "single.0.attn", "blocks.1.attn", "blocks.1.attn#1")
    assert panels([(None, site) for site in sites]) == {"blocks.attn": [0, 2, 3], "single.attn": [1]}
    assert panels(TWO_STREAMS.columns) == {
        "blocks.attn1, cond": [0, 2], "blocks.attn2, cond": [1, 3],
        "blocks.attn1, uncond": [4, 6], "blocks.attn2, uncond": [5, 7],
    }  # fmt: skip


def test_the_picture_shows_the_table():
    """Each cell of the image has its choice's colour, layers go upwards, and the legend gives the shares."""
    colors = pytest.importorskip("matplotlib.colors")
    from dit_rewrite.report.plan_picture import COLOURS, draw

    figure = draw(PLAN)
    assert [axes.get_title() for axes in figure.axes] == ["blocks.attn1", "blocks.attn2"]
    seen = set()
    for first, axes in enumerate(figure.axes):
        (image,) = axes.images
        shown = image.to_rgba(image.get_array())
        assert shown.shape == (2, 3, 4)
        assert image.origin == "lower"
        for layer in range(2):
            for step in range(3):
                expected = colors.to_rgba(COLOURS[PLAN.table[step][2 * layer + first]])
                assert shown[layer, step] == pytest.approx(expected)
        seen |= {tuple(colour) for colour in shown.reshape(-1, 4)}
    assert len(seen) == 5
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["full 50.0%", "AST 25.0%", "ASC 8.3%", "WA-RS 8.3%", "WA-RS+ASC 8.3%"]
    title = draw(replace(PLAN, attention=(1.0, 0.5, 0.3))).get_suptitle()
    assert "3 steps, 60.0% of the attention FLOPs, scheduler" in title and "FLOPs" not in figure.get_suptitle()


def test_the_legend_of_a_short_plan_is_whole():
    """Five choices of three steps: the figure is wide enough for the shares."""
    pytest.importorskip("matplotlib")
    from dit_rewrite.report.plan_picture import draw

    figure = draw(PLAN)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1


def test_the_legend_has_only_what_the_plan_has():
    pytest.importorskip("matplotlib")
    from dit_rewrite.report.plan_picture import draw

    figure = draw(replace(PLAN, table=((FULL,) * 4, (FULL,) * 4, (AST, FULL, FULL, FULL))))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["full 91.7%", "AST 8.3%"]


def test_the_saved_picture(tmp_path: Path):
    """The file's pixels have the colours of the plan's choices, and no other colours."""
    image = pytest.importorskip("matplotlib.image")
    from matplotlib.colors import to_rgba

    from dit_rewrite.report.plan_picture import COLOURS, save_picture

    plan = replace(PLAN, table=((FULL,) * 4, (FULL,) * 4, (AST, ASC, ASC, FULL)))
    save_picture(plan, tmp_path / "new" / "plan.png")
    pixels = {tuple(pixel) for pixel in (255 * image.imread(tmp_path / "new" / "plan.png")).round().reshape(-1, 4)}
    found = {c for c, colour in COLOURS.items() if tuple(round(255 * part) for part in to_rgba(colour)) in pixels}
    assert found == {FULL, AST, ASC}


def test_no_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.delitem(sys.modules, "dit_rewrite.report.plan_picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(MissingExtra, match=r"needs matplotlib. Install it: pip install 'dit_rewrite\[benchmark\]'"):
        import dit_rewrite.report.plan_picture  # noqa: F401
