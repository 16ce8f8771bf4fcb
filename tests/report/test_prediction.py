"""Predictions against runs: FLOPs by torch's counter, counts by the statistics, hand-derived shares of attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dit_rewrite
from dit_rewrite import module
from dit_rewrite.cli.explain import as_json
from dit_rewrite.errors import NotCaptured, PredictionReason
from dit_rewrite.module import twin
from dit_rewrite.passes.analysis.site import Kind
from dit_rewrite.policies import DQAR, FORA, CachedAttention, DiTFastAttn, FirstBlockCache, Never, TaylorSeer
from dit_rewrite.policy.plan import Choice, Plan, describe_scheduler, fingerprint, parse_row
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.prediction import Prediction
from tests.helpers import tiny
from tests.helpers.models import falling, latents, prepare

TOKENS, BATCH, LAYERS = 8, 2, 2
PROJECTIONS = 8 * TOKENS * tiny.WIDTH**2  # of one sample
SCORES = 4 * TOKENS**2 * tiny.WIDTH
FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}


class Counting:
    """Lowers graphs to code that counts its FLOPs."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
                outputs = gm.forward(*args)
            self.flops += counter.get_total_flops()
            return outputs

        return run


def run(policy: Policy, steps: int, scheduler: Any = None, layers: int = LAYERS, **options: Any) -> Any:
    """Compile the tiny model and run a trajectory."""
    model = dit_rewrite.compile(tiny.build(layers), policy, **{"backend": "aot_eager", **options})
    with model.trajectory(steps, scheduler):
        tiny.outputs(model, tiny.calls(steps))
    return model


def predicted(model: Any, **how: Any) -> Prediction:
    found = model.explain(**how).prediction
    assert isinstance(found, Prediction)
    return found


@pytest.mark.parametrize("policy", [Never(), FORA(3), TaylorSeer(4), DQAR(0.2, 1.0, None)], ids=str)
def test_flops_and_counts_of_a_run(policy: Policy) -> None:
    counting = Counting()
    model = run(policy, 12, backend=counting)
    found = predicted(model)
    assert found.flops == counting.flops
    decided = model.stats().decisions
    for kind, name in ((Kind.SELF, "attn"), (Kind.MLP, "mlp")):
        reused = sum(what in ("reuse", "forecast") for d in decided for s, what in d.strategies.items() if name in s)
        assert found.counts[kind] == (12 * LAYERS - reused, 12 * LAYERS)
    assert found.plain_flops == 12 * sum(each.at(each.total) for each in model.explain().costs)


def test_counts_of_fora() -> None:
    """FORA's table 3 counts computations per kind: 100 steps of 28 blocks are 2,800. The first step always computes, so
    that an interval of 3 computes 34 of 100 steps."""
    model = run(Never(), 3)
    for steps, interval, computed in ((100, 2, 50), (100, 3, 34), (250, 3, 84)):
        found = dit_rewrite.predict(model, FORA(interval), steps)
        assert isinstance(found, Prediction)
        assert found.counts == dict.fromkeys((Kind.SELF, Kind.MLP), (computed * LAYERS, steps * LAYERS))
        assert found.recomputed_fraction == computed / steps


def test_another_policy_than_the_compiled_one() -> None:
    """Nothing is compiled for it, and the prediction is that of a model that was compiled with it."""
    model = run(FORA(3), 6)
    variants = model.stats().variants
    other = dit_rewrite.predict(model, "taylorseer:interval=2", 6)
    assert isinstance(other, Prediction)
    assert other.steps == predicted(run(TaylorSeer(2), 6)).steps
    assert model.stats().variants == variants


def plan(*rows: Choice) -> Policy:
    model = tiny.build()
    sites, table = ("blocks.0.attn", "blocks.1.attn"), tuple((row, row) for row in rows)
    scheduler = describe_scheduler(None)
    return DiTFastAttn(Plan(fingerprint(model), len(rows), scheduler, sites, table, 0.1, (1,), "first"))


def test_attention_share_of_a_plan() -> None:
    """Reused: nothing. Shared: half. In a window of 3 tokens: its pairs alone. The step before also makes the residual,
    by another window."""
    full, window = PROJECTIONS + SCORES, 4 * (3 * TOKENS - 2) * tiny.WIDTH
    shared = predicted(run(plan(Choice.FULL, Choice.AST, Choice.ASC, Choice.AST), 4))
    assert shared.attention_share == 1.5 / 4
    windowed = predicted(run(plan(Choice.FULL, Choice.WA_RS, Choice.AST), 3))
    assert windowed.attention_share == pytest.approx((full + window + PROJECTIONS + window) / (3 * full))


class PerCall(Counting):
    """Also notes the FLOPs of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def run(self, model: Any, inputs: list[dict[str, Any]]) -> None:
        with torch.no_grad(), model.trajectory(len(inputs)):
            for arguments in inputs:
                before = self.flops
                model(**arguments)
                self.calls.append(self.flops - before)


def latent_calls(steps: int) -> list[dict[str, Any]]:
    """Images of 6 x 8 for the tiny model with patches of 2 x 2: tokens in 3 rows of 4."""
    generator, given = torch.Generator().manual_seed(0), tiny.condition()
    path = latents((3, 6, 8), steps, torch.float32, generator)
    return [{"latent": x, "timestep": t, "condition": given} for x, t in zip(path, falling(steps), strict=True)]


def test_attention_of_each_step_by_torchs_counter() -> None:
    """The policy changes attention alone. So its FLOPs at a step are those of the step, less those of all else, which
    torch counts by module in the plain model. The pairs in a window of 2-D are counted one by one."""
    model, inputs = prepare(tiny.Patched(), torch.float32), latent_calls(6)
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, torch.no_grad():
        model(**inputs[0])
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    attention = sum(by_module[f"Patched.body.blocks.{i}.attn"] for i in range(LAYERS))
    other = counter.get_total_flops() - attention
    table = ("full full", "WA-RS AST", "ASC WA-RS", "WA-RS+ASC WA-RS+ASC", "full AST", "AST AST")
    sites = ("body.blocks.0.attn", "body.blocks.1.attn")
    rows = tuple(map(parse_row, table))
    plan = Plan(fingerprint(model), 6, describe_scheduler(None), sites, rows, 0.1, (1, 1), "first", grid="latent")
    counting = PerCall()
    compiled = dit_rewrite.compile(model, DiTFastAttn(plan), backend=counting)
    counting.run(compiled, inputs)
    found = predicted(compiled)
    assert found.attention_shares == pytest.approx([(call - other) / attention for call in counting.calls], abs=1e-12)
    assert found.attention_share == pytest.approx(sum(found.attention_shares) / 6, abs=1e-12)
    places = list(itertools.product(range(3), range(4)))
    pairs = sum(abs(a - c) <= 1 and abs(b - d) <= 1 for a, b in places for c, d in places)
    window, whole = 4 * tiny.WIDTH * pairs, 8 * 12 * tiny.WIDTH**2 + 4 * tiny.WIDTH * 12**2
    one_site = (8 * 12 * tiny.WIDTH**2 + window) / whole  # of a site in a window, both halves
    assert found.attention_shares[3] == pytest.approx(one_site / 2, abs=1e-12)
    assert found.attention_shares[5] == 0
    line = next(line for line in str(compiled.explain()).splitlines() if "attention FLOPs" in line)
    shares = ", ".join(f"{100 * share:.3g}" for share in found.attention_shares)
    assert line.strip() == f"attention FLOPs: {found.attention_share:.1%} of full; by step, in %: {shares}"
    assert as_json(compiled.explain())["predicted"]["attention_shares"] == list(found.attention_shares)


def test_decisions_that_cannot_be_foreseen() -> None:
    model = run(Never(), 3)
    for policy, reason in (
        (FirstBlockCache(0.1), PredictionReason.MEASURES),
        (DQAR(snr_threshold=0.5), PredictionReason.NOISE_UNKNOWN),
        (CachedAttention(0.1), PredictionReason.BLOCKWISE),
    ):
        assert dit_rewrite.predict(model, policy, 10) is reason
    inferred = tiny.rewritten(tiny.build())
    with pytest.raises(NotCaptured):
        dit_rewrite.predict(inferred, num_steps=3)
    tiny.outputs(inferred, tiny.calls(2))
    assert inferred.explain().prediction is PredictionReason.TOTAL_UNKNOWN
    assert f"predicted nothing: {PredictionReason.TOTAL_UNKNOWN}" in str(inferred.explain())
    assert isinstance(inferred.explain(10).prediction, Prediction)


def test_noise_levels_of_a_scheduler() -> None:
    """DQAR waits for the signal-to-noise ratio; the decisions follow from the scheduler, in the run and before it."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    model = run(DQAR(0.1, 1.0, 0.5), 10, scheduler, layers=4)
    found = predicted(model, scheduler=scheduler)
    decided = [what for d in model.stats().decisions for what in d.strategies.values()]
    assert found.counts[Kind.SELF] == (40 - decided.count("reuse"), 40)
    assert decided.count("reuse") > 0
    assert predicted(model).counts == found.counts  # the levels of the run itself


def test_times() -> None:
    """The time of a step is the roofline's, and a reusing step takes less than a computing one."""
    found = predicted(run(FORA(2), 4))
    (seconds,) = found.step_seconds
    assert seconds[0] == seconds[2] > seconds[1] == seconds[3] > 0
    assert found.speedup == pytest.approx(4 * found.plain_seconds / sum(seconds))


def test_measured_times_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call waits for the device only with timing; a trajectory that compiled does not count."""
    waited: list[None] = []
    monkeypatch.setattr(module, "wait_for_device", lambda: waited.append(None))
    model = run(FORA(2), 4)
    assert (model.stats().timed, model.stats().speedup, waited) == (type(model.stats().timed)(), None, [])
    assert "compile(timing=True)" in str(model.explain())
    timed = run(FORA(2), 4, timing=True)
    assert len(waited) == 8
    assert [call.compiles for call in timed.stats().timed] == [True, False, False, False]
    assert timed.stats().speedup is None
    assert "no trajectory ran without a compilation" in str(timed.explain())
    with timed.trajectory(4):
        tiny.outputs(timed, tiny.calls(4))
    assert [call.reused for call in timed.stats().timed] == [0, tiny.SITES] * 4
    assert timed.stats().speedup is not None
    assert "measured  Recomp 50.0% of the guarded sites; speed-up" in str(timed.explain())


def test_twin_is_not_needed() -> None:
    """A twin of a rewritten model predicts as the model does."""
    model = run(FORA(3), 6)
    again = dit_rewrite.compile(twin(model), FORA(3), backend="aot_eager")
    with again.trajectory(6):
        tiny.outputs(again, tiny.calls(6))
    assert predicted(again).steps == predicted(model).steps
