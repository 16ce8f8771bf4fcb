"""Costs as expressions: against hand-derived formulas, and against torch's FLOP counter on every model."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.cost_model import CostModel, model_costs
from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.capture.capture import Captured, capture, one_graph
from tests.helpers.models import MODELS, Case
from tests.helpers.tracing import WIDTH, Attention, Toy, linear, mlp, norm, tokens, trace

B, N, T, H, W = sympy.symbols("batch tokens text_tokens height width", integer=True, positive=True)
SIZES = {"batch": 3, "text_tokens": 9, "frames": 4, "height": 16, "width": 12}
ONE_SIZE = {"latte": {"frames": 3}, "mochi": {"batch": 2}}  # a table of frames; a loop over the samples, unrolled


def costs(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> CostModel:
    captured = trace(model, inputs, dynamic=dynamic).captured
    return model_costs(captured.gm, captured.static, find_sites(captured.gm, captured.static).sites)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_block(dynamic: bool) -> None:
    """Self-attention with four projections, and an MLP, over (batch, tokens, 8)."""
    model = Toy(
        lambda m, x: (lambda y: y + m.ff(m.second(y)))(x + m.attn(m.first(x))),
        attn=Attention(), ff=mlp(), first=norm(), second=norm(),
    )  # fmt: skip
    found = costs(model, tokens(), dynamic=dynamic)
    attention = 4 * 2 * B * N * WIDTH**2 + 4 * B * N**2 * WIDTH
    feed_forward = 2 * 2 * B * N * WIDTH * 2 * WIDTH
    assert [(site.name, site.flops) for site in found.sites] == [("attn", attention), ("ff", feed_forward)]
    assert [site.bytes for site in found.sites] == [4 * B * N * WIDTH] * 2
    assert (found.total, found.rest) == (attention + feed_forward, 0)
    assert found.sizes == {B: 2, N: 4}
    assert found.at(found.total, tokens=10) == (attention + feed_forward).subs({B: 2, N: 10})


def test_cross_attention() -> None:
    """Keys and values of a text: their projections do not depend on the tokens."""
    model = Toy(lambda m, x, text: x + m.attn(m.norm(x), text), attn=Attention(), norm=norm())
    found = costs(model, tokens(), tokens(1, 2, 6, WIDTH))
    assert found.total == 2 * 2 * B * N * WIDTH**2 + 2 * 2 * B * T * WIDTH**2 + 4 * B * N * T * WIDTH
    assert (B, T, WIDTH) in found.inputs.values()


def patches(m: Toy, x: Tensor) -> Tensor:
    """Patches of 2 x 2, with a table of positions for the captured size, a block, and the patches' places again."""
    y = m.conv(x).flatten(2).transpose(1, 2) + m.positions
    y = y + m.ff(m.norm(y))
    b, _, h, w = x.shape
    return m.out(y).view(b, h // 2, w // 2, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(b, 3, h, w)


def test_tokens_are_a_grid_of_patches() -> None:
    """A table that was computed for the captured size does not fix the number of tokens."""
    parts = {"conv": nn.Conv2d(3, WIDTH, 2, 2), "ff": mlp(), "norm": norm(), "out": linear(outer=12)}
    found = costs(Toy(patches, positions=torch.zeros(1, 24, WIDTH), **parts), tokens(0, 2, 3, 8, 12))
    convolution, out = 2 * B * N * WIDTH * 12, 2 * B * N * WIDTH * 12
    assert found.total == convolution + 2 * 2 * B * N * WIDTH * 2 * WIDTH + out
    assert found.rest == convolution + out
    assert (found.grid, found.sizes) == (H * W / 4, {B: 2, N: 24})


def test_height_alone_is_not_a_number_of_tokens() -> None:
    """Attention along one axis of the grid costs height * width**2: no function of the product."""
    model = Toy(lambda m, x: x + F.scaled_dot_product_attention(x, x, x))
    found = costs(model, tokens(0, 2, 3, 6, 10))
    assert found.total == 4 * B * sympy.Symbol("frames", integer=True, positive=True) * H**2 * W
    assert found.grid is None


@torch.no_grad()
def counted(model: nn.Module, call: dict[str, Any]) -> int:
    """Return the FLOPs by torch's counter, which does not count fused attention on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**call)
    return counter.get_total_flops()


def captured(model: nn.Module, call: dict[str, Any]) -> list[Captured]:
    """Return the graphs of a model."""
    found: list[Captured] = []

    def keep(graph: Captured) -> Any:
        found.append(graph)
        return lambda arguments: graph.gm(*arguments)

    with torch.no_grad(), one_graph():
        torch.compile(model, backend=lambda gm, example: capture(gm, example, keep))(**call)
    return found


def resized(value: Any, found: CostModel, sizes: dict[str, int], name: str = "") -> Any:
    """Return the arguments with other sizes, by the shapes that the cost model gives for them."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {key: resized(each, found, sizes, f"{name}_{key}".removeprefix("_")) for key, each in items}
        return changed if isinstance(value, dict) else type(value)(changed.values())
    if not isinstance(value, Tensor) or name not in found.inputs:
        return value
    shape = [int(found.at(size, **sizes)) for size in found.inputs[name]]
    return torch.ones(shape, dtype=value.dtype)


@pytest.mark.parametrize("case", MODELS.values(), ids=lambda case: case.name)
def test_models(case: Case) -> None:
    """The expressions are exact at the captured sizes, and at others that the model takes without graph breaks."""
    model, call = case.build(), case.inputs(2)[0]
    graphs = captured(model, call)
    models = [model_costs(c.gm, c.static | c.ambient, find_sites(c.gm, c.static).sites) for c in graphs]
    of_data = [symbol for each in models for symbol, size in each.sizes.items() if size is None]
    lengths = call["encoder_attention_mask"].sum(1).tolist() if of_data else []
    kept = {str(symbol): lengths[i % len(lengths)] for i, symbol in enumerate(sorted(of_data, key=str))}
    assert sum(each.at(each.total, **kept) for each in models) == counted(model, call)
    for each, graph in zip(models, graphs, strict=True):
        assert of_data or each.at(each.total) == cost.total_flops(graph.gm.graph)
        assert [each.at(site.bytes) for site in each.sites] == [
            s.bytes for s in find_sites(graph.gm, graph.static).sites
        ]
    if len(models) > 1:
        return
    (found,) = models
    sizes = {**SIZES, **ONE_SIZE.get(case.name, {})}
    sizes["tokens"] = 20 if found.grid is None else int(found.at(found.grid, **sizes))
    kept = {str(symbol): sizes["text_tokens"] for symbol in of_data}
    assert found.at(found.total, **sizes, **kept) == counted(model, resized(call, found, sizes))
    assert {"batch", "tokens"} <= {str(symbol) for symbol in found.sizes}
