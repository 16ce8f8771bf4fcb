"""The tables of DiTFastAttn and of CachedAttention: their figures by hand, their files, and a tiny run of each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from diffusers import DiTTransformer2DModel  # noqa: E402

import dit_rewrite  # noqa: E402
from benchmarks import cached_attention  # noqa: E402
from benchmarks.cached_attention import Kept, bisect, reused_by_step  # noqa: E402
from benchmarks.ditfastattn import run as ditfastattn  # noqa: E402
from benchmarks.ditfastattn.run import find_plan, run_flops, shares, windowed  # noqa: E402
from benchmarks.dqar_fidelity import run as dqar_fidelity  # noqa: E402
from benchmarks.dqar_fidelity.rows import Result  # noqa: E402
from benchmarks.record import Record  # noqa: E402
from benchmarks.timing import Spread  # noqa: E402
from dit_rewrite.demo.shapes import text_model  # noqa: E402
from dit_rewrite.demo.shapes.model import build_denoiser, build_scheduler  # noqa: E402
from dit_rewrite.demo.shapes.sampling import sample_images  # noqa: E402
from dit_rewrite.module import twin
from dit_rewrite.passes.analysis.site import Part  # noqa: E402
from dit_rewrite.policies import CachedAttention, DiTFastAttn  # noqa: E402
from dit_rewrite.policy.plan import Choice, Plan, describe_scheduler, fingerprint  # noqa: E402
from dit_rewrite.runtime.stats import Record as Decided  # noqa: E402
from dit_rewrite.runtime.stats import Stats  # noqa: E402
from dit_rewrite.search.greedy import DELTAS  # noqa: E402

FULL, AST, ASC, WA_RS, WA_RS_ASC = Choice

# One half of the guidance in one attention of the bundled DiT: 64 tokens of width 128, a window of 8 on each side.
PROJECTIONS = 4 * 2 * 64 * 128 * 128
SCORES, NEAR = 64 * 64, 64 * 17 - 8 * 9  # pairs that see each other: 8 rows at each end lack 1 to 8 keys
EACH = 2 * 2 * 128  # FLOPs of a pair, over all heads: query times key, and weight times value
WHOLE = PROJECTIONS + EACH * SCORES
WINDOW = (PROJECTIONS + EACH * NEAR) / WHOLE
RESIDUAL = EACH * NEAR / WHOLE
SHARES = {FULL: 1.0, AST: 0.0, ASC: 0.5, WA_RS: WINDOW, WA_RS_ASC: WINDOW / 2}


def small_denoiser(layers: int = 2) -> DiTTransformer2DModel:
    """The bundled DiT with fewer layers and random weights, gates among them."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=3, out_channels=3, num_layers=layers, sample_size=16,
        patch_size=2, num_embeds_ada_norm=20, norm_elementwise_affine=False,
    ).eval().requires_grad_(False)  # fmt: skip


def plan_of(model: torch.nn.Module, *rows: tuple[Choice, ...], delta: float = 0.025) -> Plan:
    """A plan for the first layers of a model."""
    sites = tuple(f"transformer_blocks.{i}.attn1" for i in range(len(rows[0])))
    scheduler = describe_scheduler(build_scheduler())
    return Plan(fingerprint(model), len(rows), scheduler, sites, rows, delta, 0.125, "first")


# --- DiTFastAttn ------------------------------------------------------------------------------------------------------


def test_the_share_of_each_choice_by_hand() -> None:
    assert shares(build_denoiser()) == pytest.approx(SHARES, abs=1e-15)
    assert round(WINDOW, 6) == 0.849609
    wide = (PROJECTIONS + EACH * (64 * 33 - 16 * 17)) / WHOLE
    assert shares(build_denoiser(), 0.25)[WA_RS] == pytest.approx(wide, abs=1e-15)


@pytest.mark.parametrize(
    ("rows", "spent"),
    [
        (((FULL, FULL), (AST, FULL)), 1 + 1 + 0 + 1),
        (((FULL, FULL), (ASC, AST)), 1 + 1 + 0.5 + 0),
        (((FULL, FULL), (WA_RS, FULL)), 1 + RESIDUAL + 1 + WINDOW + 1),
        (((FULL, FULL), (WA_RS_ASC, WA_RS)), 2 * (1 + RESIDUAL) + WINDOW / 2 + WINDOW),
    ],
    ids=["AST", "ASC", "WA-RS", "WA-RS+ASC"],
)
def test_what_runs_spends_what_the_choices_do_and_the_residuals(rows: Any, spent: float) -> None:
    """The FLOPs of four attentions; a residual costs the window once, at the site and step that store it."""
    denoiser = small_denoiser()
    model = dit_rewrite.compile(twin(denoiser), DiTFastAttn(plan_of(denoiser, *rows)), backend="aot_eager")
    sample_images(model, torch.arange(1), steps=2, guidance=1.25, seed=0)
    assert run_flops(model) == pytest.approx(spent / 4, abs=1e-12)


@pytest.mark.parametrize(("interval", "reuse"), [(2, [False, True, False, True]), (3, [False, True, True, False])])
def test_the_window_alternates_with_full_attention(interval: int, reuse: list[bool]) -> None:
    model = dit_rewrite.compile(small_denoiser(1), windowed(interval, 0.125, residual=False), backend="aot_eager")
    sample_images(model, torch.arange(1), steps=4, guidance=1.25, seed=0)
    assert [record.row[0] for record in model.stats().records] == reuse


def arguments(folder: Path, steps: int = 2) -> argparse.Namespace:
    return argparse.Namespace(plans=folder, steps=steps, calibration=1, search_backend="aot_eager")


def test_a_plan_that_fits_is_loaded_and_another_is_searched(tmp_path, monkeypatch) -> None:
    denoiser, record = small_denoiser(), Record(tmp_path / "out.json", {})
    fits = plan_of(denoiser, (FULL, FULL), (AST, WA_RS), delta=DELTAS["D1"])
    searched: list[tuple[float, int]] = []

    def search(model: Any, trajectories: Any, delta: float, **more: Any) -> Plan:
        searched.append((delta, more["steps"]))
        return fits

    monkeypatch.setattr(ditfastattn, "greedy_plan", search)
    for name in ("D1", "D2"):
        fits.save(tmp_path / f"{name}.json")
    assert find_plan(denoiser, "D1", arguments(tmp_path), record) == fits
    assert (searched, record.sections) == ([], {})
    find_plan(denoiser, "D2", arguments(tmp_path), record)  # another threshold,
    find_plan(denoiser, "D1", arguments(tmp_path, steps=3), record)  # another length,
    find_plan(small_denoiser(1), "D1", arguments(tmp_path), record)  # another model,
    find_plan(denoiser, "D3", arguments(tmp_path), record)  # and no plan at all
    assert searched == [(DELTAS["D2"], 2), (DELTAS["D1"], 3), (DELTAS["D1"], 2), (DELTAS["D3"], 2)]
    assert set(record.sections["searches"]) == {"D1", "D2", "D3"}


def test_a_search_forgets_what_was_said_of_the_plan_before(tmp_path, monkeypatch) -> None:
    denoiser = small_denoiser()
    monkeypatch.setattr(ditfastattn, "greedy_plan", lambda *_, **__: plan_of(denoiser, (FULL, FULL)))
    record = Record(tmp_path / "out.json", {}, {"rows": {"D1": {}, "D2": {}}, "plans": {"D1": {}}})
    find_plan(denoiser, "D1", arguments(tmp_path), record)
    assert record.sections["rows"] == {"D2": {}} and record.sections["plans"] == {}


def test_a_record_is_resumed_under_the_same_header_only(tmp_path) -> None:
    path = tmp_path / "out.json"
    record = Record.open(path, {"settings": {"shape": (1, 2)}})
    assert record.get("rows", "a", lambda: {"value": (3, 4)}) == {"value": [3, 4]}
    again = Record.open(path, {"settings": {"shape": (1, 2)}})
    assert again.get("rows", "a", lambda: {"value": "made again"}) == {"value": [3, 4]}
    assert Record.open(path, {"settings": {"shape": (1, 3)}}).sections == {}


def result(name: str, error: float, accuracy: float = 1.0, frechet: float = 10.0, high: float = 0.9) -> Result:
    ratio = Spread(0.8, 0.7, high, 3)
    return Result({"name": name}, 20, ratio, ratio, 0.5, error, [error], 1.0, accuracy, frechet, 0.0)


def test_what_the_paper_says_is_judged_row_by_row() -> None:
    raw, plans = result("raw", 0.0, high=1.0), [{"flops": flops} for flops in (0.9, 0.7, 0.7)]
    rows = [result("D1", 0.1), result("D2", 0.3, accuracy=0.97, high=1.01), result("D4", 0.2, frechet=99.0)]
    pairs = [{"residual": 0.1, "none": 0.2}, {"residual": 0.2, "none": 0.2}]
    found = [[e["held"] for e in claim.evidence] for claim in ditfastattn.judge([raw, *rows], plans, pairs)]
    assert found == [[True, False], [True, False], [True, False], [True, False, True], [True, False]]
    near = ditfastattn.judge([raw, result("D3", 0.1, accuracy=0.98, frechet=11.0)], plans[:1], pairs)[2]
    assert near.held is True


def test_a_tiny_run_of_the_plans_and_a_second_that_measures_nothing(tmp_path, monkeypatch) -> None:
    denoiser = small_denoiser(1)
    for module in (ditfastattn, dqar_fidelity):
        monkeypatch.setattr(module, "load_denoiser", lambda: denoiser)
    monkeypatch.setattr(dqar_fidelity, "REAL_IMAGES", 200)
    monkeypatch.setattr(ditfastattn, "WINDOWS", (0.125,))
    out, plot, plans = tmp_path / "out.json", tmp_path / "plan.png", tmp_path / "plans"
    given = ["--samples", "2", "--steps", "3", "--batch", "1", "--calibration", "1", "--backend", "aot_eager"]
    given += ["--thresholds", "D6", "--intervals", "2", "--plans", str(plans), "--out", str(out), "--plot", str(plot)]
    ditfastattn.main(given)
    content, plan = json.loads(out.read_text()), Plan.load(plans / "D6.json")
    sections = content["sections"]
    assert list(sections["rows"]) == ["raw", "D6"] and list(sections["residual"]) == ["2 0.125"]
    assert sections["rows"]["raw"]["relative_l2"] == 0 and len(sections["rows"]["D6"]["relative_l2_by_batch"]) == 2
    facts = sections["plans"]["D6"]
    assert facts["flops"] == pytest.approx(sum(SHARES[choice] for row in plan.table for choice in row) / 3)
    assert facts["rows"] == len(set(plan.table)) and facts["evaluations"] == plan.evaluations
    assert sections["residual"]["2 0.125"]["flops"] == pytest.approx((2 + WINDOW) / 3)  # step 1 of 0 to 2
    assert content["settings"]["samples"] == 2 and content["machine"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in ("Bench", "greedy_plan", "describe_plan", "sample_images"):
        monkeypatch.setattr(ditfastattn, name, None)  # measuring would need them
    before = out.read_text()
    ditfastattn.main(given)
    assert out.read_text() == before


# --- CachedAttention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_bisection_finds_where_a_rising_function_meets_its_target(target: float) -> None:
    """x / (1 + x) meets t at t / (1 - t), for results below 1 and above it."""
    tried: list[float] = []

    def rising(x: float) -> float:
        tried.append(x)
        return x / (1 + x)

    at, value = bisect(rising, target, 1e-6, 60)
    assert at == pytest.approx(target / (1 - target), rel=1e-4)
    assert value == pytest.approx(target, abs=1e-6) and at == tried[-1]
    assert len(tried) == len(set(tried)) <= 25


def test_bisection_ends_with_the_nearest_of_what_it_tried() -> None:
    assert bisect(lambda x: x / (1 + x), 0.5, 1e-6, 60) == (1.0, 0.5)  # at the first try
    assert bisect(lambda x: x / (1 + x), 2.0, 1e-6, 4) == (8.0, 8 / 9)  # out of reach: 1, 2, 4, 8
    steps = {"at": 0}

    def jump(x: float) -> float:
        steps["at"] += 1
        return 0.0 if x < 3 else 1.0

    at, value = bisect(jump, 0.4, 1e-6, 10)
    assert (value, steps["at"]) == (0.0, 10) and at < 3


def test_kept_scores_by_step_by_hand() -> None:
    """Two trajectories of 3 steps of a core with 10 scores: the counters continue within each trajectory."""
    sites = [SimpleNamespace(part=Part.CORE), SimpleNamespace(part=Part.CORE_STATE)]
    backend: Any = SimpleNamespace(rewritten=[SimpleNamespace(partition=SimpleNamespace(sites=sites))])
    kept = Kept(backend, 3)
    for computed in ([0, 5, 7], [0, 10, 10]):
        for step, count in enumerate(computed):
            state = [torch.empty(0)] * 9 + [torch.tensor([0, 0, count, 10 * step])]
            kept(observed(step, (None, tuple(state))))
    assert kept.by_step() == pytest.approx([0, 1 - 15 / 20, 1 - 2 / 20])


def observed(step: int, slots: Any) -> Any:
    return SimpleNamespace(graph=0, record=SimpleNamespace(step=step), slots=slots)


def test_reused_sites_by_step_by_hand() -> None:
    stats = Stats()
    for step, row in [(0, (False, False)), (1, (True, False)), (0, (False, False)), (1, (True, True))]:
        stats.count(Decided(0, step, None, 0, 0, ("a", "b"), row, ()), (), (2 - sum(row), sum(row)))
    assert reused_by_step(stats, 2) == [0, 0.75]


@pytest.fixture
def small_text(monkeypatch) -> None:
    """The bundled text model with one layer and random weights."""

    def build() -> text_model.TextModel:
        torch.manual_seed(0)
        return text_model.TextModel().eval().requires_grad_(False)

    monkeypatch.setattr(text_model, "LAYERS", 1)
    monkeypatch.setattr(cached_attention, "load_text_model", build)


@pytest.mark.parametrize(("threshold", "reuse"), [(float("-inf"), [0, 0, 0]), (float("inf"), [0, 1, 1])])
def test_everything_is_kept_or_nothing(small_text, threshold: float, reuse: list[float]) -> None:
    bench = cached_attention.Bench(argparse.Namespace(steps=3, block=8, batch=1, captions=2))
    images, by_step = bench.run(CachedAttention(threshold, 8), bench.sample_all)
    assert by_step == reuse
    assert torch.allclose(images, bench.uncached, atol=1e-5) == (threshold < 0)


def test_a_tiny_run_against_static_reuse(small_text, tmp_path, monkeypatch) -> None:
    for name, value in {"INTERVALS": (2,), "BOUNDS": ("sound",), "EVALUATIONS": 2}.items():
        monkeypatch.setattr(cached_attention, name, value)
    out = tmp_path / "out.json"
    given = ["--captions", "2", "--steps", "4", "--batch", "1", "--out", str(out)]
    cached_attention.main(given)
    content = json.loads(out.read_text())
    rows = content["sections"]["rows"]
    assert list(rows) == ["uncached", "static 2", "sound 2"]
    assert rows["uncached"]["relative_l2"] == 0 and rows["uncached"]["ssim"] == pytest.approx(1)
    assert rows["static 2"]["reuse_by_step"] == [0, 1, 0, 1] and rows["static 2"]["relative_l2"] > 0
    found = content["sections"]["thresholds"]["sound 2"]
    assert found["target"] == 0.5 and rows["sound 2"]["threshold"] == found["threshold"]
    assert 0 <= rows["sound 2"]["reuse"] <= 0.75  # never in the first of four steps
    assert [claim["bound"] for claim in content["claims"]] == ["within 2% of all scores", "relative L2, in every batch"]
    monkeypatch.setattr(cached_attention.Bench, "run", None)  # measuring would need it
    before = out.read_text()
    cached_attention.main(given)
    assert out.read_text() == before


@pytest.mark.parametrize(("errors", "held"), [([0.1, 0.1], True), ([0.1, 0.3], False)])
def test_cached_attention_is_judged_batch_by_batch(monkeypatch, errors: list[float], held: bool) -> None:
    monkeypatch.setattr(cached_attention, "INTERVALS", (4,))

    def row(name: str, reuse: float, errors: list[float]) -> cached_attention.Row:
        return cached_attention.Row(name, name, 4, None, reuse, sum(errors) / 2, errors, 1.0, 1.0, [])

    rows = [row("static 4", 0.75, [0.2, 0.2]), row("sound 4", 0.76, errors), row("paper 4", 0.7, [0.5, 0.5])]
    equal, sound, paper = cached_attention.judge(rows)
    assert [e["held"] for e in equal.evidence] == [True, False]  # 1 point off, and 5
    assert (sound.held, paper.held) == (held, False)


@pytest.mark.parametrize(("main", "size"), [(ditfastattn.main, "--samples"), (cached_attention.main, "--captions")])
def test_batches_of_different_shapes_are_refused(main: Any, size: str, tmp_path) -> None:
    with pytest.raises(SystemExit):
        main([size, "10", "--batch", "4", "--out", str(tmp_path / "out.json")])
