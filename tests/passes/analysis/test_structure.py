"""The structure of a graph: equal for graphs that one piece of code can run, and for no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dit_rewrite.passes.analysis.graph import copied
from dit_rewrite.passes.analysis.structure import structure
from tests.helpers.tracing import WIDTH, Toy, Traced, linear, tokens, trace

aten = torch.ops.aten


def straight(body: Callable[[Toy, Tensor], Any], x: Tensor, **parts: Any) -> fx.GraphModule:
    """Return a toy's captured graph."""
    of: Traced = trace(Toy(body, **parts), (x,))
    return of.gm


def test_structure_of_the_same() -> None:
    """Names and values of weights do not matter."""
    x = tokens()
    one = straight(lambda m, x: x + m.ff(x), x, ff=linear())
    other = straight(lambda m, x: x + m.another(x), x, another=linear())
    assert structure(one) == structure(other)
    assert structure(one) == structure(copied(one))


@pytest.mark.parametrize(
    ("body", "x"),
    [
        (lambda m, x: x + m.ff(x), tokens().double()),
        (lambda m, x: x + m.ff(x), tokens(0, 2, 5, WIDTH)),
        (lambda m, x: x + m.ff(x), tokens(0, 2, WIDTH, 4).transpose(1, 2)),
        (lambda m, x: m.ff(x) + x, tokens()),
        (lambda m, x: x - m.ff(x), tokens()),
        (lambda m, x: x.add(m.ff(x), alpha=2), tokens()),
        (lambda m, x: (lambda y: (x + y, y))(m.ff(x)), tokens()),
        (lambda m, x: x + m.ff(x) * 2, tokens()),
    ],
    ids=["dtype", "shape", "strides", "order", "op", "keyword", "outputs", "more"],
)
def test_structure_of_others(body: Any, x: Tensor) -> None:
    """Graphs with other ops or inputs have another structure."""
    linears = linear().to(x.dtype)
    assert structure(straight(body, x, ff=linears)) != structure(
        straight(lambda m, x: x + m.ff(x), tokens(), ff=linear())
    )


@pytest.mark.parametrize(("a", "b"), [(1, 1.0), (2, 3), (1.5, 1.25), (True, 1), (0.0, -0.0)])
def test_structure_of_constants(a: Any, b: Any) -> None:
    """Constants that are equal in Python differ for an op: 1, 1.0 and True, 0.0 and -0.0."""

    def built(number: Any) -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(2, device="meta")
        graph.output((graph.call_function(aten.mul.Tensor, (x, number)),))
        return fx.GraphModule({}, graph)

    assert structure(built(a)) == structure(built(a))
    assert structure(built(a)) != structure(built(b))


def test_structure_of_attributes() -> None:
    """A constant tensor is equal if it is the same object."""

    def built(tensor: Tensor) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output((graph.get_attr("c"),))
        root = nn.Module()
        root.c = tensor
        return fx.GraphModule(root, graph)

    c = torch.ones(2)
    one, same_one, other = built(c), built(c), built(torch.ones(2))
    assert structure(one) == structure(same_one) != structure(other)
