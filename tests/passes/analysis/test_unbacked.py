"""Data-dependent sizes as inputs of straight-line graphs, tested on tensors without a graph."""

from __future__ import annotations

import pytest
import torch
from torch import SymInt, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis.unbacked import bind_inputs, is_dense, memory_order, moving_sizes
from dit_rewrite.passes.capture.capture import one_graph
from tests.helpers.tracing import Toy, linear, tokens, trace


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


def count(mode: FakeTensorMode) -> SymInt:
    """Return a data-dependent size of at most 10."""
    assert mode.shape_env is not None
    with mode.shape_env.ignore_fresh_unbacked_symbols():
        size = mode.shape_env.create_unbacked_symint()
    mode.shape_env._constrain_range_for_size(size.node.expr, 0, 10)
    return size


def bound(mode: FakeTensorMode, *values: object) -> list[object]:
    """Return the values as inputs of a graph after bind_inputs."""
    graph = fx.Graph()
    for i, value in enumerate(values):
        graph.placeholder(f"x{i}").meta["val"] = value
    graph.output(())
    gm = fx.GraphModule({}, graph)
    bind_inputs(gm, mode)
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]


def test_a_sum_of_counts_becomes_one_symbol_with_its_bounds(mode: FakeTensorMode) -> None:
    with mode:
        tokens = torch.empty(2, count(mode) + count(mode) + 8, 16)
    (found,) = bound(mode, tokens)
    size = found.shape[1]  # type: ignore[attr-defined]
    assert size.node.expr.is_Symbol
    assert torch_compat.value_bounds(size) == (8, 28)
    assert found.stride(2) == 1 and memory_order(found) == [0, 1, 2]  # type: ignore[attr-defined, arg-type]


def test_equal_sizes_stay_equal_and_what_follows_from_others_is_written_so(mode: FakeTensorMode) -> None:
    text = count(mode) + count(mode)
    with mode:
        inputs = [torch.empty(text + 8, 4), torch.empty(text + 8, 3), torch.empty(2 * text + 5), torch.empty(4)]
    first, second, third, fixed, number, end = bound(mode, *inputs, text, -text)
    symbol = number.node.expr  # type: ignore[attr-defined]
    assert symbol.is_Symbol
    assert [x.shape[0].node.expr for x in (first, second, third)] == [  # type: ignore[attr-defined]
        symbol + 8,
        symbol + 8,
        2 * symbol + 5,
    ]
    assert end.node.expr == -symbol  # type: ignore[attr-defined]
    assert fixed is inputs[3]


def test_counts_that_have_nothing_to_do_with_each_other_have_a_symbol_each(mode: FakeTensorMode) -> None:
    with mode:
        inputs = [torch.empty(count(mode) + 8), torch.empty(count(mode) + 8)]
    one, other = (x.shape[0].node.expr for x in bound(mode, *inputs))  # type: ignore[attr-defined]
    assert one.is_Symbol and other.is_Symbol and one != other


def test_the_order_of_dimensions_in_memory_is_kept(mode: FakeTensorMode) -> None:
    with mode:
        heads = torch.empty(2, count(mode) + 8, 3, 4).transpose(1, 2)
        view = torch.empty(2, count(mode) + 8, 4)[:, :5]
    (found,) = bound(mode, heads)
    assert memory_order(found) == [0, 2, 1, 3]  # type: ignore[arg-type]
    assert is_dense(heads) and not is_dense(view)


def test_a_size_moves_if_its_mask_or_a_bound_of_the_slice_does() -> None:
    """Tokens that a fixed mask selects are as many in each step; those that the latent selects are not."""

    def body(toy: Toy, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = []
        for chosen in (mask, x[:, 0] > 0):
            selected = x[chosen]
            found += [selected, toy.layer(x)[-chosen.nonzero().shape[0] :]]
        return tuple(found)

    with one_graph():
        traced = trace(Toy(body, layer=linear()), (tokens(0, 6, 8), torch.tensor([True, False] * 3)))
    graph = traced.gm.graph
    shapes = [tuple(node.meta["val"].shape) for node in graph.find_nodes(op="placeholder")]
    moving = moving_sizes(graph, [i for i, shape in enumerate(shapes) if shape != (6, 8)])
    results = [torch_compat.unbacked_symbols(node.meta["val"]) for node in graph.output_node().args[0]]  # type: ignore
    assert all(results)
    assert [bool(symbols & moving) for symbols in results] == [False, False, True, True]
