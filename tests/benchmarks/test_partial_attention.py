"""Attention reused in part: the static rules that it is compared with, what is judged, and the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

for needed in ("rich", "diffusers", "torchmetrics"):
    pytest.importorskip(needed)

from benchmarks import partial_attention  # noqa: E402
from benchmarks.partial_attention import (  # noqa: E402
    MARKS,
    Row,
    flops_share,
    judge,
    render,
    static_blocks,
    static_share,
    whole,
)
from benchmarks.timing import RESULTS  # noqa: E402
from dit_rewrite.guards import step  # noqa: E402
from dit_rewrite.policies import FORA, TileReuse  # noqa: E402
from tests.helpers import tiny  # noqa: E402


@pytest.mark.parametrize(("share", "steps"), [(0.05, [10]), (0.099, [10]), (0.25, [2, 6, 10, 14, 18])])
def test_whole_attention_in_as_many_steps(share: float, steps: list[int]) -> None:
    (rule,) = whole(share, 20).rules
    assert [s for s in range(20) if rule.when.subs({step: s}) == True] == steps  # noqa: E712


def test_blocks_in_all_but_every_nth_step() -> None:
    (rule,) = static_blocks(4).rules
    assert [s for s in range(9) if rule.when.subs({step: s}) == False] == [0, 4, 8]  # noqa: E712
    assert static_share(4, 20) == 15 / 20 * 9 / 73


@pytest.mark.parametrize(
    ("policy", "share"),
    [(FORA(2, kinds=("mlp",)), 0.5), (TileReuse(0.25, 2, kinds=("mlp",)), (1 + 3 / 4) / 4)],
    ids=["whole", "tiles"],
)
def test_flops_of_the_branches(policy: Any, share: float) -> None:
    model = tiny.rewritten(tiny.build(), policy)
    tiny.outputs(model, tiny.calls(4))
    assert flops_share(model, None, 4) == pytest.approx(share)  # type: ignore[arg-type]


def rows(name: str, errors: tuple[list[float], list[float]], threshold: float | None = None) -> list[Row]:
    pairs = zip(partial_attention.INTERVALS, errors, strict=True)
    return [Row(f"{name} {n}", n, threshold, 0.5, sum(each) / 2, each) for n, each in pairs]


def test_judgement_and_page() -> None:
    """A row that is closer in one batch only is not closer."""
    joint = [
        *rows("static blocks", ([0.2, 0.2], [0.2, 0.2])),
        *rows("blocks", ([0.1, 0.1], [0.1, 0.3]), 0.5),
        *rows("whole", ([0.4, 0.4], [0.4, 0.4])),
    ]
    names = ("whole", "turns", "change", "often", "shares")
    tiles = [row for name in names for row in rows(name, ([0.2, 0.2], [0.2, 0.2]))]
    claims = judge(joint, tiles)
    assert [[each["held"] for each in claim.evidence] for claim in claims] == [
        [True, False],
        [True, True],
        [False, False],
        [False, False],
        [False, False],
        [False, False],
    ]
    sections = {name: {row.name: asdict(row) for row in each} for name, each in (("joint", joint), ("tiles", tiles))}
    settings = {"captions": 2, "steps": 4}
    text = render({"settings": settings, "sections": sections, "claims": list(map(asdict, claims))})
    assert "| the text's blocks in all but every n-th step | 4 | 50.0% | 0.2000 |" in text
    assert "beat the same blocks in fixed steps: in 1 of 2 comparisons" in text


def test_the_page_is_that_of_the_results(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "partial_attention.json").read_text(encoding="utf-8"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    partial_attention.write_page(content, page)
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{MARKS[0]}\n{render(content)}{MARKS[1]}\nafter\n"
    assert render(content) in partial_attention.PAGE.read_text(encoding="utf-8")
