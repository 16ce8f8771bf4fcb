"""Plans: their contents, and their file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_rewrite.errors import BadParameter, BadPlan
from dit_rewrite.policy.plan import Choice, Plan, partial_path
from tests.helpers.plans import ASC, AST, FULL, PLAN, TWO_STREAMS, WA_RS, WA_RS_ASC


def saved(path: Path, plan: Plan = PLAN) -> dict[str, Any]:
    """The JSON that `save` writes."""
    plan.save(path)
    return json.loads(path.read_text())


# --- contents ---------------------------------------------------------------------------------------------------------


def test_choices_have_the_names_of_the_paper():
    assert [str(choice) for choice in Choice] == ["full", "AST", "ASC", "WA-RS", "WA-RS+ASC"]


def test_counts_and_fractions():
    assert PLAN.counts == {FULL: 6, AST: 3, ASC: 1, WA_RS: 1, WA_RS_ASC: 1}
    assert list(PLAN.counts) == list(Choice)
    assert PLAN.fraction(AST) == 3 / 12
    bare = replace(PLAN, table=((FULL,) * 4,) * 3)
    assert (bare.fraction(FULL), bare.fraction(AST), bare.counts[WA_RS]) == (1, 0, 0)
    assert (TWO_STREAMS.counts[AST], TWO_STREAMS.fraction(AST)) == (6, 6 / 24)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ""}, "model=''"),
        ({"model": 7}, "model=7"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"steps": 4}, "table='…'.*a tuple of 4 rows"),
        ({"scheduler": ""}, "scheduler=''"),
        ({"sites": ()}, r"sites=\(\)"),
        ({"sites": ("a", "b", "c", "a")}, "sites=.*a tuple of names, each once"),
        ({"sites": ("a", "b", "c", 4)}, "sites=.*a tuple of names, each once"),
        ({"sites": "abcd"}, "sites='abcd'"),
        ({"sites": ("a", "b", "c")}, r"len\(table\[0\]\)=4.*3, one for each site"),
        ({"streams": ("cond", "uncond")}, r"len\(table\[0\]\)=4.*8, one for each site and stream"),
        ({"streams": ("cond", "cond")}, r"streams=\('cond', 'cond'\).*each once"),
        ({"streams": ["cond"]}, "streams="),
        ({"table": [(FULL,) * 4] * 3}, "table=.*a tuple of 3 rows"),
        ({"table": ((FULL,) * 4, (FULL,) * 4, ("full",) * 4)}, r"table\[2\]=.*a tuple of Choice"),
        ({"delta": -0.1}, "delta=-0.1"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"delta": "0.1"}, "delta='0.1'"),
        ({"window": 0}, "window=0 .*a fraction"),
        ({"window": 1.5}, "window=1.5"),
        ({"window": ()}, r"window=\(\)"),
        ({"window": (2, -1), "grid": (4, 4)}, "window=.*whole numbers"),
        ({"window": (2, 1.5), "grid": (4, 4)}, "window=.*whole numbers"),
        ({"window": (1, 1, 1, 1), "grid": "latent"}, "window=.*of grid=latent"),
        ({"grid": "image"}, 'grid=.image.*"latent"'),
        ({"metric": ""}, "metric=''"),
        ({"attention": (1.0,)}, r"attention=\(1.0,\).*3 numbers"),
        ({"attention": (1.0, 0.5, float("nan"))}, "attention=.*3 numbers"),
        ({"window": (2, 2)}, "window=.*one for each axis of grid=None"),
        ({"window": (2, 2), "grid": (4, 4, 4)}, r"window=.*one for each axis of grid=\(4, 4, 4\)"),
        ({"grid": (4, 0)}, r"grid=\(4, 0\)"),
        ({"grid": 16}, "grid=16"),
        ({"grid": (2, 2, 2, 2)}, "grid="),
        ({"notes": "all of it"}, "notes='all of it'"),
        ({"window": None}, "window=None.*for WA-RS"),
        ({"conditional": "third"}, "conditional='third'"),
        ({"conditional": None}, "conditional=None.*for ASC"),
        ({"evaluations": -1}, "evaluations=-1"),
        ({"work": float("inf")}, "work=inf"),
    ],
)
def test_fields_that_do_not_fit(changes: dict[str, Any], says: str):
    with pytest.raises(BadParameter, match=f"(?s)Plan: {says}"):
        replace(PLAN, **changes)


def test_what_no_choice_needs_may_be_missing():
    table = ((FULL,) * 4, (AST,) * 4, (FULL,) * 4)
    assert replace(PLAN, table=table, window=None, conditional=None).counts[AST] == 4
    assert replace(PLAN, window=(3, 0), grid=(8, 8)).window == (3, 0)
    with pytest.raises(BadParameter, match="window=None"):
        replace(PLAN, table=(*table[:2], (WA_RS, FULL, FULL, FULL)), window=None, conditional=None)
    with pytest.raises(BadParameter, match="conditional=None"):
        replace(PLAN, table=(*table[:2], (ASC, FULL, FULL, FULL)), window=None, conditional=None)


# --- its file ---------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path):
    path = tmp_path / "new" / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert Plan.load(str(path)) == PLAN
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]
    content = json.loads(path.read_text())
    assert content["version"] == 4
    assert content["table"] == ["full full full full", "full AST WA-RS full", "AST AST WA-RS+ASC ASC"]


CELLS = st.sampled_from(Choice)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sites = tuple(draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4, unique=True)))
    row = st.tuples(*[CELLS] * len(sites))
    table = tuple(draw(st.lists(row, min_size=1, max_size=4)))
    grid = draw(st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    reach = st.lists(st.integers(0, 99), min_size=len(grid or "1"), max_size=len(grid or "1")).map(tuple)
    shares = st.lists(st.floats(0.01, 0.99), min_size=len(grid or "1"), max_size=len(grid or "1")).map(tuple)
    window, grid = draw(st.floats(1e-3, 1) | reach | shares), draw(st.sampled_from([grid, "latent"]))
    half = draw(st.sampled_from(["first", "second"]))
    delta, work = draw(st.floats(0, 1)), draw(st.floats(0, 2))
    tried, notes = draw(st.integers(0, 10**6)), tuple(draw(st.lists(st.text(), max_size=2)))
    metric, attention = draw(st.sampled_from(["ssim", "a.b"])), draw(st.sampled_from([(), (0.5,) * len(table)]))
    streams = draw(st.sampled_from([(), ("cond",), ("cond", "uncond")]))
    table = tuple(row * max(1, len(streams)) for row in table)
    known = (delta, window, half, tried, work, grid, notes, metric, attention, streams)
    return Plan("m", len(table), "none", sites, table, *known)


@settings(deadline=None, max_examples=30)
@given(plans())
def test_any_plan_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, plan: Plan):
    path = tmp_path_factory.getbasetemp() / "any.json"
    plan.save(path)
    assert Plan.load(path) == plan


def test_saving_removes_what_the_search_left(tmp_path: Path):
    path = tmp_path / "plan.json"
    partial_path(path).write_text("{}")
    assert partial_path(path).name == "plan.json.partial"
    PLAN.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "plan.json"
    PLAN.save(path)

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        replace(PLAN, delta=0.1).save(path)
    assert Plan.load(path) == PLAN


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"table": ["full full full full", "full AST WA-RS full", "AST AST TGATE ASC"]}, "choice='TGATE'.*one of full"),
        ({"table": ["full full full full", "full AST WA-RS full", "AST AST ast ASC"]}, "choice='ast'"),
        ({"table": ["full full full full", "full AST WA-RS full", ""]}, "choice=''"),
        ({"table": ["full full full full", "full AST WA-RS full", 3]}, "choice=3"),
        ({"table": ["full full full full", "full AST WA-RS full", ["AST"] * 4]}, "choice=.'AST'"),
        ({"table": ["full full full full"]}, "a tuple of 3 rows"),
        ({"table": "full"}, "table='full'.*a list"),
        ({"sites": {"a": 1}}, "sites=.*a list"),
        ({"window": "1/8"}, "window='1/8'"),
        ({"conditional": ["first"]}, r"conditional=\['first'\]"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"version": 5}, "its version is 5, and this dit_rewrite reads version 4"),
        ({"version": 0}, "its version is 0"),
        ({"version": 1}, "has unknown fields attention, grid, metric, notes, streams"),
        ({"version": 2}, "has unknown fields attention, metric, streams"),
        ({"version": 3}, "has unknown fields streams"),
        ({"grid": {"H": 4}}, "grid={'H': 4}"),
        ({"version": True}, "its version is True"),
        ({"version": None}, "its version is None"),
        ({"strategy": "greedy"}, "has unknown fields strategy"),
    ],
)
def test_files_with_foreign_values(tmp_path: Path, changes: dict[str, Any], says: str):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(saved(path) | changes))
    with pytest.raises(BadPlan, match=rf"(?s)plan\.json cannot be used as a plan: .*{says}.*Plan\.save"):
        Plan.load(path)


def test_files_that_lack_a_field(tmp_path: Path):
    path = tmp_path / "plan.json"
    content = saved(path)
    for name in content:
        path.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        with pytest.raises(
            BadPlan, match="its version is None" if name == "version" else f"it lacks the fields {name}"
        ):
            Plan.load(path)


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        (1, ("attention", "grid", "metric", "notes", "streams")),
        (2, ("attention", "metric", "streams")),
        (3, ("streams",)),
    ],
)
def test_files_of_earlier_versions(tmp_path: Path, version: int, lacks: tuple[str, ...]):
    """The first had no grid and no notes, the second no metric and no FLOPs, the third no streams."""
    path = tmp_path / "plan.json"
    old = {key: value for key, value in saved(path).items() if key not in lacks}
    path.write_text(json.dumps(old | {"version": version}))
    assert Plan.load(path) == (replace(PLAN, notes=()) if "notes" in lacks else PLAN)
    path.write_text(json.dumps(old))
    with pytest.raises(BadPlan, match=f"it lacks the fields {', '.join(lacks)}"):
        Plan.load(path)


def test_the_share_of_attention():
    """Over all steps, where it was counted."""
    assert PLAN.attention_share is None
    assert replace(PLAN, attention=(1.0, 0.5, 0.0)).attention_share == 0.5


@pytest.mark.parametrize("content", [b"", b"full AST", b"\x93NUMPY\xff", b'{"version": 1', b"[" * 100_000])
def test_files_that_are_no_json(tmp_path: Path, content: bytes):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(BadPlan, match="it is not JSON"):
        Plan.load(path)


def test_files_that_are_no_object_or_not_there(tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text("[1]")
    with pytest.raises(BadPlan, match="it is a list"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "other.json")
