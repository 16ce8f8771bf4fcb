"""The toy models and the FORA reference, checked without the compiler."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.broken import broken_blocks
from tests.helpers.models import MODELS, Case, output
from tests.references.fora import MODULES, computes, fora_outputs

CASES = [*MODELS.values(), broken_blocks()]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}
RUNS = [
    pytest.param(case, precision, id=f"{case.name}-{precision}")
    for case in CASES
    for precision in PRECISIONS
    if precision != "autocast" or case.autocast
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_run = pytest.mark.parametrize(("case", "precision"), RUNS)


def ambient(precision: str) -> AbstractContextManager[Any]:
    """The autocast region for this precision, if any."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()


@torch.no_grad()
def plain_outputs(model: nn.Module, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """The outputs of the untouched model at each step."""
    return [output(model(**arguments)) for arguments in inputs]


def change(new: Tensor, old: Tensor) -> float:
    """Relative L2 distance."""
    return float((new.double() - old.double()).norm() / old.double().norm())


def same(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    """Bit equality, step by step."""
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


@every_case
def test_build_and_inputs_repeat(case: Case) -> None:
    first = plain_outputs(case.build(), case.inputs(2))
    assert all(same(first, plain_outputs(case.build(), case.inputs(2))))
    assert not any(same(first, plain_outputs(case.build(), case.inputs(2, seed=1))))


@every_case
def test_inputs_are_a_trajectory(case: Case) -> None:
    inputs = case.inputs(12)
    latent = "latent" if "latent" in inputs[0] else "hidden_states"
    changing = {latent, "timestep"}
    times = [float(arguments["timestep"][0]) for arguments in inputs]
    assert times in (sorted(times), sorted(times, reverse=True))
    assert len(set(times)) == len(times)
    for last, now in itertools.pairwise(inputs):
        assert 0 < change(now[latent], last[latent]) < 0.3
        assert all(now[name] is last[name] for name in now.keys() - changing)
        assert all(now[name] is not last[name] for name in changing)


@every_run
def test_reference_with_interval_1_is_the_model(case: Case, precision: str) -> None:
    dtype = PRECISIONS[precision]
    model, inputs = case.build(dtype), case.inputs(3, dtype)
    with ambient(precision):
        plain = plain_outputs(model, inputs)
        assert all(result.isfinite().all() for result in plain)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(same(plain, fora_outputs(case.name, model, inputs, interval=1)))
        assert all(same(plain, plain_outputs(model, inputs))), "the model was changed"


@every_run
def test_reference_differs_exactly_at_reuse_steps(case: Case, precision: str) -> None:
    dtype = PRECISIONS[precision]
    model, inputs = case.build(dtype), case.inputs(6, dtype)
    with ambient(precision):
        plain = plain_outputs(model, inputs)
        for anchor in ("start", "paper") if precision == "fp32" else ("start",):
            equal = same(plain, fora_outputs(case.name, model, inputs, interval=3, anchor=anchor))
            assert equal == [computes(step, len(inputs), 3, anchor) for step in range(len(inputs))], anchor


@every_case
def test_every_cached_value_reaches_the_output(case: Case) -> None:
    model, inputs = case.build(), case.inputs(1)
    plain = plain_outputs(model, inputs)[0]
    for module in MODULES[case.name](model):
        for index in read_values(case, module, model):
            with Zeroed(module, index):
                assert change(plain_outputs(model, inputs)[0], plain) > 2e-3, f"{type(module).__name__}, value {index}"


@every_case
def test_modules_cover_the_sites(case: Case) -> None:
    modules = MODULES[case.name](case.build())
    assert len(set(modules)) == len(modules)
    sites = sum(case.sites.values())
    if case.name == "mochi":  # each stream of a joint attention adds a value, not a site; the last one has one stream
        sites += case.sites["joint"] - 1
    assert len(modules) == sites


def test_steps_that_fora_computes() -> None:
    paper = [step for step in range(50) if computes(step, 50, 3, "paper")]
    assert paper == [0, *range(1, 50, 3)]
    assert len(paper) == 18
    assert sum(computes(step, 50, 3, "start") for step in range(50)) == 17
    with pytest.raises(ValueError, match="anchor"):
        computes(0, 50, 3, "end")


def test_broken_blocks_share_graphs() -> None:
    case = broken_blocks()
    model, inputs = case.build(), case.inputs(1)
    captured: list[torch.fx.GraphModule] = []
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        number = len(captured)
        captured.append(graph)

        def run(*args: Tensor) -> Any:
            calls.append(number)
            return graph(*args)

        return run

    torch.compiler.reset()
    with torch.no_grad():
        result = output(torch.compile(model, backend=backend)(**inputs[0]))
    torch.compiler.reset()
    assert torch.equal(result, plain_outputs(model, inputs)[0])
    # One graph up to the break and one after it, each for all six blocks.
    assert sorted(calls.count(number) for number in range(len(captured)))[-2:] == [6, 6]


def read_values(case: Case, module: nn.Module, model: Any) -> range:
    """The indices of the returned values that influence the output."""
    joint = {"sd3": "attn", "flux": "attn", "cogvideox": "attn1"}.get(case.name)
    attentions = [getattr(block, joint) for block in model.transformer_blocks] if joint else []
    if module not in attentions:
        return range(1)
    # Image and text. SD3 drops the last block's text; CogVideoX keeps it, but no video token reads it.
    return range(1) if case.name != "flux" and module is attentions[-1] else range(2)


class Zeroed:
    """A context in which one returned value of a module is zero."""

    def __init__(self, module: nn.Module, index: int) -> None:
        self.module, self.index = module, index

    def __enter__(self) -> None:
        self.hook = self.module.register_forward_hook(self.zero)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def zero(self, module: nn.Module, args: Any, result: Any) -> Any:
        if not isinstance(result, tuple):
            return torch.zeros_like(result)
        return tuple(torch.zeros_like(value) if i == self.index else value for i, value in enumerate(result))
