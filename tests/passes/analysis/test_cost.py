"""FLOPs and bytes against hand-computed values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import is_contraction, packet
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.capture.capture import one_graph
from tests.helpers.tracing import Attention, Toy, linear, mlp, norm, tokens, trace

aten = torch.ops.aten


def total(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> int:
    return cost.total_flops(trace(model, inputs, dynamic=dynamic).gm.graph)


@pytest.mark.parametrize("dynamic", [False, True])
def test_linear(dynamic: bool) -> None:
    """A projection of 2 x 4 tokens from width 8 to 12. A multiply-add counts as two, the bias is free."""
    for bias in (True, False):
        assert total(Toy(lambda m, x: m.a(x), a=linear(8, 12, bias)), tokens(), dynamic=dynamic) == 2 * (2 * 4) * 8 * 12


@pytest.mark.parametrize("dynamic", [False, True])
def test_bmm(dynamic: bool) -> None:
    """A batch of two products, 4 x 8 by 8 x 5."""
    assert total(Toy(lambda m, x, y: x @ y), tokens(), tokens(1, 2, 8, 5), dynamic=dynamic) == 2 * 2 * (4 * 8 * 5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention(dynamic: bool) -> None:
    """Scores and weighted sum: batch 2, 3 heads, 4 queries, 6 keys, width 8, values of width 5."""
    q, k, v = tokens(0, 2, 3, 4, 8), tokens(1, 2, 3, 6, 8), tokens(2, 2, 3, 6, 5)
    model = Toy(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v))
    assert total(model, q, k, v, dynamic=dynamic) == 2 * (2 * 3) * (4 * 6 * 8 + 4 * 6 * 5)


def test_attention_with_a_mask() -> None:
    """A mask does not change the FLOPs, nor does one tensor as query, key and value."""
    q, mask = tokens(0, 2, 3, 4, 8), tokens(1, 4, 4)
    model = Toy(lambda m, q, mask: F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert total(model, q, mask) == 2 * (2 * 3) * (2 * 4 * 4 * 8)


def test_convolution() -> None:
    """Batch 2, 3 to 5 channels, a 3 x 3 kernel, 4 x 4 positions."""
    model = Toy(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 5, 3, padding=1))
    assert total(model, tokens(0, 2, 3, 4, 4)) == 2 * 2 * (4 * 4) * (3 * 5 * 3 * 3)


def test_elementwise_ops_are_free() -> None:
    """Norms, activations, sums and views have no FLOPs."""
    assert total(Toy(lambda m, x: F.gelu(m.norm(x) * 2 + x).transpose(0, 1), norm=norm()), tokens()) == 0


def test_sum_over_a_block() -> None:
    """Four projections, attention with two heads and an MLP."""
    model = Toy(lambda m, x: m.ff(m.attn(x)), attn=Attention(), ff=mlp())
    projections = 4 * (2 * 8 * 8 * 8)
    core = 2 * (2 * 2) * (2 * 4 * 4 * 4)
    assert total(model, tokens()) == projections + core + 2 * (2 * 8 * 8 * 16)


def test_bytes() -> None:
    """A tensor has its own bytes, a view those of its base."""

    def body(m: Toy, x: Tensor) -> tuple[Tensor, ...]:
        wide = m.wide(x)
        return wide[..., :1].neg(), wide.chunk(4, -1)[1], wide.bfloat16(), (x > 0).expand(3, 2, 4, 8)

    traced = trace(Toy(body, wide=linear(8, 32)), (tokens(),))
    returned = traced.gm.graph.output_node().args[0]
    assert [cost.stored_bytes(node) for node in returned] == [4 * 8, 4 * (8 * 32), 2 * (8 * 32), 1 * (8 * 8)]


def test_sizes_that_depend_on_data_count_as_their_maximum() -> None:
    """A mask selects some of 2 x 4 tokens: the costs are those of all."""
    model = Toy(lambda m, x: m.a(x[x[..., 0] > 0]), a=linear(8, 12, False))
    with one_graph():
        graph = trace(model, (tokens(),)).gm.graph
    (product,) = (node for node in graph.nodes if is_contraction(node))
    assert torch_compat.unbacked_symbols(product.meta["val"])
    assert cost.total_flops(graph) == 2 * (2 * 4) * 8 * 12
    assert cost.stored_bytes(product) == cost.tensor_bytes(product) == 4 * (2 * 4) * 12


def test_symbolic_sizes_add_no_guard() -> None:
    """The cost of a graph with symbolic sizes adds no Dynamo guard."""
    traced = trace(Toy(lambda m, x: x + m.attn(x), attn=Attention()), (tokens(),), dynamic=True)
    shape_env = traced.captured.fake_mode.shape_env
    before = len(shape_env.guards)
    flops = cost.total_flops(traced.gm.graph)
    sizes = [
        cost.stored_bytes(n) for n in traced.gm.graph.nodes if n.target is opaque_attention.OP or packet(n) is aten.add
    ]
    assert flops == 4 * (2 * 8 * 8 * 8) + 2 * (2 * 2) * (2 * 4 * 4 * 4)
    assert sizes == [4 * (2 * 4 * 8)] * 2
    assert len(shape_env.guards) == before
    (core,) = traced.gm.graph.find_nodes(op="call_function", target=opaque_attention.OP)
    batch = core.meta["val"].shape[0]
    assert isinstance(batch, torch.SymInt)
    assert cost.hint(batch) == 2
    assert cost.hint(7) == 7
