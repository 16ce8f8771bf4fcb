"""The HTML report: every section, no request to the network, escaped texts, and a look in a headless browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_rewrite.analysis.charts import sections
from dit_rewrite.analysis.places import Quantity
from dit_rewrite.analysis.result import Analysis, ReuseErrors
from dit_rewrite.analysis.statistics import MEASURES, Row
from dit_rewrite.cli.main import FAILED, main
from dit_rewrite.cli.report import PNG, pictures_in, read_certificate, read_pictures
from dit_rewrite.errors import BadOption, OtherAnalysis
from dit_rewrite.policies import FORA
from dit_rewrite.policy.plan import Choice, Plan
from dit_rewrite.policy.serialise import to_json
from dit_rewrite.report.charts import front_charts
from dit_rewrite.report.page import Page
from dit_rewrite.search.certificate import AutoPolicy, Control, Errors
from tests.helpers import tiny
from tests.report.test_prediction import run

EVIL = '<script src="http://evil.example/x.js">alert(1)</script>'
SECTIONS = ["model", "certificate", "sites", "redundancy", "stability", "reuse-errors", "figures", "plan", "front"]
SECTIONS += ["images", "graph", "decisions", "prediction"]
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def analysed(steps: int) -> Analysis:
    """Two layers that change by 1 and 2 at each step, over two prompts, and the output at all distances."""
    made = Analysis("f", "Model", {"keys": "core"})
    for prompt in range(2):
        profile: dict[Row, torch.Tensor] = {}
        for layer in range(2):
            values = torch.full((steps, len(MEASURES)), 1.0 + layer) + 0.01 * torch.arange(steps)[:, None]
            values[0] = torch.nan
            profile[Row(f"blocks.{layer}.attn", "self", layer, "branch", "all", "0", None, 1)] = values.double()
        for distance in range(1, steps):
            alike = torch.full((steps, len(MEASURES)), 1 / distance)
            alike[:distance] = torch.nan
            profile[Row("output", "span", 0, "output", "all", "0", None, distance)] = alike.double()
        made.add(prompt, [profile])
    sites = [f"blocks.{layer}.attn" for layer in range(2)]
    values = torch.tensor([[torch.nan, *(0.1 * step * (layer + 1) for step in range(1, steps))] for layer in range(2)])
    made.errors = ReuseErrors(sites, values.double(), 1)
    return made


def certified() -> AutoPolicy:
    """A result of `autopolicy`, by hand."""
    errors, worse = Errors.of((0.1, 0.2, 0.3)), Errors.of((0.4, 0.5))
    return AutoPolicy(
        FORA(3), "speedup=2", "flops", 0.4, None, 1000, errors, Control("DDIM", 20, 0.41, worse), "policy", "model", 50,
        None, "output", (0, 9), "hermite", 0.1, 0.2, 8, 0.5, 3.0, (0,), (1, 2), 1500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Page:
    """A page with every section, and a script in each text that a user or a model brings."""
    model = run(FORA(3), 6, timing=True)
    with model.trajectory(6):
        tiny.outputs(model, tiny.calls(6))
    sites = ("blocks.0.attn", "blocks.1.attn")
    plan = Plan("model", 2, "none", sites, ((Choice.FULL,) * 2, (Choice.AST,) * 2), 0.1)
    front = [{"error": 0.1, "seconds": 2.0, "policy": EVIL}, {"error": 0.2, "seconds": 1.0, "policy": "b"}]
    described = {"class": EVIL}
    analysis = list(sections({"DDIM": analysed(6), "Heun": analysed(4)}))
    decisions = model.stats().decisions
    pictures = {EVIL: DOT}
    shown = certified().described() | {"bound": EVIL}
    return Page(model.explain(), EVIL, described, decisions, analysis, pictures, plan, front, pictures, shown)


def test_pictures_are_named(tmp_path: Path) -> None:
    """Two files of one name are told apart by their folders, and other files than pictures are refused."""
    paths = [tmp_path / folder / "out.png" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(PNG + path.parent.name.encode())
    assert list(read_pictures(paths).values()) == [PNG + b"a", PNG + b"b"]
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    assert list(read_pictures(pictures_in(tmp_path / "a"))) == ["out"]
    with pytest.raises(BadOption, match="jpg"):
        read_pictures([tmp_path / "out.jpg"])
    paths[1].write_bytes(b"GIF89a")
    with pytest.raises(BadOption, match=r"b/out\.png.*this is no PNG"):
        read_pictures(paths)


def test_every_section_is_there(page: Page) -> None:
    parsed = Parsed(page.html())
    assert [attributes["id"] for attributes in parsed.all("section")] == SECTIONS
    assert [attributes["href"] for attributes in parsed.all("a")] == [f"#{name}" for name in SECTIONS]
    assert len(parsed.all("img")) == 3, "a figure, a plan and a sample"
    assert len(parsed.all("details")) == 3, "two blocks, and what is outside of them"
    assert parsed.text.count("blocks.0.attn") >= 2
    assert "Recomp 33.3%" in parsed.text
    decisions = [a for a in parsed.all("rect") if a["class"] in ("compute", "reuse")]
    assert len(decisions) == tiny.SITES * 4, "runs of decisions"
    for kind, count in {"predicted": 6, "measured": 6, "front": 2}.items():
        assert len([a for a in parsed.all("rect") if a["class"] == kind]) == count


def test_the_analysis_is_drawn(page: Page) -> None:
    """Lines and maps of each quantity, similarity of steps, two schedulers, reuse errors and a predictor of them."""
    found = {section.id: section for section in page.analysis}
    redundancy, stability, errors = (found[name] for name in ("redundancy", "stability", "reuse-errors"))
    names = [chart.name.partition(",")[0] for chart in redundancy.charts]
    assert names == [
        "branch: mean |x - y| of consecutive steps",
        "branch: mean |x - y| of consecutive steps",
        "output: mean |x - y| of consecutive steps",
        "output: cosine of each two steps",
    ]
    lines, cells = redundancy.charts[:2]
    assert [len(line.points.split()) for line in lines.polylines] == [5, 5], "a first step has nothing before it"
    assert lines.polylines[0].points.startswith("310.0,") and lines.polylines[0].hue != lines.polylines[1].hue
    dark = {bar.title.partition(",")[0]: bar.shade for bar in cells.bars}
    assert dark["blocks.0.attn"] < 0.1 < 0.9 < dark["blocks.1.attn"] == 1.0
    assert redundancy.rows[1][:2] == (Quantity.BRANCH, "1.5300")
    assert [line.title for line in stability.charts[0].polylines] == ["DDIM", "Heun"]
    assert stability.rows[0][1] == "rank correlation of DDIM and Heun" and stability.rows[1][1].startswith("1.00 ")
    assert len(errors.charts[0].bars) == 2 * 5, "no neighbours are alike"
    assert errors.rows[1][:3] == ("l1", "value", "0.87")
    drawn = Parsed(page.html())
    assert len(drawn.all("polyline")) == sum(len(c.polylines) for s in page.analysis for c in s.charts) == 3 + 4


def test_another_models_analysis_is_refused() -> None:
    other = analysed(4)
    other.model = "g"
    with pytest.raises(OtherAnalysis, match="Heun"):
        list(sections({"DDIM": analysed(4), "Heun": other}))


def test_predicted_stands_beside_measured(page: Page) -> None:
    rows = {row[0]: row[1:] for row in next(s for s in page.sections if s.id == "prediction").rows}
    assert rows[""] == ("predicted", "measured")
    assert rows["speed-up"][0].endswith(" by times") and float(rows["speed-up"][1]) > 0
    assert rows["self branches that compute"] == ("4 of 12", "")
    predicted, measured = (int(cell.replace(",", "")) for cell in rows["bytes in slots"])
    assert predicted == measured > 0


def test_nothing_is_fetched(page: Page) -> None:
    """The policy of the page forbids it, and no attribute and no style asks for it."""
    text = page.html()
    parsed = Parsed(text)
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/", "#")), (tag, name, value[:80])
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert not re.search(r"@import|url\s*\(", styles + "".join(a.get("style") or "" for _, a in parsed.elements))
    assert not parsed.all("link") + parsed.all("script") + parsed.all("iframe")
    (policy,) = (a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_texts_are_escaped(page: Page) -> None:
    text = page.html()
    assert "<script" not in text
    assert Parsed(text).text.count(EVIL) >= 5, "title twice, model, caption of a plot, of a sample, and a policy"


def test_phones_and_dark_mode(page: Page) -> None:
    parsed, text = Parsed(page.html()), page.html()
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert "@media (prefers-color-scheme: dark)" in text


def test_what_is_missing_is_left_out(page: Page) -> None:
    """Without an analysis, a plan, tuning and samples there are no such sections."""
    parsed = Parsed(Page(page.report, "a model").html())
    assert [attributes["id"] for attributes in parsed.all("section")] == ["model", "sites", "graph", "prediction"]
    assert not parsed.all("img")


def test_a_front_with_a_diverged_trial() -> None:
    """It is not drawn, and the others are where they would be without it."""
    points = [{"error": 0.1, "flops": 1.0}, {"error": 0.2, "flops": 0.5}]
    (expected,), (found,) = front_charts(points), front_charts([*points, {"error": math.inf, "flops": 0.4}])
    assert found == expected
    assert not list(front_charts([{"error": math.nan, "flops": 0.4}]))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`report` writes the page, `explain --json` the same numbers."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "redundancy.svg").write_text(DOT)
    analysed(4).save(tmp_path / "analysis.safetensors")
    front = tmp_path / "front.json"
    trials = [
        {
            "trial": i,
            "parameters": {"interval": i + 2},
            "values": {"error": 0.1 + i, "flops": 0.5 - i / 10},
            "front": i < 1,
        }
        for i in range(2)
    ]
    front.write_text(json.dumps({"objectives": ["error", "flops"], "pruned": 0, "trials": trials}))
    out = tmp_path / "page.html"
    options = ["--figures", str(tmp_path / "figures"), "--front", str(front), "--out", str(out), "--steps", "4"]
    options += ["--analysis", str(tmp_path / "analysis.safetensors")]
    assert main(["report", *options, "--json"]) == 0
    parsed = Parsed(out.read_text())
    found = [a["id"] for a in parsed.all("section")]
    assert found == [name for name in SECTIONS if name not in ("certificate", "stability", "plan", "images")]
    assert "error over flops" in parsed.text and [a["class"] for a in parsed.all("rect")].count("other") == 1
    assert json.loads(capsys.readouterr().out) == {"file": str(out), "sections": found}
    assert main(["explain", "--steps", "4", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["predicted"]["counts"]["self"] == [told["predicted"]["counts"]["self"][1] // 2, 32]
    front.write_text("[1]")
    assert main(["report", "--front", str(front), "--out", str(out)]) == FAILED
    assert "list of points" in capsys.readouterr().err


def test_the_certificate_of_a_policy(page: Page, tmp_path: Path) -> None:
    """The page shows it for a file of `autopolicy`. A policy's text and a file without a certificate have none."""
    certified().save(tmp_path / "policy.json")
    shown = read_certificate(str(tmp_path / "policy.json"))
    assert shown == certified().described()
    assert (shown["bound"], shown["winner"]) == ("speedup=2", "policy")
    assert shown["speed-up"] == "2.50 by flops, 0.400 of the cost of a full run"
    assert shown["relative L2 error on held-out seeds (95 % interval)"] == "0.2000 (0.0000 to 0.4483, 3 seeds)"
    assert shown["control"] == "DDIM with 20 steps"
    assert shown["error of the control (95 % interval)"].startswith("0.4500 (0.0000 to ")
    assert dict(next(s for s in page.sections if s.id == "certificate").rows)["control"] == "DDIM with 20 steps"
    (tmp_path / "policy.json").write_text(to_json(FORA(3)))
    assert read_certificate(str(tmp_path / "policy.json")) == read_certificate("fora:interval=3") == {}
    assert replace(certified(), control=None).described()["control"] == "none was given"


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: put it on the path, or its path into $CHROMIUM")
def test_in_a_browser(page: Page, tmp_path: Path) -> None:
    """All plots load, and the page makes no request but for itself."""
    page.save(tmp_path / "page.html")
    log = tmp_path / "net.json"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command += [f"--log-net-log={log}", "--net-log-capture-mode=Everything", "--window-size=390,800"]
    shot = tmp_path / "page.png"
    ran = subprocess.run(
        [*command, f"--screenshot={shot}", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert len(Parsed(ran.stdout).all("img")) == 3 and len(Parsed(ran.stdout).all("polyline")) == 7
    assert shot.stat().st_size > 10_000
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    assert not {url for url in asked if "google" not in url}, "the browser's own services aside"
