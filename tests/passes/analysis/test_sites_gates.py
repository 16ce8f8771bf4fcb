"""Gates and scales: which are removed from a branch, and which belong to its value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.tracing import WIDTH, Look, Toy, linear, look, mlp, norm, tokens, trace

ADDMM = Look([("mlp", ("addmm",))])


def test_parameter_as_gate() -> None:
    """A learnt scale is removed."""
    assert look(Toy(lambda m, x: x + m.gate * m.ff(x), ff=mlp(), gate=tokens(1, WIDTH)), tokens()) == ADDMM


def test_modulated_gate() -> None:
    """A gate computed from the condition is removed, on either side of the product."""

    def left(m: Toy, x: Tensor, signal: Tensor) -> Tensor:
        return x + m.modulate(F.silu(signal))[:, None] * m.ff(x)

    def right(m: Toy, x: Tensor, signal: Tensor) -> Tensor:
        return x + m.ff(x) * m.modulate(F.silu(signal))[:, None]

    for body in (left, right):
        assert look(Toy(body, ff=mlp(), modulate=linear()), tokens(), tokens(1, 2, WIDTH)) == ADDMM


def test_tanh_gate() -> None:
    """A gate that is a function of a parameter is removed."""
    assert look(Toy(lambda m, x: x + m.gate.tanh() * m.ff(x), ff=mlp(), gate=tokens(1, WIDTH)), tokens()) == ADDMM


def test_gate_and_scale() -> None:
    """Several factors are all removed, in any combination."""
    parts = {"ff": mlp(), "gate": tokens(1, WIDTH), "scale": tokens(2, WIDTH)}
    for body in (
        lambda m, x: x + m.gate * m.scale * m.ff(x),
        lambda m, x: x + m.gate * (m.scale * m.ff(x)),
        lambda m, x: x + (0.5 * m.gate) * (m.ff(x) / 3.0),
    ):
        assert look(Toy(body, **parts), tokens()) == ADDMM


def test_gate_that_depends_on_the_stream() -> None:
    """A gate computed from the stream changes with it and belongs to the value."""
    model = Toy(lambda m, x: x + m.gate(x).sigmoid() * m.ff(x), ff=mlp(), gate=linear())
    assert look(model, tokens()) == Look([("mlp", ("mul",))])


def test_gate_outside_of_a_gate_that_depends_on_the_stream() -> None:
    """The outer gate is removed, the inner one stays."""
    model = Toy(lambda m, x: x + m.outer * (m.gate(x).sigmoid() * m.ff(x)), ff=mlp(), gate=linear(), outer=tokens(1, 8))
    traced = trace(model, (tokens(),))
    (site,) = traced.sites().sites
    value = traced.nodes[site.values[0]]
    assert [argument.name for argument in value.args] == ["sigmoid", "view_5"]  # after views of three projections


def test_norm_between_gate_and_branch() -> None:
    """Only gates after the last op that changes the value are removed."""
    model = Toy(
        lambda m, x: x + m.gate * m.norm(m.scale * m.ff(x)),
        ff=mlp(),
        norm=norm(),
        gate=torch.ones(8),
        scale=torch.ones(8),
    )
    assert look(model, tokens()) == Look([("mlp", ("getitem",))])


def test_constant_scale() -> None:
    """Constant factors are removed from the branch and ignored on the stream."""
    for body in (
        lambda m, x: x + 0.5 * m.ff(x),
        lambda m, x: x + m.ff(x) / 2.0,
        lambda m, x: 0.7 * x + 0.3 * m.ff(x),
        lambda m, x: torch.add(x, m.ff(x), alpha=2),
        lambda m, x: (x + m.ff(x)) + 1.0,
        lambda m, x: (x + m.ff(x)) / 2.0,
    ):
        assert look(Toy(body, ff=mlp()), tokens()) == ADDMM


def test_dropout_in_eval() -> None:
    """Dropout of a model in eval mode leaves no node."""
    assert look(Toy(lambda m, x: x + F.dropout(m.ff(x), 0.5, m.training), ff=mlp()), tokens()) == ADDMM


def test_cast_of_gated_branch() -> None:
    """Casts between the gate and the sum are ignored, and the value is the projection's output."""
    model = Toy(lambda m, x: x + (m.gate.double() * m.ff(x).double()).float(), ff=mlp(), gate=tokens(1, WIDTH))
    assert look(model, tokens()) == ADDMM
    traced = trace(model, (tokens(),))
    assert traced.nodes[traced.sites().sites[0].values[0]].meta["val"].dtype is torch.float32


def test_modulation_of_the_input() -> None:
    """Scale and shift of a norm are no residual sum, although `1 + scale` and `y + shift` are sums."""

    def body(m: Toy, x: Tensor, signal: Tensor) -> Tensor:
        shift, scale = m.modulate(signal)[:, None].chunk(2, dim=-1)
        return x + m.ff(m.norm(x) * (1 + scale) + shift)

    model = Toy(body, ff=mlp(), norm=norm(), modulate=linear(outer=2 * WIDTH))
    assert look(model, tokens(), tokens(1, 2, WIDTH)) == ADDMM
