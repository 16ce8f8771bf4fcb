"""Some tokens of a branch: they equal those of the whole, and nothing else of the input's tokens is read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.rewrite.row_rules import Place
from dit_rewrite.passes.rewrite.rows import RowWriter, Tokens, find_tokens, token_dim
from tests.helpers.batches import drawn, traced

aten, attention = torch.ops.aten, opaque_attention.OP
TOKENS, CHOSEN = 8, (1, 2, 6)
X, TEXT, SQUARE, WIDE, VECTOR = drawn(2, TOKENS, 4), drawn(2, 3, 4), drawn(4, 4), drawn(4, 8), drawn(4)


@dataclass(frozen=True)
class Op:
    """A function of tokens (the first input), the inputs, and how many of these are gathered; None: it is refused."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...] = (X,)
    gathered: int | None = 1


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 2)).transpose(1, 2)


def cross(x: Tensor, text: Tensor, w: Tensor, *mask: Tensor) -> Tensor:
    """A branch of cross-attention from its norm to its output projection."""
    q, k, v = (heads(t) for t in (F.layer_norm(x, (4,)) @ w, text @ w, text @ (w + 1)))
    return attention(q, k, v, *mask).transpose(1, 2).flatten(2) @ w


def by_softmax(x: Tensor, text: Tensor) -> Tensor:
    return torch.softmax(x @ text.transpose(1, 2), -1) @ text


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def placed(x: Tensor, w: Tensor) -> Tensor:
    """With a table of positions that the function makes itself."""
    return (x + torch.arange(8.0, dtype=x.dtype).sin()[:, None].expand(8, 4).flip(0)) @ w


def over_time(x: Tensor, w: Tensor) -> Tensor:
    """Attention among frames (2, frames, tokens, width), for each token on its own."""
    q = (x @ w).transpose(1, 2).flatten(0, 1)[:, None]
    return attention(q, q, q)[:, 0].unflatten(0, (2, 8)).transpose(1, 2)


OPS = [
    Op("a linear layer", lambda x, w, b: F.linear(x, w, b), (X, SQUARE, VECTOR)),
    Op("an MLP", lambda x, w: F.gelu(x @ w) @ w.T, (X, WIDE)),
    Op("a gated MLP", lambda x, w, v: operator.mul(*(x @ w).chunk(2, -1)) @ v, (X, WIDE, SQUARE)),
    Op("a bias of tokens", lambda x, w, b: torch.baddbmm(b, x, w), (X, drawn(2, 4, 4), drawn(2, 8, 4)), 2),
    Op("tokens and batch in one dim", lambda x, w: torch.mm(x.view(16, 4), w).view(2, 8, 4), (X, SQUARE)),
    Op("an input of batch and tokens in one dim", lambda x, w: (x @ w).view(2, 8, 4), (drawn(16, 4), SQUARE)),
    Op("heads and tokens in one dim", lambda x: (x.view(2, 16, 2) + 1).view(2, 8, 4), (X,)),
    Op("modulation", lambda x, s: F.layer_norm(x, (4,)) * (1 + s[:, None]), (X, drawn(2, 4))),
    Op("an RMS norm", lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    Op("a norm", lambda x: x / torch.linalg.vector_norm(x, dim=-1)[..., None]),
    Op("cross-attention", cross, (X, TEXT, SQUARE)),
    Op("with a mask of keys", cross, (X, TEXT, SQUARE, drawn(2, 1, 1, 3))),
    Op("with a mask of queries and keys", cross, (X, TEXT, SQUARE, drawn(2, 1, 8, 3)), 2),
    Op("attention as products", by_softmax, (X, TEXT)),
    Op("attention over time", over_time, (drawn(2, 3, 8, 4), SQUARE)),
    Op("rotary positions", rotated, (X, drawn(8, 2)), 2),
    Op("a table made inside", placed, (X, SQUARE)),
    Op("no batch", lambda x, w: x @ w, (drawn(8, 4), SQUARE)),
    Op("parts joined", lambda x, w: torch.cat((x[..., 2:], x[..., :2]), -1) @ w, (X, SQUARE)),
    Op("parts stacked", lambda x: torch.stack(x.unbind(-1), 1).sum(1)[..., None].expand(2, 8, 4)),
    Op("a dim more and less", lambda x: (x[:, None] * 2).squeeze(1).permute(0, 2, 1).unsqueeze(0)[0].mT),
    Op("a row of a table for each token", lambda x, t: F.embedding((x[..., 0] > 0).long(), t), (X, SQUARE)),
    # a token depends on others
    Op("self-attention", lambda x, w: cross(x, x, w), (X, SQUARE), None),
    Op("joint attention", lambda x, t, w: cross(x, torch.cat((t, x), 1), w), (X, TEXT, SQUARE), None),
    Op("a fused projection", lambda x, w: attention(*(x @ w).split(2, -1)), (X, drawn(4, 6)), None),
    Op("the mean of the tokens", lambda x, w: (x - x.mean(1, keepdim=True)) @ w, (X, SQUARE), None),
    Op("a convolution", lambda x, w: F.conv1d(x.mT, w).mT, (X, drawn(4, 4, 1)), None),
    Op("a causal attention", lambda x, t: attention(x, t, t, None, 0.0, True), (X[:, None], drawn(2, 1, 8, 4)), None),
    Op("a shift of the tokens", lambda x, w: (x + x.roll(1, 1)) @ w, (X, SQUARE), None),
    Op("tokens on a grid", lambda x, w: (x.view(2, 2, 4, 4).flip(1).flatten(1, 2) + x) @ w, (X, SQUARE), None),
]


def analysed(gm: fx.GraphModule) -> tuple[fx.Node, list[fx.Node], Tokens | None]:
    (value,) = gm.graph.output_node().all_input_nodes
    closure = [node for node in gm.graph.nodes if node.op == "call_function"]
    return value, closure, find_tokens(value, closure)


def poisoned(value: Tensor, place: Place | None) -> Tensor:
    """Return an input whose other tokens are NaN."""
    if place is None:
        return value
    other = torch.tensor([i not in CHOSEN for i in range(TOKENS)])
    mask = other.repeat_interleave(place.inner).repeat(place.outer)
    shape = [1] * value.ndim
    shape[place.dim] = len(mask)
    return value.masked_fill(mask.view(shape), torch.nan)


def of_tokens(gm: fx.GraphModule, value: fx.Node, closure: list[fx.Node], tokens: Tokens) -> fx.GraphModule:
    """Return the graph that computes the tokens whose indices are its last input."""
    graph = fx.Graph()
    env = {node: graph.node_copy(node) for node in gm.graph.find_nodes(op="placeholder")}
    rows = graph.placeholder("rows")
    with value.meta["val"].fake_mode:
        rows.meta["val"] = torch.arange(len(CHOSEN))
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    writer = RowWriter(graph, env, position, position[value], rows, len(CHOSEN))
    graph.output((writer.write(value, closure, tokens),))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize("op", OPS, ids=operator.attrgetter("name"))
def test_ops(op: Op) -> None:
    gm = traced(lambda *inputs: (op.function(*inputs),), op.inputs)
    value, closure, tokens = analysed(gm)
    if op.gathered is None:
        assert tokens is None
        return
    assert tokens is not None and tokens.size == TOKENS
    inputs = gm.graph.find_nodes(op="placeholder")
    places = [tokens.places.get(node) for node in inputs]
    assert sum(place is not None for place in places) == op.gathered
    rows = torch.tensor(CHOSEN)
    part = of_tokens(gm, value, closure, tokens)
    (found,) = part(*map(poisoned, op.inputs, places), rows)
    torch.testing.assert_close(found, gm(*op.inputs)[0].index_select(tokens.dim, rows))
    used = [node for node in part.graph.nodes if node.op == "call_function"]
    assert all(node.meta["val"].shape == shape for node, shape in shapes_of(part, op.inputs, rows) if node in used)


def shapes_of(gm: fx.GraphModule, inputs: tuple[Tensor, ...], rows: Tensor) -> list[tuple[fx.Node, torch.Size]]:
    """Return the tensors of a graph with the shapes that they have when it runs."""
    found = []

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                found.append((n, result.shape))
            return result

    Shapes(gm).run(*inputs, rows)
    return found


def test_only_tokens_are_projected() -> None:
    """Each product of the tokens has their number of rows, and those of the condition are computed as a whole."""
    gm = traced(lambda *inputs: (cross(*inputs),), (X, TEXT, SQUARE))
    value, closure, tokens = analysed(gm)
    assert tokens is not None
    part = of_tokens(gm, value, closure, tokens)
    sizes = [node.meta["val"].shape for node in part.graph.nodes if node.target in (aten.mm.default, attention)]
    assert sizes == [(6, 4), (6, 4), (6, 4), (2, 2, 3, 2), (6, 4)]  # 2 samples of 3 tokens: of the image, of the text


def test_without_products_all_tokens_are_computed() -> None:
    """What takes no product is computed as a whole, if its input is not also needed token by token."""
    gm = traced(lambda x, w: (x.cumsum(1) @ w,), (X, SQUARE))
    value, closure, tokens = analysed(gm)
    assert tokens is not None and [node.target for node in tokens.tables] == [aten.cumsum.default]
    (found,) = of_tokens(gm, value, closure, tokens)(X, SQUARE, torch.tensor(CHOSEN))
    torch.testing.assert_close(found, (X.cumsum(1) @ SQUARE)[:, list(CHOSEN)])


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((2, 8, 4), 1), ((8, 4), 0), ((2, 3, 8, 4), 2), ((2, 8, 3, 4), 1), ((2, 1, 4), None), ((4,), None)],
)
def test_the_dimension_of_tokens(shape: tuple[int, ...], dim: int | None) -> None:
    assert token_dim(torch.empty(shape)) == dim
