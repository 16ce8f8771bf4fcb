"""In-place ops in a model are captured as functional ops, found as residual sums, and rewritten exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite.passes.analysis.graph import packet
from tests.helpers.tracing import WIDTH, Look, Toy, linear, look, mlp, norm, tokens, trace
from tests.references.oracle import Rewritten, same

STEPS = 4
MLP = ("mlp", ("addmm",))


def add_to_the_stream(m: Toy, x: Tensor) -> Tensor:
    x = m.enter(x)
    x += m.ff(m.norm(x))
    return x


def add_to_the_input(m: Toy, x: Tensor) -> Tensor:
    x += m.ff(m.norm(x))
    return x * 2.0


def add_to_a_slice(m: Toy, x: Tensor) -> Tensor:
    x = m.enter(x)
    part = x[:, :2]
    part += m.ff(m.norm(part))
    return x


def scale_the_branch(m: Toy, x: Tensor) -> Tensor:
    y = m.ff(m.norm(x))
    y.mul_(m.gate)
    return x + y


def scale_the_stream(m: Toy, x: Tensor) -> Tensor:
    x = m.enter(x)
    y = m.ff(m.norm(x))
    x.mul_(m.gate)
    return x + y


def set_in_the_branch(m: Toy, x: Tensor) -> Tensor:
    y = m.ff(m.norm(x))
    y[:, 0] = 0.5
    return x + y


def set_in_the_stream(m: Toy, x: Tensor) -> Tensor:
    x = m.enter(x)
    x[:, 0] = m.gate
    x = x + m.ff(m.norm(x))
    x[:, 1] = x[:, 2]
    return x


def activate_in_the_branch(m: Toy, x: Tensor) -> Tensor:
    return x + m.eager(m.norm(x))


def activate_the_stream(m: Toy, x: Tensor) -> Tensor:
    x = m.enter(x)
    x.relu_()
    x = x + m.ff(m.norm(x))
    return x.relu_()


def clobber_a_read_value(m: Toy, x: Tensor) -> Tensor:
    """The branch's value is modified in place after the sum, and read again."""
    y = m.ff(m.norm(x))
    x = x + y
    y.neg_()
    return x + y


def fill_a_buffer(m: Toy, x: Tensor) -> Tensor:
    """The two halves of the branch's value are written into a new buffer."""
    y = x.new_empty(x.shape)
    y[..., :4] = m.ff(m.norm(x))[..., 4:]
    y[..., 4:] = m.ff(x)[..., :4]
    return x + y


def build(body: Callable[..., Any]) -> Toy:
    parts = {"enter": linear(), "ff": mlp(), "eager": mlp(inplace=True), "norm": norm(), "gate": tokens(9, WIDTH)}
    return Toy(body, **parts)


BODIES = {
    add_to_the_stream: Look([MLP]),
    add_to_the_input: Look([MLP]),
    add_to_a_slice: Look([MLP]),
    scale_the_branch: Look([MLP]),
    scale_the_stream: Look([]),
    set_in_the_branch: Look([("mlp", ("select_scatter",))]),
    set_in_the_stream: Look([MLP]),
    activate_in_the_branch: Look([MLP]),
    activate_the_stream: Look([MLP]),
    clobber_a_read_value: Look([MLP, ("mlp", ("neg",))]),
    fill_a_buffer: Look([("mlp", ("slice_scatter",))]),
}
every_body = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)


@every_body
def test_sites(body: Callable[..., Any]) -> None:
    """A branch with in-place ops gives the same site as its functional twin."""
    assert look(build(body), tokens()) == BODIES[body]


@every_body
def test_no_op_in_place_is_left(body: Callable[..., Any]) -> None:
    """No op of the graph modifies its operand; an input that the model modifies becomes an additional output."""
    graph = trace(build(body), (tokens(),)).gm.graph
    assert not any(packet(node) is not None and node.target._schema.is_mutable for node in graph.nodes)
    assert len(graph.output_node().args[0]) == 1 + (body is add_to_the_input)


@every_body
def test_exact(body: Callable[..., Any]) -> None:
    """Reuse 0 and random decisions equal the interpreter, and the captured graph equals the eager model."""
    model = build(body)
    calls = [(tokens(step),) for step in range(STEPS)]
    with torch.no_grad():
        plain = [model(x.clone()) for (x,) in calls]
    traced = trace(model, *[(x.clone(),) for (x,) in calls])
    assert same([traced.result], plain[-1:])
    rewritten = Rewritten.of(traced)
    rewritten.check_reuse_0()
    for seed in range(4):
        rewritten.check(rewritten.random_table(seed))


def test_functional_twins() -> None:
    """A model with in-place ops has the same sites as its functional twin."""
    inplace = look(build(add_to_the_stream), tokens())

    def twin(m: Toy, x: Tensor) -> Tensor:
        x = m.enter(x)
        return x + m.ff(m.norm(x))

    assert look(build(twin), tokens()) == inplace == Look([MLP])
