"""The HTML report: every section, no request to the network, escaped texts, and a look in a headless browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dit_rewrite.cli.main import FAILED, main
from dit_rewrite.policies import FORA
from dit_rewrite.policy.plan import Choice, Plan
from dit_rewrite.report.page import Page
from tests.helpers import tiny
from tests.report.test_prediction import run

EVIL = '<script src="http://evil.example/x.js">alert(1)</script>'
SECTIONS = ["model", "sites", "redundancy", "plan", "front", "images", "graph", "decisions", "prediction"]
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
    return Page(model.explain(), EVIL, described, model.stats().decisions, {EVIL: DOT}, plan, front, {EVIL: DOT})


def test_every_section_is_there(page: Page) -> None:
    parsed = Parsed(page.html())
    assert [attributes["id"] for attributes in parsed.all("section")] == SECTIONS
    assert [attributes["href"] for attributes in parsed.all("a")] == [f"#{name}" for name in SECTIONS]
    assert len(parsed.all("img")) == 4, "an analysis, a plan, a front and a sample"
    assert len(parsed.all("details")) == 3, "two blocks, and what is outside of them"
    assert parsed.text.count("blocks.0.attn") >= 2
    assert "Recomp 33.3%" in parsed.text
    decisions = [a for a in parsed.all("rect") if a["class"] in ("compute", "reuse")]
    assert len(decisions) == tiny.SITES * 4 + 6 + 6, "runs of decisions, and the predicted and measured times"


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


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`report` writes the page, `explain --json` the same numbers."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "redundancy.svg").write_text(DOT)
    front = tmp_path / "front.json"
    front.write_text(json.dumps({"points": [{"error": 0.1, "seconds": 2}]}))
    out = tmp_path / "page.html"
    options = ["--figures", str(tmp_path / "figures"), "--front", str(front), "--out", str(out), "--steps", "4"]
    assert main(["report", *options]) == 0
    found = [a["id"] for a in Parsed(out.read_text()).all("section")]
    assert found == [name for name in SECTIONS if name not in ("plan", "images")]
    capsys.readouterr()
    assert main(["explain", "--steps", "4", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["predicted"]["counts"]["self"] == [told["predicted"]["counts"]["self"][1] // 2, 32]
    front.write_text("[1]")
    assert main(["report", "--front", str(front), "--out", str(out)]) == FAILED
    assert "list of points" in capsys.readouterr().err


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
    assert len(Parsed(ran.stdout).all("img")) == 4
    assert shot.stat().st_size > 10_000
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    assert not {url for url in asked if "google" not in url}, "the browser's own services aside"
