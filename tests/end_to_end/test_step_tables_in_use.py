"""Step tables with the samplers, timesteps, weights and policies that pipelines bring: rows are read, and are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.errors import TableReason
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA, Never
from tests.end_to_end import test_guidance_delta as guidance
from tests.end_to_end.test_step_tables import close, run
from tests.helpers import tiny

diffusers = pytest.importorskip("diffusers")

Form = Callable[[Tensor], Any]
STEPS = 6


def pair(module: nn.Module, policy: Any = None, **options: Any) -> tuple[Any, Any]:
    """Return the model with step tables, and without."""
    models = [twin(module) for _ in range(2)]
    without = {"disable_passes": ("step_tables",)}
    return tuple(
        dit_rewrite.compile(each, policy or FORA(2), backend="aot_eager", **more)
        for each, more in zip(models, (options, without), strict=True)
    )


@torch.no_grad()
def sampled(model: Any, scheduler: Any, form: Form, start: int = 0, steps: int = STEPS) -> list[Tensor]:
    """Sample with a scheduler from an entry of its schedule on. `form` turns a timestep into that of the model."""
    scheduler.set_timesteps(steps)
    latent, outputs = torch.randn(2, 8, tiny.CHANNELS, generator=torch.Generator().manual_seed(0)), []
    given = tiny.condition()
    with model.trajectory(scheduler=scheduler):
        for t in scheduler.timesteps[start:]:
            outputs.append(model(hidden_states=latent, timestep=form(t), condition=given).clone())
            latent = scheduler.step(0.01 * outputs[-1], t, latent).prev_sample
    return outputs


def spread(t: Tensor) -> Tensor:
    return t.expand(2)


def test_a_second_order_solver() -> None:
    """Heun's schedule lists each timestep but the first twice: one row for both calls of a step."""
    model, plain = pair(tiny.build())
    for trajectory in (1, 2):
        ours, theirs = (sampled(m, diffusers.HeunDiscreteScheduler(), spread, steps=5) for m in (model, plain))
        assert len(ours) == 9
        close(ours, theirs)
        assert model.stats().table_rows == 5 * trajectory
    assert (model.stats().reused, model.stats().tables) == (plain.stats().reused, {})


@pytest.mark.parametrize("told", [True, False], ids=["begin_index", "found"])
def test_a_trajectory_that_begins_in_the_middle_of_a_schedule(told: bool) -> None:
    """As image-to-image does. The rows are those of the whole schedule, computed at once."""
    model, plain = pair(tiny.build())
    schedulers = [diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) for _ in range(2)]
    for each in schedulers if told else ():
        each.set_timesteps(STEPS)
        each.set_begin_index(2)
    ours, theirs = (sampled(m, s, spread, start=2) for m, s in zip((model, plain), schedulers, strict=True))
    close(ours, theirs)
    assert model.stats().table_rows == STEPS
    assert model.stats().reused == plain.stats().reused == 2 * tiny.SITES


class OneTime(nn.Module):
    """The tiny denoiser, called with one timestep for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny.build()

    def forward(self, hidden_states: Tensor, timestep: Tensor | float, condition: Tensor) -> Tensor:
        time = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep], dtype=torch.float32)
        return self.body(hidden_states, 1000 * time.float().reshape(-1).expand(2), condition)


FORMS: dict[str, Form] = {
    "divided": lambda t: t / 1000,  # 0-dimensional
    "reversed": lambda t: (1 - t / 1000).expand(2),
    "divided in bfloat16": lambda t: (t / 1000).to(torch.bfloat16)[None],
    "float": lambda t: t.item() / 1000,
    "reversed float": lambda t: 1 - t.item() / 1000,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_timestep_in_another_form(form: Form) -> None:
    """The rows of all steps are computed ahead. This schedule ends at 1, which is also where it begins if divided."""
    model, plain = pair(OneTime().eval().requires_grad_(False))
    ours = sampled(model, diffusers.FlowMatchEulerDiscreteScheduler(), form)
    torch.compiler.reset()  # Dynamo makes a constant of the first float, unless it has seen another one
    close(ours, sampled(plain, diffusers.FlowMatchEulerDiscreteScheduler(), form))
    assert model.stats().table_rows == STEPS
    assert model.stats().reused == plain.stats().reused >= 2 * tiny.SITES


def test_an_int_has_no_batch_of_rows() -> None:
    model, plain = pair(OneTime().eval().requires_grad_(False))
    ours, theirs = (sampled(m, diffusers.DDIMScheduler(), int) for m in (model, plain))
    close(ours, theirs)
    assert model.stats().table_rows == 0
    assert str(TableReason.WHOLE_NUMBER) in str(model.explain())


def schedule(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"scheduler": SimpleNamespace(timesteps=torch.stack([call["timestep"][0] for call in calls]))}


@pytest.mark.parametrize("options", [{}, {"tables": "all", "release": True}], ids=["reuse", "all"])
def test_the_scale_of_a_lora_on_a_modulation_layer(options: dict[str, Any]) -> None:
    """The scale is applied after the product that the table holds, so other scales read the same rows."""
    peft = pytest.importorskip("peft")
    module = tiny.build()
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["gates"], init_lora_weights=False), module)
    model, plain = pair(module.requires_grad_(False), **options)
    calls, before = tiny.calls(STEPS), None
    for scale in (1.0, 0.3, 0.6):
        for each in (model, plain):
            for layer in each.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    layer.set_scale("default", scale)
        ours, theirs = (run(each, calls, **schedule(calls)) for each in (model, plain))
        close(ours, theirs)
        assert before is None or not torch.equal(ours[-1], before)
        before = ours[-1]
    assert model.stats().table_rows <= 2 * STEPS  # Dynamo may capture another graph for the second scale
    assert not model.stats().tables


def test_quantised_modulation() -> None:
    """The table holds the product of the quantised weight, less its scale, and the weight is released."""
    quantization = pytest.importorskip("torchao.quantization")
    module = tiny.build()
    quantization.quantize_(
        module, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name.endswith("gates")
    )
    model, plain = pair(module, tables="all", release=True)
    calls = tiny.calls(STEPS)
    for _ in range(2):
        close(*(run(each, calls, **schedule(calls)) for each in (model, plain)))
    assert (model.stats().table_rows, model.stats().released_bytes) == (STEPS, 2 * 2 * tiny.WIDTH * tiny.WIDTH)


@torch.library.custom_op("dit_rewrite_tests::frequencies", mutates_args=())
def frequencies(time: Tensor) -> Tensor:
    return torch.sin(time) * 100


@frequencies.register_fake
def _(time: Tensor) -> Tensor:
    return torch.empty_like(time)


class Custom(nn.Module):
    """The tiny denoiser with a custom op in the embedder, which has no rule for batches: torch calls it in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny.build()

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.body(hidden_states, frequencies(timestep.float()), condition)


def test_a_custom_op_in_the_embedder() -> None:
    model, plain = pair(Custom().eval().requires_grad_(False))
    calls = tiny.calls(STEPS)
    close(*(run(each, calls, **schedule(calls)) for each in (model, plain)))
    assert model.stats().table_rows == STEPS


@pytest.mark.parametrize("conditional", ["first", "second"])
def test_half_of_a_guided_batch_reads_half_of_a_row(conditional: str) -> None:
    """A step that computes one half and adds the stored difference reads the rows of the whole batch."""
    model, plain = pair(guidance.build(), guidance.policy(conditional))
    times = SimpleNamespace(timesteps=torch.stack([guidance.time(i, 1)[0] for i in range(guidance.STEPS)]))
    outputs = []
    for each in (model, plain):
        with each.trajectory(scheduler=times):
            outputs.append(guidance.one_call(each, 0))
    close(*outputs)
    assert model.stats().table_rows == guidance.STEPS
    assert model.stats().reused == plain.stats().reused > 0


def test_weights_in_bfloat16() -> None:
    model, plain = pair(tiny.build().to(torch.bfloat16), tables="all", release=True)
    calls = tiny.calls(STEPS, given=tiny.condition().to(torch.bfloat16))
    calls = [{**call, "hidden_states": call["hidden_states"].to(torch.bfloat16)} for call in calls]
    close(*(run(each, calls, **schedule(calls)) for each in (model, plain)))
    assert (model.stats().table_rows, model.stats().tables) == (STEPS, {})


def test_inference_tensors() -> None:
    """Weights without a version keep their rows from one trajectory to the next."""
    with torch.inference_mode():
        module = tiny.build()
    model, plain = pair(module)
    calls = tiny.calls(STEPS)
    for _ in range(2):
        close(*(run(each, calls, **schedule(calls)) for each in (model, plain)))
    assert (model.stats().table_rows, model.stats().tables) == (STEPS, {})


def test_released_weights_are_saved_and_copied(tmp_path: Path) -> None:
    """By every way that reads them: state_dict, pickle, safetensors, and a copy, which has memory of its own."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, _ = pair(tiny.build(), tables="all", release=True)
    before, calls = {name: value.clone() for name, value in model.state_dict().items()}, tiny.calls(STEPS)
    run(model, calls, **schedule(calls))
    released = model.stats().released_bytes
    assert released == sum(before[f"blocks.{i}.gates.{part}"].nbytes for i in range(2) for part in ("weight", "bias"))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    copied, loaded = copy.deepcopy(model), tiny.build()
    safetensors.load_model(loaded, str(tmp_path / "model.safetensors"))
    states = [
        torch.load(tmp_path / "model.pt"), safetensors.load_file(tmp_path / "state.safetensors"), copied.state_dict(),
        loaded.state_dict(),
    ]  # fmt: skip
    assert all(torch.equal(state[name], value) for state in states for name, value in before.items())
    assert all(weight.untyped_storage().resizable() for weight in copied.parameters())
    assert model.stats().released_bytes == released


def test_through_inductor() -> None:
    """The rows are computed by eager ops, and enter compiled code as inputs."""
    model = dit_rewrite.compile(tiny.build(1), Never(), backend="inductor", tables="all", release=True)
    plain = dit_rewrite.compile(twin(model), Never(), backend="aot_eager", disable_passes=("step_tables",))
    calls = tiny.calls(4)
    for _ in range(2):
        close(*(run(each, calls, **schedule(calls)) for each in (model, plain)))
    stats = model.stats()
    assert (stats.table_rows, stats.variants, stats.recompiles, stats.tables) == (4, 1, 0, {})
    assert stats.released_bytes == sum(parameter.nbytes for parameter in model.blocks[0].gates.parameters())
