"""The kernels of a graph: contractions, and the tensors that elementwise ops make for them."""

from __future__ import annotations

import torch.nn.functional as F

from dit_rewrite.passes.analysis.work import Work, kernels
from dit_rewrite.passes.rewrite.printing import op_name
from tests.helpers.tracing import WIDTH, Toy, linear, norm, tokens, trace

ROWS, FLOAT = 2 * 4, 4  # two samples of four tokens


def shown(model: Toy) -> list[tuple[str, Work]]:
    graph = trace(model, (tokens(),)).gm.graph
    return [(op_name(node).removeprefix("aten."), work) for node, work in kernels(graph)]


def product(inner: int, outer: int) -> Work:
    """A linear layer with a bias reads its operands and writes its result."""
    return Work(2 * ROWS * inner * outer, FLOAT * (ROWS * (inner + outer) + inner * outer + outer))


def test_an_mlp() -> None:
    """The activation is one kernel, however many elementwise ops it has."""
    model = Toy(lambda m, x: m.b(F.gelu(m.a(x)) * 2 + 1), a=linear(outer=24), b=linear(inner=24))
    elementwise = Work(0, 2 * FLOAT * ROWS * 24)
    assert shown(model) == [("addmm", product(WIDTH, 24)), ("add", elementwise), ("addmm", product(24, WIDTH))]


def test_a_norm_is_fused_with_what_reads_it() -> None:
    """A norm and a residual sum: one kernel for what the layer reads, and one for the output."""
    model = Toy(lambda m, x: x + m.a(m.norm(x)), a=linear(), norm=norm())
    (normed, before), layer, (added, after) = shown(model)
    assert (layer, normed, added) == (("addmm", product(WIDTH, WIDTH)), "getitem", "add")
    assert before == Work(0, FLOAT * (2 * ROWS * WIDTH + 2 * WIDTH))
    assert after == Work(0, FLOAT * 3 * ROWS * WIDTH)


def test_views_are_no_work() -> None:
    assert shown(Toy(lambda m, x: x.transpose(0, 1).unsqueeze(0))) == []
