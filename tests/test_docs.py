"""The pages agree with the source and with the benchmark results, and their links and paths exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dit_rewrite.policies import text
from docs.figures import imports

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def blocks(page: Path) -> list[str]:
    """The Python code of a page, without the files that it includes."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# --- links and paths --------------------------------------------------------------------------------------------------


def test_the_pages_build_without_a_broken_link(tmp_path: Path) -> None:
    """`make docs`: pages, anchors and included files exist, and each page is in the navigation."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert {page.stem for page in DOCS} == {page.stem for page in tmp_path.glob("*.html")} - {"404"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not {target for target in targets if not (page.parent / target).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_text(page: Path) -> None:
    """Each path in code marks, and each included path, names an existing file."""
    content = page.read_text(encoding="utf-8")
    top = "benchmarks|dit_rewrite|docs|examples|kernels|passes|runtime|tests"
    named = set(re.findall(rf"`((?:{top})/[\w/.]+)`", content)) | set(re.findall(r'--8<-- "([^"]+)"', content))
    assert not {name for name in named if not (ROOT / name).exists()}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) < 1800


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "policies.md"], ids=lambda page: page.name)
def test_rules_on_the_pages_run(page: Path) -> None:
    (rules,) = [block for block in blocks(page) if block.startswith("from sympy")]
    names: dict[str, Any] = {}
    exec(rules, names)
    assert str(names["every_third"].rules[0].when) == "Ne(Mod(step, 3), 0)"


def test_imports_on_the_pages_work() -> None:
    lines = {line for page in PAGES for block in blocks(page) for line in block.splitlines()}
    imported = sorted(line for line in lines if re.match(r"(from|import) dit_rewrite", line))
    assert len(imported) >= 4
    exec("\n".join(imported), {})


def test_policies_in_text_exist() -> None:
    given = {name for page in PAGES for name in re.findall(r'enable\(pipe, "([^"]+)"', page.read_text())}
    assert {"taylorseer:interval=3", "fora:interval=3"} <= given
    for policy in given - {"alternate:warmup=2"}:  # the example of how to register one
        text.parse(policy)


def test_every_policy_is_listed() -> None:
    page = read("policies.md")
    assert not {build.__name__ for build in text._POLICIES.values() if f"| `{build.__name__}(" not in page}


# --- figures and tables -----------------------------------------------------------------------------------------------


def test_architecture_is_drawn_from_the_source() -> None:
    assert read("architecture.svg") == imports.svg(), "python -m docs.figures.imports draws it again"


def test_passes_are_listed_in_their_order() -> None:
    from dit_rewrite.compiler.pipeline import PASSES

    table = read("architecture.md").partition("| pass |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [each.name for each in PASSES]


def test_overhead_is_rendered_from_its_results() -> None:
    from benchmarks.overhead import report

    assert read("overhead.md") == report.render(results("overhead"))


@pytest.mark.parametrize("name", ["hoisting", "peak_memory", "predictions"])
def test_tables_of_other_benchmarks(name: str) -> None:
    from benchmarks.overhead import report

    assert "\n".join(report.table(results(name)["rows"])) in read("benchmarks.md")


def test_fidelity_is_rendered_from_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks.fidelity --page` writes the page anew, and prints the table of the README."""
    pytest.importorskip("diffusers")
    from benchmarks.fidelity import run as fidelity

    fidelity.main(["--page", "--docs", str(tmp_path)])
    assert read("fidelity.md") == (tmp_path / "fidelity.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in README.read_text(encoding="utf-8")


def test_readme_has_the_table_of_the_demo() -> None:
    """Each forecast has a row, and its control the next one. The text has the numbers of images, steps and threads."""
    content, demo = README.read_text(encoding="utf-8"), results("demo")
    rows = [method for method in demo["methods"] if "forecast" in (method["control_of"] or method["name"])]
    found = re.findall(r"^\| (.+) \| (\d\.\d\d)x \| (0\.\d{4}) \|$", content, re.MULTILINE)
    assert [row[1:] for row in found] == [(f"{r['speed_up']:.2f}", f"{r['relative_l2']:.4f}") for r in rows]
    assert [row[0] for row in found if "steps" in row[0]] == [r["name"] for r in rows if r["control_of"]]
    settings = demo["settings"]
    assert (settings["images"], settings["steps"], settings["threads"]) == (16, 50, 1)
    assert "16 images of a small bundled model, 50 DDIM steps, on one CPU thread" in content


def test_readme_counts_the_pipelines() -> None:
    pytest.importorskip("diffusers")
    from tests.end_to_end.pipelines.registry import PIPELINES

    assert f"\n{len(PIPELINES)} pipelines of diffusers are tested" in README.read_text(encoding="utf-8")


def test_models_have_the_figures_of_their_results() -> None:
    """The README's table is a part of the page's table, which has the rows of the results in their order."""
    rows = re.findall(r"^\| [^|]+ \| (\d) \|(.*) (\d+)% \| (\d+) \| (\d+) \|$", read("models.md"), re.MULTILINE)
    models = results("models")["models"].values()
    kinds = ("self", "cross", "joint", "parallel", "mlp")
    expected = [
        (
            str(model["graphs"]),
            "".join(f" {model['sites'].get(kind, '')} |" for kind in kinds),
            f"{model['flops_in_sites']:.0%}".rstrip("%"),
            str(model["ops_computing"]),
            str(model["ops_reusing"]),
        )
        for model in models
    ]
    assert rows == expected
    content = README.read_text(encoding="utf-8")
    assert all(f"|{sites} {share}% |" in content for _, sites, share, _, _ in expected)


def test_readme_quotes_the_results() -> None:
    content = README.read_text(encoding="utf-8")
    found = {row["what"]: row["value"]["median"] for row in results("overhead")["rows"]}
    cost = content.partition("## What it costs")[2].partition("\n## ")[0]
    for quoted in (
        f"{found['reuse 0 / plain']:.3f} times",
        f"{found['FORA(3), 50 steps: speed-up']:.1f} times faster",
        f"{100 * found['FORA(3), as a share of the ideal']:.0f} % of its ideal",
        f"{found['FORA(3) / plain, first call']:.2f} times as long",
        f"{found['host time added to a call, explicit trajectory'] / 1000:.2f} ms",
    ):
        assert quoted in cost


def test_readme_counts_the_comparisons_by_time() -> None:
    claims = {claim["claim"]: claim["evidence"] for claim in results("fidelity")["claims"]}
    counts = []
    for toy in ("class", "text", "flow"):
        evidence = claims[f"{toy}: A policy beats fewer steps at equal time"]
        counts.append(f"{sum(each['held'] for each in evidence)} of {len(evidence)}")
    by_class, by_text, flow = counts
    content = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{by_class} comparisons by class, {by_text} by text, {flow} with flow matching" in content


def test_readme_says_how_well_autopolicy_does() -> None:
    claims = {claim["claim"]: claim for claim in results("autopolicy")["claims"]}
    toys = ("class", "text", "flow")
    bounds = [each for toy in toys for each in claims[f"{toy}: the bound holds on unseen seeds"]["evidence"]]
    assert all(each["held"] for each in bounds)
    shares = [
        each["share"] for toy in toys for each in claims[f"{toy}: against fewer steps at equal FLOPs"]["evidence"]
    ]
    content = " ".join(README.read_text(encoding="utf-8").split())
    assert f"On the three bundled toys all {len(bounds)} bounds that were asked for held on unseen images" in content
    assert f"at speed-ups of 2 and 3 the error was at most {max(shares):.2f} of that of fewer steps" in content
