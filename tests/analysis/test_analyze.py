"""`analyze`: known rates of change, streams, heads, and pipelines."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.analysis.reuse_errors import reuse_errors
from dit_rewrite.analysis.statistics import Row
from dit_rewrite.errors import (
    FunctionFailed,
    RefusalReason,
)
from tests.helpers import tiny
from tests.helpers.analyses import analyze, two_streams
from tests.helpers.broken import broken_blocks
from tests.helpers.drawn import falling, latents, prepare
from tests.helpers.planted import CHANNELS, KEY_RATE, RATES, VALUE_RATE, Planted, numbers, planted_calls

STEPS = 5


def row(found: Analysis, **conditions: Any) -> Row:
    (only,) = found.rows(**conditions)
    return only


@pytest.fixture(scope="module")
def planted() -> Analysis:
    """Two prompts of the planted model, at distances 1 and 3, with heads."""
    torch.compiler.reset()
    sample = [planted_calls(STEPS), planted_calls(STEPS, seed=1)]
    return analyze(Planted(), sample, distances=(1, 3), heads=True)


# --- planted rates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1, 3])
def test_mlps_change_at_their_rates(planted: Analysis, distance: int) -> None:
    """An MLP changes in one channel of its own, by its rate times the fall of the number."""
    one, two = numbers(STEPS), numbers(STEPS, seed=1)
    for i, rate in enumerate(RATES):
        found = row(planted, site=f"blocks.{i}.mlp", quantity="mlp", distance=distance)
        for step in range(STEPS):
            if step < distance:
                assert planted.mean(found)[step].isnan()
                continue
            falls = [values[step - distance] - values[step] for values in (one, two)]
            share = [fall / values[step - distance] for fall, values in zip(falls, (one, two), strict=True)]
            each = torch.tensor([fall * rate / CHANNELS for fall in falls], dtype=torch.float64)
            assert planted.mean(found)[step] == pytest.approx(float(each.mean()))
            assert planted.deviation(found)[step] == pytest.approx(float(each.std()))
            assert planted.mean(found, "relative_l1")[step] == pytest.approx(sum(share) / 2)
            assert planted.mean(found, "cosine")[step] == pytest.approx(1.0)
            spread = each.square() * (CHANNELS - 1)  # one channel of 8 changes
            assert planted.mean(found, "variance")[step] == pytest.approx(float(spread.mean()))
            assert planted.mean(found, "mse")[step] == pytest.approx(float((each.square() * CHANNELS).mean()))


def test_keys_values_and_the_attention_change_at_theirs(planted: Analysis) -> None:
    """All their channels have the number times a rate, in both heads alike."""
    falls = torch.tensor([numbers(STEPS)[0] - numbers(STEPS)[1], numbers(STEPS, 1)[0] - numbers(STEPS, 1)[1]])
    for quantity, rate in (("keys", KEY_RATE), ("values", VALUE_RATE), ("attention", VALUE_RATE)):
        for head in (None, 0, 1):
            found = row(planted, quantity=quantity, head=head)
            assert planted.mean(found)[1] == pytest.approx(float(falls.mean()) * rate)
            assert planted.mean(found, "variance")[1] == pytest.approx(0, abs=1e-6)
            assert planted.profile(1, found)[1] == pytest.approx(float(falls[1]) * rate)


def test_the_residuals_sum_up_what_is_inside(planted: Analysis) -> None:
    """A block with one branch changes as that branch; the stack as all its branches, in other channels."""
    blocks = planted.rows(quantity="block")
    assert [r.site for r in blocks] == ["block 0", "blocks.0", "blocks.1", "blocks.2"]
    for found, rate in zip(blocks, (VALUE_RATE, *RATES), strict=True):
        assert planted.mean(found)[1] == pytest.approx(1.5 * rate / CHANNELS)
    stack = row(planted, quantity="stack")
    assert planted.mean(stack)[1] == pytest.approx(1.5 * (VALUE_RATE + sum(RATES)) / CHANNELS)
    output = row(planted, quantity="output")
    assert planted.mean(output)[1] == pytest.approx(1.5 * (1 + VALUE_RATE + sum(RATES)) / CHANNELS)


def test_the_model_is_left_alone() -> None:
    model = Planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyze(model, [planted_calls(2)])
    assert not isinstance(model, dit_rewrite.RewrittenModule)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- streams ----------------------------------------------------------------------------------------------------------


def test_streams_are_measured_apart_and_against_each_other() -> None:
    found = analyze(Planted(), two_streams, [STEPS], conditional="cond")
    for stream in ("cond", "uncond"):
        mlp = row(found, site="blocks.2.mlp", quantity="mlp", stream=stream)
        falls = [a - b for a, b in zip(numbers(STEPS), numbers(STEPS)[1:], strict=False)]
        assert found.mean(mlp)[1:].tolist() == pytest.approx([RATES[2] * fall / CHANNELS for fall in falls])
    apart = row(found, site="blocks.2.mlp", quantity="mlp", distance=0)
    assert apart.stream == "uncond"
    assert found.mean(apart).tolist() == pytest.approx([RATES[2] / CHANNELS] * STEPS)
    shares = [1 / number for number in numbers(STEPS)]
    assert found.mean(apart, "relative_l1").tolist() == pytest.approx(shares)


@pytest.mark.parametrize("conditional", ["first", "second"])
def test_halves_of_a_batch(conditional: str) -> None:
    """The second sample's number is twice that of the first."""
    calls = planted_calls(STEPS)
    for call in calls:
        call["latent"][1] *= 2
    found = analyze(Planted(), [calls], conditional=conditional)
    falls = [a - b for a, b in zip(numbers(STEPS), numbers(STEPS)[1:], strict=False)]
    for stream, factor in (("cond", 1), ("uncond", 2)) if conditional == "first" else (("cond", 2), ("uncond", 1)):
        mlp = row(found, site="blocks.0.mlp", quantity="mlp", stream=stream)
        assert found.mean(mlp)[1:].tolist() == pytest.approx([factor * fall / CHANNELS for fall in falls])
    apart = row(found, site="blocks.0.mlp", quantity="mlp", distance=0)
    assert found.mean(apart, "relative_l1").tolist() == pytest.approx([1.0 if conditional == "first" else 0.5] * STEPS)


def test_two_trajectories_of_a_prompt_count_twice_and_do_not_mix() -> None:
    def sample(model: Any, seed: int) -> None:
        for each in (seed, seed + 1):
            with model.trajectory(STEPS):
                for call in planted_calls(STEPS, each):
                    model(**call)

    found = analyze(Planted(), sample, [0])
    mlp = row(found, site="blocks.0.mlp", quantity="mlp")
    assert found.table.count[found.table.index(mlp), :, 0].tolist() == [0, 2, 2, 2, 2]
    assert found.mean(mlp)[1] == pytest.approx(1.5 / CHANNELS)


def test_outputs_that_the_sampler_changes_in_place() -> None:
    """The output is a tapped tensor; what the sampler does to it must not reach the statistics."""

    def sample(model: Any, steps: int) -> None:
        with model.trajectory(steps):
            for call in planted_calls(steps):
                model(**call).mul_(1000)

    found = analyze(Planted(), sample, [STEPS])
    output = row(found, quantity="output")
    assert found.mean(output)[1] == pytest.approx((1 + VALUE_RATE + sum(RATES)) / CHANNELS)


def test_blocks_that_share_a_graph_are_measured_one_by_one() -> None:
    """Each block has a graph break, so that one graph runs for several blocks: occurrences have rows of their own."""
    case = broken_blocks(4)
    found = analyze(case.build(), [case.inputs(3)])
    mlps = found.rows(quantity="mlp")
    assert len({row.site for row in mlps}) == len(mlps) == 4
    assert any("@1" in row.site for row in mlps)
    means = [round(float(found.mean(row)[1]), 6) for row in mlps]
    assert len(set(means)) == 4, "no block is compared with another one's tensor"
    model, outputs = case.build(), list[list[Tensor]]([[] for _ in range(4)])
    for block, kept in zip(model.blocks, outputs, strict=True):  # type: ignore[arg-type]
        block.mlp.register_forward_hook(lambda _, __, result, kept=kept: kept.append(result))
    with torch.no_grad():
        for call in case.inputs(3):
            model(**call)
    expected = [round(float((kept[1] - kept[0]).abs().mean()), 6) for kept in outputs]
    assert sorted(means) == pytest.approx(sorted(expected), rel=1e-3)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_window_attention_and_its_residual() -> None:
    """They sum up to the attention, so that with a window over all tokens the residual is zero."""
    sample = [tiny.calls(3)]
    found = analyze(tiny.build(), sample, window=0.99)
    inside, residual = found.rows(quantity="window"), found.rows(quantity="window residual")
    whole = found.rows(quantity="attention")
    assert len(inside) == len(residual) == len(whole) == 2
    for a, b, c in zip(inside, residual, whole, strict=True):
        assert found.mean(a)[1:].tolist() == pytest.approx(found.mean(c)[1:].tolist(), rel=1e-4)
        assert found.mean(b)[1:].tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.slow
def test_inductor_measures_the_same() -> None:
    """Inductor chooses other strides and fuses the reductions with the producers."""
    options: dict[str, Any] = {"distances": (1, 2), "heads": True, "window": 0.5, "conditional": "first"}
    eager = analyze(tiny.build(), [tiny.calls(4)], **options)
    torch.compiler.reset()
    compiled = dit_rewrite.analyze(tiny.build(), [tiny.calls(4)], backend="inductor", **options)
    assert compiled.table.rows == eager.table.rows
    assert torch.equal(compiled.table.count, eager.table.count)
    assert torch.allclose(compiled.table.mean, eager.table.mean, rtol=1e-3, atol=1e-5)


class Experts:
    """A pipeline of two denoisers, each of which runs two steps with one sample."""

    def __init__(self) -> None:
        self.components = {"transformer": Planted(), "transformer_2": Planted()}
        self.__dict__.update(self.components)

    def __call__(self, prompt: Any, generator: torch.Generator) -> None:
        for name in self.components:
            for call in planted_calls(2):
                getattr(self, name)(call["latent"][:1], call["timestep"])


def test_refusals_name_the_denoiser() -> None:
    """A batch of one sample has no halves."""
    found = analyze(Experts(), [0], conditional="first")
    assert {row.site.partition(".")[0] for row in found.rows()} == {"transformer", "transformer_2"}
    assert {text.partition(".")[0] for text in found.refused} == {"transformer", "transformer_2"}


def test_a_pipeline(tmp_path: Path) -> None:
    """Each call is a trajectory of the pipeline's own scheduler, and its denoiser is put back."""
    from tests.cli.test_generate import build_dit_pipeline

    pipeline = build_dit_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    denoiser = pipeline.transformer
    found = analyze(pipeline, [1, {"class_labels": [2], "guidance_scale": 1.0}], steps=3)
    assert pipeline.transformer is denoiser
    assert not isinstance(denoiser, dit_rewrite.RewrittenModule)
    assert found.steps == 3
    assert found.prompts == [0, 1]
    finite: list[Tensor] = [found.mean(row)[1:] for row in found.rows(quantity="keys")]
    assert finite
    assert all(bool((values > 0).all()) for values in finite)


def test_a_failing_sampler_is_named() -> None:
    """With its prompt; without one the pipeline is named."""

    def sample(model: Any, prompt: str) -> None:
        raise ZeroDivisionError("no guidance")

    says = r"test_analyze\.test_a_failing_sampler_is_named\.<locals>\.sample failed for "
    with pytest.raises(FunctionFailed, match=says + r"prompt 0 \(ZeroDivisionError: no guidance\)") as caught:
        analyze(Planted(), sample, ["a"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(FunctionFailed, match=says + "the prompt 'a', reusing nothing"):
        reuse_errors(Planted(), sample, ["a"], backend="aot_eager")
    with pytest.raises(FunctionFailed, match=r"test_analyze\.Experts failed for prompt 0 \(TypeError: .*seed"):
        analyze(Experts(), [{"seed": 0}])


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(tiny.WIDTH, tiny.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.linear(x))


class Routed(nn.Module):
    """Two blocks, and between them an expert, whose graphs and calls are others at each step: they depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(tiny.TinyBlock() for _ in range(2))
        self.expert = Expert()

    def begin(self, x: Tensor) -> Tensor:
        """A graph of its own, without weights and with the shape of the output: the forward breaks off before it."""
        torch._dynamo.graph_break()
        return torch.sin(x)

    def route(self, x: Tensor, timestep: Tensor) -> Tensor:
        done = []
        for tokens in x.split(int(timestep[0] % 7) + 1, dim=1):
            torch._dynamo.graph_break()
            done.append(self.expert(tokens))
        return torch.cat(done, dim=1)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        x = self.blocks[0](self.begin(hidden_states), condition)
        torch._dynamo.graph_break()
        x = self.route(x, timestep)
        torch._dynamo.graph_break()
        return self.blocks[1](x, condition)


def test_blocks_behind_graphs_that_change_are_measured() -> None:
    """A block is told by its weights, whatever graphs run before it. What graph breaks divide is named."""
    model, given = prepare(Routed(), torch.float32), tiny.condition()
    path = latents((8, tiny.WIDTH), 4, torch.float32, torch.Generator().manual_seed(0))
    calls = [
        {"hidden_states": latent, "timestep": timestep, "condition": given}
        for latent, timestep in zip(path, falling(4), strict=True)
    ]
    kept: list[list[Tensor]] = [[], []]
    hooks = [
        block.mlp.register_forward_hook(lambda _, __, result, own=own: own.append(result))  # type: ignore[union-attr]
        for block, own in zip(model.blocks, kept, strict=True)  # type: ignore[arg-type]
    ]
    sizes: list[int] = []
    hooks.append(model.expert.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[1])))
    with torch.no_grad():
        for call in calls:
            model(**call)
    for hook in hooks:
        hook.remove()
    assert sizes == [6, 2, *[1] * 8, 3, 3, 2, 5, 3]
    found = analyze(model, [calls])
    rows = sorted(found.rows(quantity="mlp"), key=lambda each: each.layer)
    assert [each.layer for each in rows] == [0, 1]
    for own, each in zip(kept, rows, strict=True):
        expected = [float((after - before).abs().mean()) for before, after in itertools.pairwise(own)]
        assert found.mean(each)[1:].tolist() == pytest.approx(expected, rel=1e-3)
    assert not found.rows(quantity="output")
    assert f"output: {RefusalReason.OUTPUT_IN_PART}" in found.refused
    assert f"stack: {RefusalReason.SPAN_PER_GRAPH}" in found.refused
    breaks = [text for text in found.refused if text.endswith(str(RefusalReason.GRAPH_BREAK))]
    assert breaks and all("test_analyze.py:" in text for text in breaks)
