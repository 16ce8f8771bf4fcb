"""Taps: moments of tensors against those of earlier steps, computed within the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_rewrite.passes.analysis.graph import aten, packet
from dit_rewrite.passes.rewrite.tap import LENT, Cut, Tap, TappedGraph, insert_taps
from tests.helpers.tracing import SHAPE, Attention, Toy, Traced, linear, mlp, norm, tokens, trace


def residual(self: Toy, x: Tensor) -> Tensor:
    x = x + self.attn(self.norm(x))
    return x + self.mlp(self.norm(x))


def traced() -> Traced:
    return trace(Toy(residual, attn=Attention(), mlp=mlp(), norm=norm()), (tokens(),), (tokens(1),))


def run(tapped: TappedGraph, arguments: list[object], *past: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the output of the model, the moments, and the tapped tensors."""
    with torch.no_grad():
        output, moments, *tensors = tapped.gm(*arguments, *past)
    return output, moments, tensors


def expected(x: Tensor, y: Tensor) -> list[float]:
    x, y = x.double(), y.double()
    apart = (x - y).abs()
    found = (apart.mean(), apart.var(correction=0), y.abs().mean(), (x * y).mean(), (x * x).mean(), (y * y).mean())
    return [float(value) for value in found]


def test_moments_against_the_last_step() -> None:
    """The second call is compared with the tensors that the first call returned; the model's output stays the same."""
    made = traced()
    values = [site.values[0] for site in made.sites().sites]
    tapped = insert_taps(made.gm, [Tap((value,)) for value in values], (1,))
    zeros = [torch.zeros(example.shape) for example in tapped.examples]
    output, moments, first = run(tapped, made.arguments[0], *zeros)
    assert torch.equal(output, made.returned[0][0])
    assert moments.tolist() == [pytest.approx(expected(x, torch.zeros(()))) for x in first]
    output, moments, second = run(tapped, made.arguments[1], *first)
    assert torch.equal(output, made.returned[1][0])
    assert moments.tolist() == [pytest.approx(expected(x, y)) for x, y in zip(second, first, strict=True)]


def test_tensors_are_reduced_where_they_are_made() -> None:
    """All reductions of the attention's value precede the next matrix product of the model."""
    made = traced()
    attention, mlp_value = (site.values[0] for site in made.sites().sites)
    tapped = insert_taps(made.gm, [Tap((mlp_value,)), Tap((attention,))], (1, 2))
    order = [node.name for node in tapped.gm.graph.nodes if packet(node) in (aten.mean, aten.addmm)]
    products = [i for i, name in enumerate(order) if name.startswith("addmm")]
    assert len(order) == 6 + 2 * 2 * 6, "six means for each tap and distance"
    assert products == [0, 1, 2, 3, 16, 17], "those of the attention lie between its projection and the MLP"
    inputs = [node.name for node in tapped.gm.graph.find_nodes(op="placeholder")]
    assert inputs[-4:] == ["tap0_before1", "tap0_before2", "tap1_before1", "tap1_before2"]


def test_cuts_heads_and_parts_of_one_tensor() -> None:
    """Tokens 0 to 2, then the second sample against the first; each for both heads together and one by one."""
    made = traced()
    core = next(node.name for node in made.gm.graph.nodes if "attention" in node.name)
    second, first = ((0, 1, 1),), ((0, 0, 1),)
    tap = Tap((core,), (Cut(((2, 0, 3),)), Cut(second, against=first)), heads=1)
    tapped = insert_taps(made.gm, [tap], (1,))
    assert tapped.comparisons(0) == [(0, h, 1) for h in (None, 0, 1)] + [(1, h, LENT) for h in (None, 0, 1)]
    past = torch.randn(tapped.examples[0].shape)
    _, moments, (value,) = run(tapped, made.arguments[0], past)
    x, y = value[:, :, :3], past[:, :, :3]
    pairs = [(x, y), (x[:, 0], y[:, 0]), (x[:, 1], y[:, 1])]
    pairs += [(value[1], value[0]), (value[1, 0], value[0, 0]), (value[1, 1], value[0, 1])]
    assert moments.tolist() == [pytest.approx(expected(*pair), rel=1e-4) for pair in pairs]


def test_a_derived_tensor() -> None:
    """The change of the stream across both branches is a tensor that the model does not have."""
    made = traced()
    first, last = made.gm.graph.find_nodes(op="placeholder"), made.gm.graph.output_node().args[0][0]
    (latent,) = [node for node in first if tuple(node.meta["val"].shape) == SHAPE]
    tapped = insert_taps(made.gm, [Tap((last.name, latent.name), derive=lambda after, before: after - before)], (1,))
    output, _, (change,) = run(tapped, made.arguments[0], torch.zeros(SHAPE))
    assert torch.equal(change, output - tokens())


def test_low_precision_is_reduced_in_float32() -> None:
    """A sum of 10000 bfloat16 numbers would stop growing at 256."""
    made = trace(Toy(lambda self, x: self.lin(x), lin=linear().bfloat16()), (torch.ones(2500, 8).bfloat16(),))
    name = made.gm.graph.output_node().args[0][0].name
    tapped = insert_taps(made.gm, [Tap((name,))], (1,))
    _, moments, (value,) = run(tapped, made.arguments[0], torch.zeros(2500, 8).bfloat16())
    assert moments.dtype is torch.float64
    assert moments[0].tolist() == pytest.approx(expected(value, torch.zeros(())), rel=1e-5)


def test_a_graph_without_taps() -> None:
    made = traced()
    tapped = insert_taps(made.gm, [], (1,))
    assert len(tapped.gm(*made.arguments[0])) == 1
