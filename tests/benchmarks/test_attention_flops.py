"""The FLOPs of DiTFastAttn's strategies beside its table 2: ours exactly, and their distance from the paper's
figures."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("rich")

from diffusers.models.attention_processor import Attention  # noqa: E402

from benchmarks import attention_flops as bench  # noqa: E402
from benchmarks.attention_flops import MODELS, RAW, STRATEGIES, Result, Strategy, WindowProcessor  # noqa: E402

SEQUENCES = (1024, 4096, 16384)  # table 2


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return bench.results()


def pairs_in_window(tokens: int) -> int:
    """Row by row: the keys from i - N/8 up to i + N/8 that exist."""
    rows, reach = torch.arange(tokens), tokens // 8
    return int(((rows + reach).clamp(max=tokens - 1) - (rows - reach).clamp(min=0) + 1).sum())


def module_flops(tokens: int, pairs: int) -> int:
    """Four projections, scores, and scores times values; a multiply-add is two."""
    projection = 2 * tokens * 1152 * 1152
    core = 16 * (2 * 72 * pairs + 2 * 72 * pairs)
    return 4 * projection + core


def test_every_count_is_the_one_by_hand(results: list[Result]) -> None:
    """ASC computes one half of two, a window only the pairs inside it, and AST nothing."""
    assert [(r.tokens, r.strategy) for r in results] == [(n, s.name) for n in SEQUENCES for s in STRATEGIES]
    for tokens, (asc, window, both, ast) in zip(SEQUENCES, (results[:4], results[4:8], results[8:]), strict=True):
        full, near = module_flops(tokens, tokens**2), module_flops(tokens, pairs_in_window(tokens))
        assert [r.raw for r in (asc, window, both, ast)] == [2 * full] * 4
        assert [r.counted for r in (asc, window, both, ast)] == [full, 2 * near, near, 0]
    assert results[1].counted == 2 * (8 * 1024 * 1152**2 + 4 * 1152 * 246_656)  # 1024 * 257 - 128 * 129 pairs


def test_counting_and_the_formula_agree(results: list[Result]) -> None:
    """To the last FLOP; without clipping there are more FLOPs where there is a window, and only there."""
    assert [r.formula for r in results] == [r.counted for r in results]
    windowed = {s.name for s in STRATEGIES if s.windowed}
    assert {r.strategy for r in results if r.unclipped > r.formula} == windowed == {"WA-RS", "WA-RS+ASC"}
    assert all(r.unclipped == r.formula for r in results if r.strategy not in windowed)
    assert results[5].unclipped == 2 * module_flops(4096, 4096 * 1024)


def test_our_percentages(results: list[Result]) -> None:
    """The printed percentages, in hundredths."""
    assert [f"{r.percent(r.counted):.2f}" for r in results] == [
        "50.00", "76.47", "38.23", "0.00",
        "50.00", "51.01", "25.51", "0.00",
        "50.00", "32.88", "16.44", "0.00",
    ]  # fmt: skip


def test_the_papers_figures_are_within_two_points(results: list[Result]) -> None:
    """All but one equal ours in whole percent, and that one equals ours without clipping."""
    assert all(r.within for r in results)
    assert max(abs(r.difference) for r in results) == pytest.approx(0.532, abs=1e-3)
    other = [r for r in results if round(r.percent(r.counted)) != r.paper]
    assert [(r.tokens, r.strategy, r.paper, round(r.percent(r.unclipped))) for r in other] == [(1024, "WA-RS", 77, 77)]


@pytest.mark.parametrize(("counted", "within"), [(520, True), (521, False), (480, True), (479, False)])
def test_the_goal_is_two_points_either_way(counted: int, within: bool) -> None:
    row = Result("a model", 1, "ASC", raw=1000, counted=counted, formula=0, unclipped=0, paper=50)
    assert row.within == within


def test_the_counted_models_are_those_of_the_table() -> None:
    """16 heads of 72, the same width in and out, with biases: read from the counted modules."""
    assert tuple(model.tokens for model in MODELS) == SEQUENCES
    for model in MODELS:
        attn = model.attention()
        assert (attn.heads, attn.to_q.in_features, attn.to_q.out_features) == (16, 1152, 16 * 72)
        assert (attn.to_k.in_features, attn.to_v.in_features, attn.to_out[0].out_features) == (1152, 1152, 1152)
        assert attn.norm_q is None
        assert attn.to_q.weight.is_meta


# --- the counted modules compute the right values ---------------------------------------------------------------------


@pytest.fixture
def attn() -> Attention:
    return Attention(query_dim=24, heads=3, dim_head=8, bias=True).requires_grad_(False)


def in_window(attn: Attention, states: Tensor, residual: Tensor) -> Tensor:
    """Equation 2 by a dense mask: softmax over the keys within N/8, times the values, plus R, projected."""
    rows = torch.arange(states.shape[1])
    far = (rows[:, None] - rows).abs() > states.shape[1] // 8
    q, k, v = (p(states).reshape(*states.shape[:2], 3, 8).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(far, -math.inf)
    return attn.to_out[0]((scores.softmax(-1) @ v + residual).transpose(1, 2).reshape(states.shape))


@pytest.mark.parametrize("halves", [1, 2])
def test_the_windowed_step_is_equation_2(attn: Attention, halves: int) -> None:
    """On both halves, or on the conditional half only, whose result the other one shares (ASC)."""
    states, residual = torch.randn(2, 32, 24), torch.randn(halves, 3, 32, 8)
    expected = in_window(attn, states[:halves], residual)
    attn.set_processor(WindowProcessor(residual))
    found = bench.step(attn, states, Strategy("", halves, windowed=True), torch.zeros_like(states))
    assert found.shape == states.shape
    torch.testing.assert_close(found[:halves], expected)
    assert torch.equal(found[0], found[1]) == (halves == 1)


def test_steps_without_a_window(attn: Attention) -> None:
    """The raw step is the module itself, ASC repeats its first half, AST returns the cached output."""
    states, cached = torch.randn(2, 32, 24), torch.randn(2, 32, 24)
    whole = attn(states)
    asc, ast = STRATEGIES[0], STRATEGIES[3]
    assert torch.equal(bench.step(attn, states, RAW, cached), whole)
    torch.testing.assert_close(bench.step(attn, states, asc, cached), whole[:1].expand(2, -1, -1))
    assert bench.step(attn, states, ast, cached) is cached


def test_the_written_results_are_current(results: list[Result]) -> None:
    written = json.loads((bench.RESULTS / "attention_flops.json").read_text())
    assert written == json.loads(json.dumps(bench.as_json(results)))
