"""`compile` returns a module that replaces the model, captured and lowered as its arguments request."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

import dit_rewrite
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA, Never
from tests.cli.test_generate import build_dit_pipeline
from tests.helpers import tiny
from tests.helpers.broken import broken_blocks
from tests.helpers.tiny import calls, fora, outputs, rewritten, row, same


def test_pipelines_accept_it(tmp_path: Path) -> None:
    """Their class checks, a whole run, and save_pretrained, which takes the wrapper off."""
    pipeline = build_dit_pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        made = pipeline([1], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt")
        return torch.as_tensor(made.images)

    transformer = pipeline.transformer.eval().requires_grad_(False)
    plain = images()
    pipeline = type(pipeline)(rewritten(transformer, Never()), pipeline.vae, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(images(), plain)
    pipeline.transformer = rewritten(transformer, FORA(2))
    with pipeline.transformer.trajectory(scheduler=pipeline.scheduler):
        assert not torch.equal(images(), plain)
    assert row(pipeline.transformer, 4) == "CRCR"
    pipeline.save_pretrained(tmp_path)
    saved = type(pipeline).from_pretrained(tmp_path).transformer.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in transformer.state_dict().items())


def test_a_callable_lowers_the_graphs() -> None:
    model = tiny.build()
    given: list[tuple[fx.GraphModule, list[Any]]] = []

    def lower(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        given.append((gm, inputs))
        return gm.forward

    compiled = dit_rewrite.compile(twin(model), FORA(3), backend=lower)
    assert same(outputs(compiled, calls(7)), fora(model, calls(7)))
    assert len(given) == compiled.stats().variants == 2
    for gm, inputs in given:
        assert isinstance(gm, fx.GraphModule)
        assert all(isinstance(value, FakeTensor) for value in inputs)
        assert len(inputs) == len(gm.graph.find_nodes(op="placeholder"))
    reusing, computing = (sum(n.op == "call_function" for n in gm.graph.nodes) for gm, _ in given)
    assert reusing < computing / 2


def test_fullgraph_makes_a_break_an_error() -> None:
    case = broken_blocks(1)
    arguments = case.inputs(1)[0]
    with pytest.raises(torch._dynamo.exc.Unsupported), torch.no_grad():
        rewritten(case.build(), fullgraph=True)(**arguments)
    rewritten(case.build())(**arguments)
    rewritten(tiny.build(), fullgraph=True)(**calls(1)[0])


def test_dynamic_shapes_are_compiled_once() -> None:
    model = tiny.build()
    compiled = rewritten(model, dynamic=True)
    with contextlib.ExitStack() as stack:
        for i, tokens in enumerate((8, 12, 6)):
            inputs = calls(4, seed=i, tokens=tokens)
            assert same(outputs(compiled, inputs), fora(model, inputs))
            assert row(compiled, 4) == "CRRC"
            if i == 0:
                stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
    assert (compiled.stats().variants, compiled.stats().late_variants) == (2, 0)


def test_the_dump_is_numbered_by_graph_and_pass(tmp_path: Path) -> None:
    case = broken_blocks(2)
    compiled = rewritten(case.build(), dump=tmp_path)
    outputs(compiled, case.inputs(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"graph{i}" for i in range(len(compiled.explain().rewritten))
    ]
    for folder in tmp_path.iterdir():
        names = {path.name for path in folder.iterdir()}
        assert {"00_captured.py", "01_find_sites.txt", "08_partition.txt"} <= names
        assert any(re.fullmatch(r"09_variant\d_all_compute\.py", name) for name in names)
        guarded = any(
            case_.found.sites for case_ in compiled.explain().rewritten if folder.name == f"graph{case_.graph.index}"
        )
        assert ({"05_insert_guards.py", "05_insert_guards.diff"} <= names) == guarded


class Returning(nn.Module):
    """A model that also returns a branch; with a graph break, a second graph changes that branch in place."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.broken = broken

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.linear(x)
        y = x + branch
        if self.broken:
            torch._dynamo.graph_break()
            branch.neg_()
        return y, branch


@pytest.mark.parametrize("broken", [False, True])
def test_a_branch_that_is_returned_may_be_changed_in_place(broken: bool) -> None:
    model = Returning(broken).requires_grad_(False)
    compiled = rewritten(model, FORA(4))
    start, move = torch.randn(2, 2, 4)
    inputs = [start + 0.05 * step * move for step in range(4)]
    branch = model.linear(inputs[0])
    with compiled.trajectory(4):
        for step, x in enumerate(inputs):
            y, returned = compiled(x, torch.tensor(1.0 - step))
            assert torch.equal(y, x + branch)
            assert torch.equal(returned, -branch if broken else branch)
            returned.zero_()
            y.zero_()
    assert compiled.stats().reused == 3


def test_weights_changed_between_trajectories_are_used() -> None:
    """An adapter fused in place: a trajectory never reads a value computed with older weights."""
    model, inputs = tiny.build(), calls(4)
    compiled = rewritten(model)
    for _ in range(2):
        with compiled.trajectory(4):
            assert same(outputs(compiled, inputs), fora(model, inputs))
        model.blocks[0].attn.proj.weight.mul_(2)


def test_a_call_by_position_is_the_same() -> None:
    model = tiny.build()
    compiled = rewritten(model)
    with torch.no_grad():
        found = [compiled(*arguments.values()).clone() for arguments in calls(7)]
    assert same(found, fora(model, calls(7)))
    assert row(compiled, 7) == "CRRCRRC"


class Unknown(nn.Module):
    """A wrapper around the tiny model that hides the names of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.build()

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args)


def test_arguments_without_names_never_mix_prompts() -> None:
    """Timestep and conditioning cannot be distinguished: every call is its own stream and nothing is reused."""
    model = Unknown()
    compiled = rewritten(model)
    inputs = calls(12)
    with torch.no_grad():
        found = [compiled(*arguments.values()).clone() for arguments in inputs]
    assert same(found, outputs(model.inner, inputs))
    assert compiled.stats().reused == 0
