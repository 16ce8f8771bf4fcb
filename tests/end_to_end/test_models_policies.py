"""DQAR, FORA and FirstBlockCache on named models: decisions and outputs equal those of the policies' sources.

Each run is also replayed with `dit_rewrite.proof.verify`, which must be exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.module import attach, twin
from dit_rewrite.policies import DQAR, FORA, FirstBlockCache
from dit_rewrite.policy.rules import Policy
from dit_rewrite.proof.compare import Check
from dit_rewrite.proof.replay import check_replay
from dit_rewrite.runtime.session import Observation
from dit_rewrite.runtime.stats import Stats
from tests.helpers.drawn import BATCH
from tests.helpers.models import MODELS, Case, output
from tests.references import policies as reference
from tests.references.fora import computes, fora_outputs, get

STEPS = 20
CASES = [MODELS[name] for name in reference.BLOCKS]
LOWERINGS = ("variants", "segments")
WARMUP, SNR_THRESHOLD = "0.1", 0.8


@dataclass(frozen=True)
class Run:
    """One explicit trajectory: the model's outputs, and at each step whether each site was reused."""

    outputs: list[Tensor]
    reused: list[dict[str, bool]]
    stats: Stats


def run(model: nn.Module, inputs: list[dict[str, Any]], policy: Policy, lowering: str, scheduler: Any = None) -> Run:
    """Compile, run one trajectory, and replay it; the replay must be bit-equal."""
    torch.compiler.reset()
    # rows of a step table are computed in a batch, which may round differently
    lowered = Lowering.of("aot_eager", partition=lowering)
    backend = Backend(model, policy, lowered, disable_passes=("step_tables",))
    compiled = attach(twin(model), backend)
    observed: list[Observation] = []
    backend.session.observer = observed.append
    with torch.no_grad(), compiled.trajectory(len(inputs), scheduler):
        outputs = [output(compiled(**arguments)).clone() for arguments in inputs]
    check = Check()
    check_replay(check, backend.rewritten, observed, ["main"] * len(inputs), exact=True)
    assert check.exact, check.first_difference
    stats = compiled.stats()
    assert (stats.recompiles, stats.graph_breaks, dict(stats.misses)) == (0, 0, {})
    reused = [{name: done == "reuse" for name, done in row.strategies.items()} for row in stats.decisions]
    return Run(outputs, reused, stats)


def differing(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[int]:
    """The steps at which two runs are not bit-equal."""
    return [step for step, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)]


# --- FORA -------------------------------------------------------------------------------------------------------------


FORA_RUNS = [  # test_models_fora tests the variants of every model; test_dqar and test_first_block_cache its segments
    pytest.param(
        case,
        lowering,
        anchor,
        id=f"{case.name}-{lowering}",
        marks=[] if case.name == "dit" or (case.name, lowering) == ("sd3", "segments") else [pytest.mark.slow],
    )
    for case in CASES
    for lowering, anchor in (("variants", "start"), ("segments", "paper"))
]


@pytest.mark.parametrize(("case", "lowering", "anchor"), FORA_RUNS)
def test_fora(case: Case, lowering: str, anchor: Literal["start", "paper"]) -> None:
    model, inputs = case.build(), case.inputs(STEPS)
    found = run(model, inputs, FORA(3, anchor=anchor), lowering)
    assert [set(row.values()) for row in found.reused] == [
        {not computes(step, STEPS, 3, anchor)} for step in range(STEPS)
    ]
    assert {len(row) for row in found.reused} == {sum(case.sites.values())}
    assert differing(found.outputs, fora_outputs(case.name, model, inputs, 3, anchor)) == []
    assert found.stats.late_variants == 0


# --- DQAR -------------------------------------------------------------------------------------------------------------


_USUAL = {  # of each model one combination, and of DiT all four
    *(("dit", lowering, order) for lowering in LOWERINGS for order in ("linear", "linear_reverse")),
    *((name, "variants", "linear") for name in ("pixart_alpha", "flux", "stdit")),
    *((name, "segments", "linear_reverse") for name in ("sd3", "wan")),
}


def scheduled(case: Case) -> tuple[Any, list[dict[str, Any]]]:
    """The kind of scheduler that the model is sampled with, and model calls at its timesteps."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flow = case.name in ("sd3", "flux", "wan")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    unit = 1000 if case.name == "flux" else 1
    times = [t.expand(BATCH) / unit if unit > 1 else t.expand(BATCH) for t in scheduler.timesteps]
    return scheduler, [{**call, "timestep": t} for call, t in zip(case.inputs(STEPS), times, strict=True)]


DQAR_RUNS = [
    pytest.param(
        case,
        lowering,
        order,
        id=f"{case.name}-{lowering}-{order}",
        marks=[] if (case.name, lowering, order) in _USUAL else [pytest.mark.slow],
    )
    for case in CASES
    for lowering in LOWERINGS
    for order in ("linear", "linear_reverse")
]


@pytest.mark.parametrize(("case", "lowering", "order"), DQAR_RUNS)
def test_dqar(case: Case, lowering: str, order: Literal["linear", "linear_reverse"]) -> None:
    model, (scheduler, inputs) = case.build(), scheduled(case)
    paths = reference.attention_paths(case.name, model)
    snrs = reference.snr_table(scheduler)
    schedule = reference.linear_schedule(STEPS, len(paths), Fraction(WARMUP), Fraction(1), order == "linear_reverse")
    rows = reference.gated(schedule, snrs, SNR_THRESHOLD)
    assert min(abs(snr / SNR_THRESHOLD - 1) for snr in snrs) > 0.01
    assert sum(a != b for a, b in zip(rows, schedule, strict=True)) >= 3, "steps at which the SNR forbids reuse"

    policy = DQAR(warmup=float(WARMUP), layer_fraction=1.0, snr_threshold=SNR_THRESHOLD, order=order)
    found = run(model, inputs, policy, lowering, scheduler)
    decisions = [{path: row[layer] for layer, here in enumerate(paths) for path in here} for row in rows]
    assert found.reused == decisions
    assert min(found.stats.reused, found.stats.computed) >= 5
    assert found.stats.late_variants == 0
    layers = [[module for path in here if (module := get(model, path)) is not None] for here in paths]
    expected = reference.layered_outputs(model, layers, inputs, lambda step, layer: rows[step][layer])
    assert differing(found.outputs, expected) == []


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_dqar_with_an_entropy_threshold(lowering: str) -> None:
    """A layer reuses while its last computed attention was narrow: 2.335 nats, of at most log 16 = 2.77."""
    case, threshold = MODELS["dit"], 2.335
    model, inputs = case.build(), case.inputs(STEPS)
    attentions = [block.attn1 for block in model.transformer_blocks]  # type: ignore[union-attr]
    schedule = reference.linear_schedule(STEPS, 3, Fraction("0.1"), Fraction(1))
    rows: list[dict[str, bool]] = [{} for _ in inputs]
    asked: list[float] = []

    with reference.Entropies(attentions) as entropies:

        def reuses(step: int, layer: int) -> bool:
            if schedule[step][layer]:
                asked.append(entropies.seen[layer][-1])
            rows[step][f"transformer_blocks.{layer}.attn1"] = schedule[step][layer] and asked[-1] < threshold
            return rows[step][f"transformer_blocks.{layer}.attn1"]

        expected = reference.layered_outputs(model, [[attention] for attention in attentions], inputs, reuses)
    assert min(abs(entropy - threshold) for entropy in asked) > 1e-3
    refused = sum(entropy > threshold for entropy in asked)
    assert min(refused, len(asked) - refused) >= 5

    policy = DQAR(warmup=0.1, layer_fraction=1.0, snr_threshold=None, entropy_threshold=threshold)
    found = run(model, inputs, policy, lowering)
    assert found.reused == rows
    assert differing(found.outputs, expected) == []


# --- First-block cache ------------------------------------------------------------------------------------------------


_LAGS = [("auto", 0), ("variants", 1), ("segments", 1)]
_LAGGING = {("sd3", "variants"), ("wan", "segments"), ("dit", "variants"), ("dit", "segments")}
FIRST_BLOCK_RUNS = [  # every model without lag
    pytest.param(
        case,
        lowering,
        lag,
        id=f"{case.name}-{lowering}-{lag}",
        marks=[] if lag == 0 or (case.name, lowering) in _LAGGING else [pytest.mark.slow],
    )
    for case in CASES
    for lowering, lag in _LAGS
]


@pytest.mark.parametrize(("case", "lowering", "lag"), FIRST_BLOCK_RUNS)
def test_first_block_cache(case: Case, lowering: str, lag: Literal[0, 1]) -> None:
    model, inputs = case.build(), case.inputs(STEPS)
    blocks = list(reference.named_blocks(case.name, model).values())
    threshold, plan = reference.balanced_threshold(reference.first_block_residuals(model, blocks, inputs), lag)
    assert 5 <= sum(plan.reuses) <= 15

    found = run(model, inputs, FirstBlockCache(threshold, lag=lag), lowering)
    assert [list(row.values()) for row in found.reused] == [[reuse] for reuse in plan.reuses]
    expected = reference.first_block_outputs(model, blocks, inputs, plan.reuses)
    assert differing(found.outputs, expected) == []


def test_first_block_cache_with_warmup_and_streak() -> None:
    """5 steps compute first, and at most 2 in a row reuse, though the change never exceeds the threshold."""
    case = MODELS["dit"]
    model, inputs = case.build(), case.inputs(STEPS)
    blocks = list(reference.named_blocks(case.name, model).values())
    residuals = reference.first_block_residuals(model, blocks, inputs)
    plan = reference.first_block_plan(residuals, 10.0, warmup=5, max_streak=2)
    assert "".join("CR"[reuse] for reuse in plan.reuses) == "CCCCC" + 5 * "RRC"
    found = run(model, inputs, FirstBlockCache(10.0, warmup=5, max_streak=2), "auto")
    assert [list(row.values()) for row in found.reused] == [[reuse] for reuse in plan.reuses]
    assert differing(found.outputs, reference.first_block_outputs(model, blocks, inputs, plan.reuses)) == []


@pytest.mark.parametrize("case", [MODELS["flux"], MODELS["wan"]], ids=lambda case: case.name)
def test_the_reference_is_the_first_block_cache_of_diffusers(case: Case) -> None:
    """diffusers' own hook makes the same decisions and returns the same outputs, where diffusers has it."""
    from diffusers import FirstBlockCacheConfig

    model, inputs = case.build(), case.inputs(STEPS)
    blocks = list(reference.named_blocks(case.name, model).values())
    threshold, plan = reference.balanced_threshold(reference.first_block_residuals(model, blocks, inputs), lag=0)
    expected = reference.first_block_outputs(model, blocks, inputs, plan.reuses)
    hooked: Any = model
    hooked.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    with torch.no_grad(), hooked.cache_context("main"):
        found = [output(hooked(**arguments)) for arguments in inputs]
    assert differing(found, expected) == []


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "lowering"),
    [
        (DQAR(0.2, 1.0), "variants"),
        (DQAR(0.2, 1.0), "segments"),
        (FirstBlockCache(0.75), "segments"),
        (FirstBlockCache(0.75, lag=1), "variants"),
    ],
    ids=["dqar-variants", "dqar-segments", "first_block_cache-segments", "first_block_cache-variants"],
)
def test_verify_is_exact(policy: Policy, lowering: str) -> None:
    """At reuse 0; a second trajectory reads no slot of the first. Steps that read a step table are within rounding."""
    case = MODELS["dit"]
    scheduler, inputs = scheduled(case)
    found = dit_rewrite.verify(
        case.build(), inputs, policy, backend="aot_eager", lowering=lowering, scheduler=scheduler
    )
    assert found.reuse0.exact, found
    assert found.passed, found
    assert found.replay.max_abs_error < 1e-5
    assert 5 <= found.reused <= found.decisions - 5
