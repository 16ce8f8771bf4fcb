"""Step tables in models: reuse 0 is exact, reusing steps read what they would compute, and never a stale row."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from sympy import Ne
from torch import Tensor, nn

import dit_rewrite
from benchmarks.step_tables.models import text_to_video
from dit_rewrite import Forecast, GuidanceDelta, Policy, Rule, Where
from dit_rewrite.compiler.step_tables import TableProgram
from dit_rewrite.errors import BadArgument, TableReason
from dit_rewrite.guards import step
from dit_rewrite.module import twin
from dit_rewrite.passes.rewrite.printing import op_counts
from dit_rewrite.policies import FORA, FirstBlockCache, Never
from dit_rewrite.runtime.step_tables import MOST, SHARE
from tests.helpers.models import MODELS, output

STEPS = 6
CONDITIONED = "dit"  # the class enters the modulation
UNCONDITIONED = "pixart_sigma"


def scheduler(calls: list[dict[str, Any]]) -> SimpleNamespace:
    """A scheduler with the timesteps of the calls."""
    return SimpleNamespace(timesteps=torch.stack([call["timestep"].flatten()[0] for call in calls]))


def compiled(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options.setdefault("policy", FORA(3))
    return dit_rewrite.compile(MODELS[name].build(dtype), backend="aot_eager", **options)


def run(model: Any, calls: list[dict[str, Any]], **told: Any) -> list[Tensor]:
    with torch.no_grad(), model.trajectory(**(told or {"scheduler": scheduler(calls)})):
        return [output(model(**call)).clone() for call in calls]


def without_tables(model: Any, policy: Any = None) -> Any:
    return dit_rewrite.compile(twin(model), policy or FORA(3), backend="aot_eager", disable_passes=("step_tables",))


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """A batched product may round otherwise than one of a single step."""
    for a, b in zip(ours, theirs, strict=True):
        bound = 32 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def changed(calls: list[dict[str, Any]], argument: str, change: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """The calls with other values of an argument. What they share stays shared."""
    values = {id(call[argument]): change(call[argument]) for call in calls}
    return [{**call, argument: values[id(call[argument])]} for call in calls]


def change_in_place(calls: list[dict[str, Any]], argument: str, change: Callable[[Tensor], Tensor]) -> None:
    for value in {id(call[argument]): call[argument] for call in calls}.values():
        value.copy_(change(value))


@pytest.mark.parametrize(
    ("name", "dtype", "argument", "change"),
    [
        (CONDITIONED, torch.float32, "class_labels", lambda labels: labels.flip(0)),
        (CONDITIONED, torch.bfloat16, "class_labels", lambda labels: labels.flip(0)),
        (UNCONDITIONED, torch.float32, "timestep", lambda time: time - 7),
        ("sd3", torch.float32, "pooled_projections", lambda pooled: pooled + 1),
        ("flux", torch.float32, "guidance", lambda guidance: guidance + 1),
        ("wan", torch.float32, "encoder_hidden_states", lambda text: text + 1),
    ],
    ids=[CONDITIONED, f"{CONDITIONED}-bfloat16", UNCONDITIONED, "sd3", "flux", "wan"],
)
def test_reusing_steps_read_what_they_would_compute(
    name: str, dtype: torch.dtype, argument: str, change: Callable[[Tensor], Tensor]
) -> None:
    """The rows of the schedule are computed in one batch, a second trajectory computes none, and computing steps are
    bit-equal. Another value of what enters the modulation, or a value that changes in place, gives new rows.

    Without tables a reusing step runs the embedder's linear layers and the modulation of each block.
    """
    model, calls = compiled(name, dtype), MODELS[name].inputs(STEPS, dtype)
    reference = without_tables(model)
    (first, second), plain = [run(model, calls) for _ in range(2)], run(reference, calls)
    close(first, plain)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[::3], plain[::3], strict=True))
    assert model.stats().table_rows == STEPS
    assert model.explain().rewritten[0].has_table
    assert "reusing steps read" in str(model.explain())
    variants = [each.explain().rewritten[0].variants.values() for each in (model, reference)]
    ours, theirs = ({any(v.row): op_counts(v.gm) for v in each} for each in variants)
    assert ours[False] == theirs[False]
    left = 2 if name == "flux" else 1  # the projection to the output, and of FLUX also that of the latent
    assert ours[True]["aten.addmm"] == left < theirs[True]["aten.addmm"]

    calls = changed(calls, argument, change)
    close(run(model, calls), run(reference, calls))
    change_in_place(calls, argument, change)
    close(run(model, calls), run(reference, calls))
    assert model.stats().table_rows == (STEPS if name == "wan" else 3 * STEPS), "Wan's text is not in its modulation"


def test_reuse_0_is_exact() -> None:
    """A policy that never reuses reads no table."""
    model, calls = compiled(CONDITIONED, policy=Never()), MODELS[CONDITIONED].inputs(3)
    found = run(model, calls)
    dit_rewrite.restore(model)
    with torch.no_grad():
        assert all(torch.equal(a, output(model(**call))) for a, call in zip(found, calls, strict=True))


def test_changed_modulation_weights() -> None:
    """As a fused LoRA does, or another checkpoint: a row is never older than the weights that it depends on."""
    model, calls = compiled(UNCONDITIONED), MODELS[UNCONDITIONED].inputs(STEPS)
    linear = model.adaln_single.linear
    plain = without_tables(model)
    run(model, calls)
    with torch.no_grad():
        linear.weight.mul_(1.5)
    close(run(model, calls), run(plain, calls))
    assert model.stats().tables[TableReason.NEW_WEIGHTS] == 1
    linear.weight.data += linear.weight.data * 0.5  # as peft merges an adapter
    close(run(model, calls), run(plain, calls))
    assert model.stats().tables[TableReason.NEW_WEIGHTS] == 2
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5, requires_grad=False)
    close(run(model, calls), run(without_tables(model), calls))
    assert model.stats().tables[TableReason.NEW_WEIGHTS] == 3 or model.stats().recompiles


def test_lora_on_a_modulation_layer() -> None:
    peft = pytest.importorskip("peft")
    model, calls = compiled(UNCONDITIONED), MODELS[UNCONDITIONED].inputs(STEPS)
    run(model, calls)
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["adaln_single.linear"], init_lora_weights=False), model
    )
    model.requires_grad_(False)
    close(run(model, calls), run(without_tables(model), calls))


def test_without_a_schedule_only_rows_that_outlive_the_trajectory_are_kept() -> None:
    """With the conditioning in the modulation each row would be read once: there is no table, and explain() says so."""
    calls = {name: MODELS[name].inputs(STEPS) for name in (CONDITIONED, UNCONDITIONED)}
    models = {name: compiled(name) for name in calls}
    for name, model in models.items():
        for _ in range(2):
            run(model, calls[name], num_steps=STEPS)
    assert models[UNCONDITIONED].stats().table_rows == 4  # the reusing steps, each once
    assert models[CONDITIONED].stats().table_rows == 0
    assert str(TableReason.NOT_TOLD) in str(models[CONDITIONED].explain())


def test_segments_read_tables_too() -> None:
    model, calls = compiled(CONDITIONED, lowering="segments"), MODELS[CONDITIONED].inputs(STEPS)
    found, plain = run(model, calls), run(without_tables(model), calls)
    close(found, plain)
    assert model.stats().table_rows == STEPS


@pytest.mark.parametrize("lag", [0, 1])
def test_segments_that_run_before_the_decision_read_no_table(lag: Literal[0, 1]) -> None:
    """The first block is computed before it is compared, and the final modulation is in a segment of its own. explain()
    says so. Decided by the step before, the whole graph has a variant that reads the table."""
    policy = FirstBlockCache(threshold=9.0, warmup=1, lag=lag)
    model, calls = compiled(CONDITIONED, policy=policy), MODELS[CONDITIONED].inputs(STEPS)
    run(model, calls)
    reused = model.explain().rewritten[0].partition.segments.count == 1
    assert (reused, model.stats().table_rows) == ((False, 0), (True, STEPS))[lag]
    told = f"no step reads the 20 values: {TableReason.NOT_READ}"
    assert (told in str(model.explain())) is (lag == 0)
    assert model.stats().reused == STEPS - 1 - lag


@pytest.mark.parametrize("do", [GuidanceDelta("first"), Forecast(1)], ids=["half of the batch", "nothing"])
def test_explain_says_how_much_a_reusing_step_reads(do: GuidanceDelta | Forecast) -> None:
    """The step of a difference computes half of the batch, and reads what this half needs; a forecast of the output
    computes nothing and reads nothing."""
    policy = Policy((Rule(Ne(step % 2, 0), do, Where(span="output")),))
    model, calls = compiled(UNCONDITIONED, policy=policy), MODELS[UNCONDITIONED].inputs(STEPS)
    run(model, calls)
    said, rewritten = str(model.explain()), model.explain().rewritten[0]
    assert (model.stats().table_rows > 0) is isinstance(do, GuidanceDelta)
    assert (f"no step reads the 2 values: {TableReason.NOT_NEEDED}" in said) is isinstance(do, Forecast)
    if isinstance(do, GuidanceDelta):
        read = {column for variant in rewritten.variants.values() for column in variant.columns}
        assert len(read) == 2 and rewritten.table_bytes == rewritten.step_table.row_bytes > 0


def test_disabled() -> None:
    model, calls = compiled(UNCONDITIONED, disable_passes=("step_tables",)), MODELS[UNCONDITIONED].inputs(STEPS)
    run(model, calls)
    assert model.stats().table_rows == 0
    assert not model.explain().rewritten[0].has_table


def test_computing_steps_read_tables_on_request() -> None:
    """With tables="all" no variant runs the embedders, results are within rounding, and explain() names the weights."""
    model, calls = compiled(CONDITIONED, tables="all"), MODELS[CONDITIONED].inputs(STEPS)
    plain = without_tables(model)
    close(run(model, calls), run(plain, calls))
    computing = next(v for v in model.explain().rewritten[0].variants.values() if not any(v.row))
    ours, theirs = (op_counts(gm)["aten.addmm"] for gm in (computing.gm, plain.explain().rewritten[0].captured.gm))
    assert ours == theirs - 12  # of 3 blocks, and of the embedder that the final modulation runs again
    assert "all steps read" in str(model.explain())
    assert model.stats().table_rows == STEPS


def test_an_inferred_trajectory_reads_tables_too() -> None:
    """Rows do not need a schedule."""
    model, calls = compiled(UNCONDITIONED, tables="all"), MODELS[UNCONDITIONED].inputs(2)
    with torch.no_grad():
        found = [output(model(**call)) for call in calls]
        model.reset()
        close(found, [output(model(**call)) for call in calls])


def test_an_unknown_choice_of_steps() -> None:
    with pytest.raises(BadArgument, match="tables='some' is out of range"):
        compiled(UNCONDITIONED, tables="some")


class ReturnsModulation(nn.Module):
    """A residual branch modulated by the time, which also returns a part of the modulation as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.branch = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        modulation = self.modulation(timestep[:, None].expand(-1, 8) / 1000)
        scale, gate = modulation.chunk(2, dim=1)
        return hidden_states + gate * self.branch(hidden_states * scale), scale[:, :4]


@pytest.mark.parametrize(
    "how", [{"scheduler": SimpleNamespace(timesteps=torch.tensor([900.0, 600.0]))}, {"num_steps": 2}]
)
def test_a_caller_may_modify_what_a_step_returns(how: dict[str, Any]) -> None:
    """No output is a view of a row, so that the next trajectory reads what it would compute."""
    torch.manual_seed(0)
    model = dit_rewrite.compile(ReturnsModulation().eval(), FORA(2, kinds=("mlp",)), backend="aot_eager", tables="all")
    sample = torch.randn(2, 8)
    runs = []
    for _ in range(2):
        with torch.no_grad(), model.trajectory(**how):
            results = [model(hidden_states=sample, timestep=torch.full((2,), t)) for t in (900.0, 600.0)]
        runs.append([output.clone() for result in results for output in result])
        for result in results:
            result[1].zero_()
    assert model.stats().table_rows > 0
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_keeps_no_more_memory_than_its_own() -> None:
    """For one sample, a part of a product is contiguous, and a view of the product with all other parts."""
    model = dit_rewrite.compile(ReturnsModulation().eval(), FORA(2, kinds=("mlp",)), backend="aot_eager")
    with torch.no_grad(), model.trajectory(num_steps=2):
        for time in (900.0, 600.0):
            model(hidden_states=torch.ones(1, 8), timestep=torch.full((1,), time))
    graph = model.explain().rewritten[0].graph
    values = [
        v for t in graph.session.tables_of(0, graph.program)._tables for r in t.rows.values() for v in r.values.values()
    ]
    assert [(value.nbytes, value.untyped_storage().nbytes()) for value in values] == [(32, 32)]


def test_intermediate_values_bound_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding of two samples (64 bytes) and their modulation (128) are alive at once; a row keeps the gate.

    The memory holds two rows, and the values of five while they are computed.
    """
    model = dit_rewrite.compile(
        ReturnsModulation().eval(),
        FORA(2, kinds=("mlp",)),
        backend="aot_eager",
        tables="all",
        memory_budget=SHARE * MOST * 2 * 64,
    )
    rows, batches = TableProgram.rows, []
    monkeypatch.setattr(TableProgram, "rows", lambda *args: batches.append(len(args[-1])) or rows(*args))
    times = torch.arange(1000.0, 0.0, -200.0)
    with torch.no_grad(), model.trajectory(scheduler=SimpleNamespace(timesteps=times)):
        for time in times.tolist():
            model(hidden_states=torch.ones(2, 8), timestep=torch.full((2,), time))
    program = model.explain().rewritten[0].graph.program
    assert (program.bytes_of(program.columns), program.peak_of(program.columns)) == (64, 64 + 128)
    assert batches == [2, 2]  # the last step is left, alone


def test_a_weight_that_is_changed_in_place_in_a_trajectory() -> None:
    """Each step computes or reads values of the weights that it is called with."""
    model, calls = compiled(UNCONDITIONED, tables="all", policy=Never()), MODELS[UNCONDITIONED].inputs(2)
    plain = without_tables(model, Never())
    with torch.no_grad(), model.trajectory(scheduler=scheduler(calls)), plain.trajectory(scheduler=scheduler(calls)):
        for call in calls:
            close([output(model(**call))], [output(plain(**call))])
            model.adaln_single.linear.weight.mul_(1.5)
    assert model.stats().tables == {TableReason.NEW_WEIGHTS: 1}


@pytest.mark.filterwarnings("ignore:.*reuses nothing")
def test_a_trajectory_of_one_step_comes_first() -> None:
    """As in a warm-up: the graph that is captured then has a table for longer trajectories."""
    model, calls = compiled(CONDITIONED), MODELS[CONDITIONED].inputs(3)
    run(model, calls[:1])
    run(model, calls)
    assert model.stats().table_rows == 3


def test_a_reusing_step_of_hunyuan_video_computes_no_attention() -> None:
    """Masks of the text select tokens. Neither their number nor assertions about it keep the joint attention alive."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    text = {"num_refiner_layers": 1, "text_embed_dim": 24, "text_embed_2_dim": 20, "image_embed_dim": 12}
    torch.manual_seed(0)
    module = diffusers.HunyuanVideo15Transformer3DModel(**sizes, **text, rope_axes_dim=(4, 6, 6))
    given = {
        "encoder_hidden_states": torch.randn(1, 10, 24),
        "encoder_attention_mask": (torch.arange(10) < 7)[None],
        "encoder_hidden_states_2": torch.randn(1, 6, 20),
        "encoder_attention_mask_2": (torch.arange(6) < 4)[None],
        "image_embeds": torch.zeros(1, 5, 12),
        "return_dict": False,
    }
    times = [torch.tensor([900.0 - 100 * i]) for i in range(3)]
    start, move = torch.randn(2, 1, 9, 2, 4, 4)
    calls = [{"hidden_states": start + 0.1 * i * move, "timestep": time, **given} for i, time in enumerate(times)]
    model = dit_rewrite.compile(module.eval().requires_grad_(False), FORA(3), backend="aot_eager")
    plain = without_tables(model)
    with text_to_video():
        close(run(model, calls), run(plain, calls))
    reusing = next(v for v in model.explain().rewritten[0].variants.values() if all(v.row))
    counts = op_counts(reusing.gm)
    assert (counts["dit_rewrite.attention"], counts["aten.addmm"]) == (0, 1)
    rewritten = model.explain().rewritten[0]
    attentions = {n.name for n in rewritten.gm.graph.nodes if "attention" in str(n.target)}
    joint = [site for site in rewritten.found.sites if site.kind == "joint"]
    assert [len(site.skipped & attentions) for site in joint] == [1, 1]  # so that its FLOPs count
