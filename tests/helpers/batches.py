"""Functions of a batch of samples, one for each rule, labelled by whether they mix samples, and random ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dit_rewrite.kernels import window_attention  # noqa: F401  registers the ops of a window
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.rewrite.batch import Batch
from dit_rewrite.passes.rewrite.half_batch import halve

BATCH = 2
HALVES: tuple[Literal[0, 1], ...] = (0, 1)
aten, ours = torch.ops.aten, torch.ops.dit_rewrite


def drawn(*shape: int) -> Tensor:
    """Return deterministic numbers that look random. A generator would have a state that graphs must update."""
    count = math.prod(shape)
    return torch.arange(1, count + 1, dtype=torch.float64).square().mul(0.7 + count % 5).sin().view(shape)


def traced(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Return the functional ATen graph of a function."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return make_fx(function)(*map(mode.from_tensor, inputs))


class Recorded(fx.Interpreter):
    """Runs a graph and records the value of every node."""

    def __init__(self, gm: fx.GraphModule, *inputs: Tensor) -> None:
        super().__init__(gm)
        self.seen: dict[fx.Node, Any] = {}
        self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def part(value: Any, half: int) -> Any:
    """Return half of a tensor's rows."""
    return value.chunk(2)[half]


def spoilt(value: Any, label: Batch, half: int) -> Any:
    """Return an input whose other half is invalid: NaN, or other Booleans or integers."""
    if isinstance(value, (tuple, list)):
        return type(value)(spoilt(v, label, half) for v in value)
    if label is not Batch.LEADING or not isinstance(value, Tensor):
        return value
    value = value.clone()
    other = part(value, 1 - half)
    other.copy_(torch.full_like(other, torch.nan) if value.is_floating_point() else ~other)
    return value


def check(body: fx.GraphModule, labels: Sequence[Batch], inputs: Sequence[Any], batch: int = BATCH) -> None:
    """Compare both halves with the whole batch."""
    whole = body(*inputs)
    assert all(bool(result.isfinite().all()) for result in whole)
    for half in HALVES:
        halved = halve(body, labels, batch, half)
        assert halved is not None
        results = halved(*(spoilt(x, label, half) for x, label in zip(inputs, labels, strict=True)))
        assert len(results) == len(whole)
        for result, expected in zip(results, whole, strict=True):
            torch.testing.assert_close(result, torch.cat([part(expected, half)] * 2))
        assert_same_inputs(halved, body)


def assert_same_inputs(halved: fx.GraphModule, body: fx.GraphModule) -> None:
    """Assert that both graphs have the same inputs: names, order and meta."""
    pairs = zip(halved.graph.find_nodes(op="placeholder"), body.graph.find_nodes(op="placeholder"), strict=True)
    assert all((a.name, a.target, a.meta) == (b.name, b.target, b.meta) for a, b in pairs)


@dataclass(frozen=True)
class Op:
    """A function of two samples, its inputs, and whether it mixes the samples."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    mixes: bool


def leads(name: str, function: Callable[..., Any], *inputs: Tensor) -> Op:
    return Op(name, function, inputs, mixes=False)


def mixes(name: str, function: Callable[..., Any], *inputs: Tensor) -> Op:
    return Op(name, function, inputs, mixes=True)


X, Y, TABLE, SQUARE, VECTOR = drawn(2, 4, 6), drawn(2, 3, 6), drawn(1, 4, 6), drawn(6, 6), drawn(6)
IMAGE, HEADS, PAIR = drawn(2, 4, 8, 8), drawn(2, 3, 4, 6), drawn(2)

OPS = [
    # element by element
    leads("a table of one row", lambda x, t: x + t, X, TABLE),
    leads("a table of lower rank", lambda x, t: x * t, X, drawn(4, 6)),
    leads("a signal", lambda x, s: x * s[:, None, None], X, PAIR),
    leads("a choice", lambda x, t: torch.where(x > 0, x, t), X, TABLE),
    mixes("a signal broadcast over other dims", lambda x, s: x + s, drawn(2, 4, 2), PAIR),
    mixes("rows of two shapes", lambda x, s: x[:, 0] * s.view(1, 2), drawn(2, 4, 2), PAIR),
    leads("by numbers", lambda x: torch.sigmoid(2 * x - 1) ** 2, X),
    leads("a cast", lambda x: x.float().double(), X),
    leads("overwritten in part", lambda x: aten.slice_scatter(torch.zeros_like(x), x[..., :3], 2, 0, 6, 2), X),
    # views
    leads("heads", lambda x: x.view(2, 4, 2, 3).transpose(1, 2).reshape(4, 4, 3), X),
    leads("frames into the batch", lambda x: x.view(2, 2, 2, 6).reshape(4, 2, 6), X),
    leads("space into the batch", lambda x: x.view(2, 2, 2, 6).transpose(1, 2).reshape(4, 2, 6), X),
    leads("and out of it", lambda x: x.reshape(8, 6).view(2, 24).flatten(), X),
    mixes("the batch split", lambda x: x.reshape(3, 16).sum(1), X),
    mixes("a dim before the batch", lambda x: x[None].expand(2, 2, 4, 6).reshape(4, 4, 6), X),
    mixes("the batch moved", lambda x: x.transpose(0, 1), X),
    mixes("and merged", lambda x: x.transpose(0, 1).reshape(8, 6), X),
    mixes("permuted", lambda x: x.permute(2, 0, 1), X),
    leads("permuted behind it", lambda x: x.permute(0, -1, 1), X),
    mixes("a matrix turned", lambda x: x[:, 0].t().contiguous(), X),
    leads("expanded behind it", lambda x: x[:, None].expand(2, 3, 4, 6), X),
    leads("a dim dropped", lambda x: x[:, :1].squeeze(1), X),
    # reductions, norms
    leads("softmax", lambda x: x.softmax(-1), X),
    mixes("softmax over the batch", lambda x: x.softmax(0), X),
    leads("means", lambda x: x.mean((1, 2)), X),
    mixes("means over the batch", lambda x: x - x.mean(0), X),
    mixes("a mean of all", lambda x: x / x.mean(), X),
    mixes("a batch norm", lambda x: (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), keepdim=True), X),
    leads("layer norm", lambda x, w: F.layer_norm(x, (6,), w, w), X, VECTOR),
    mixes("layer norm over the batch", lambda x: F.layer_norm(x, (2, 4, 6)), X),
    leads("group norm", lambda x: F.group_norm(x, 2), IMAGE),
    leads("root mean square", lambda x: x * x.pow(2).mean(-1, keepdim=True).rsqrt(), X),
    leads("sums so far", lambda x: x.cumsum(1), X),
    # parts
    leads("joined", lambda x, y: torch.cat([x, y], 1), X, Y),
    mixes("joined with another batch", lambda x, y: torch.cat([x, y]), X, TABLE),
    mixes("joined along the batch", lambda x: torch.cat([x, x + 1]), X),
    leads("stacked behind", lambda x: torch.stack([x, -x], -1), X),
    leads("stacked, then split", lambda x: torch.stack(x.chunk(2, -1), 1)[:, 1], X),
    mixes("rolled", lambda x: torch.roll(x, 1, 0).mean(1) + x.mean(1), X),
    leads("rolled behind", lambda x: torch.roll(x, 1, 1), X),
    mixes("turned round", lambda x: x.flip(0) + x, X),
    leads("all rows sliced out", lambda x: aten.slice.Tensor(x, 0, 0, 9), X),
    leads("sliced behind", lambda x: x[:, 1:3, ::2], X),
    leads("indexed behind", lambda x: x.index_select(1, torch.tensor([3, 0])), X),
    leads("padded behind", lambda x: F.pad(x, (1, 2)), X),
    # products
    leads("projected", lambda x, w, b: F.linear(x, w, b), X, SQUARE, VECTOR),
    leads("a matrix product", lambda x, w: x[:, 0] @ w, X, SQUARE),
    mixes("projected along the batch", lambda x, w: w @ x[:, 0], X, drawn(2, 2)),
    mixes("the batch as weight", lambda x, w: w @ x[:, 0], X, drawn(4, 2)),
    leads("by batches", lambda x, y: x @ y.transpose(1, 2), X, Y),
    leads("by batches with a weight expanded", lambda x, w: torch.bmm(x, w[None].expand(2, 6, 6)), X, SQUARE),
    leads("a convolution", lambda x, w: F.conv2d(x, w), IMAGE, drawn(5, 4, 2, 2)),
    mixes("the batch as filter", lambda x, w: F.conv2d(w, x), IMAGE, drawn(1, 4, 9, 9)),
    leads("looked up", lambda i, w: F.embedding((i > 0).long(), w), X, SQUARE),
    # attention
    leads("attention", lambda q: opaque_attention.OP(q, q, q), HEADS),
    leads("attention with a mask", lambda q, m: opaque_attention.OP(q, q, q, m[:, None, None]), HEADS, drawn(2, 4)),
    leads("attention with a table", lambda q, m: opaque_attention.OP(q, q, q, m), HEADS, drawn(4, 4)),
    mixes("the batch as tokens", lambda q: opaque_attention.OP(q[:, 0, 0], q[:, 0, 0], q[:, 0, 0]), HEADS),
    leads("a window refreshed", lambda q: ours.window_refresh(q, q, q, [1])[1], HEADS),
    leads("a window reused", lambda q: ours.window_reuse(q, q, q, 2 * q, [1]), HEADS),
]  # fmt: skip


# steps of random functions; each takes tokens (2 * f, n, d), and some mix the samples
STEPS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.transpose(0, 1),
    lambda x: x.transpose(1, 2),
    lambda x: x.reshape(x.shape[0] * 2, -1, x.shape[2]) if x.shape[1] % 2 == 0 else x,
    lambda x: x.reshape(x.shape[0] // 2, -1, x.shape[2]) if x.shape[0] % 2 == 0 else x,
    lambda x: x.reshape(-1, *x.shape[:2]),
    lambda x: torch.cat([x, 2 * x], 1),
    lambda x: torch.cat([x, 2 * x]),
    lambda x: torch.stack(x.split(1, 2), 1).flatten(2).contiguous(),
    lambda x: x + drawn(1, *x.shape[1:]),
    lambda x: x * drawn(*x.shape[1:]),
    lambda x: x + drawn(x.shape[1], 1).expand(*x.shape),
    lambda x: x @ drawn(x.shape[2], 4),
    lambda x: x @ x.transpose(1, 2),
    lambda x: x.softmax(1) + x.softmax(-1),
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: x - x.mean(0, keepdim=True),
    lambda x: x.roll(1, 0),
    lambda x: x[:, :2].flip(1),
    lambda x: opaque_attention.OP(x[:, None], x[:, None], x[:, None])[:, 0],
    lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: x.flatten(1)[:, None],
    lambda x: torch.where(x > 0, x, x.cumsum(2)),
)


def chained(seed: int, length: int = 4) -> Callable[[Tensor], Tensor]:
    """Return a composition of some of the steps."""
    steps = random.Random(seed).choices(STEPS, k=length)

    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x.contiguous()

    return function
