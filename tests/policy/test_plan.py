"""Plans: their contents, their file, the model that they belong to, and their picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dit_rewrite.errors import BadParameter, BadPlan, DitRewriteError, MissingExtra, PlanMismatch
from dit_rewrite.policy.plan import Choice, Plan, describe_scheduler, fingerprint, partial_path

FULL, AST, ASC, WA_RS, WA_RS_ASC = Choice

PLAN = Plan(
    model="0123456789abcdef",
    steps=3,
    scheduler="DDIMScheduler:1234",
    sites=("blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"),
    table=((FULL, FULL, FULL, FULL), (FULL, AST, WA_RS, FULL), (AST, AST, WA_RS_ASC, ASC)),
    delta=0.05,
    window=0.125,
    conditional="second",
    evaluations=23,
    work=0.4,
    notes=("2 cross not searched (kinds: self)",),
)

TWO_STREAMS = replace(
    PLAN, table=tuple((*row, *(FULL, AST, FULL, FULL)) for row in PLAN.table), streams=("cond", "uncond")
)


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


# --- the model that it belongs to -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=bias)
        self.act: nn.Module = nn.GELU()
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("table", torch.ones(3), persistent=False)


class Other(Block):
    """The same tensors in a module of another class."""


def same_size_other_activation() -> Block:
    block = Block()
    block.act = nn.SiLU()
    return block


def renamed() -> Block:
    block = Block()
    block.projection = block.proj
    del block.proj
    return block


def test_fingerprints_of_equal_models():
    """Other values, a compiled copy and tables for another size do not change the fingerprint."""
    model = Block()
    compiled = torch.compile(Block(), backend="eager")
    longer = Block()
    longer.register_buffer("table", torch.ones(9), persistent=False)
    assert len(fingerprint(model)) == 64
    assert {fingerprint(m) for m in (model, Block(), compiled, longer)} == {fingerprint(model)}


def test_shared_modules_count_as_often_as_they_stand():
    shared = Block()
    assert fingerprint(nn.Sequential(shared, shared)) == fingerprint(nn.Sequential(Block(), Block()))


def test_fingerprints_of_other_models():
    """Class, width, parameter, name, activation, dtype, buffer and number of blocks each change the fingerprint."""
    more_scale = Block()
    more_scale.register_buffer("scale", torch.ones(5))
    others = [
        *(Other(), Block(8), Block(bias=False), renamed(), same_size_other_activation(), Block().half(), more_scale),
        *(nn.Sequential(Block()), nn.Sequential(Block(), Block())),
    ]
    assert len({fingerprint(model) for model in (Block(), *others)}) == 1 + len(others)


def test_a_plan_knows_its_model_and_number_of_steps():
    plan = replace(PLAN, model=fingerprint(Block()))
    plan.check(Block(), num_steps=3)
    with pytest.raises(PlanMismatch, match=r"another model \(its fingerprint is .* this Other is .* search one"):
        plan.check(Other(), num_steps=3)
    with pytest.raises(PlanMismatch, match="The plan has 3 steps, and the trajectory has 2. Sample with 3 steps"):
        plan.check(Block(), num_steps=2)
    with pytest.raises(PlanMismatch, match="The plan has 3 steps, and the trajectory has 4"):
        plan.check(Block(), num_steps=4)
    assert issubclass(PlanMismatch, DitRewriteError)


class Scheduler:
    def __init__(self, **config: Any) -> None:
        self.config = config


def test_schedulers_as_text():
    text = describe_scheduler(Scheduler(beta=0.1, name="linear", betas=torch.ones(2)))
    assert text.startswith("Scheduler:")
    assert describe_scheduler(Scheduler(name="linear", betas=torch.ones(2), beta=0.1, _version="2")) == text
    assert describe_scheduler(Scheduler(beta=0.2, name="linear", betas=torch.ones(2))) != text
    assert describe_scheduler(Scheduler(beta=0.1, name="linear", betas=torch.zeros(2))) != text
    assert describe_scheduler(object()).startswith("object:")
    assert describe_scheduler(None) == "none"


# --- its picture ------------------------------------------------------------------------------------------------------


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
