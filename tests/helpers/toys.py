"""Toy denoisers for the structures that rewriting must handle, and a short trajectory of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.tracing import WIDTH, Attention, Toy, Traced, heads, linear, merged, mlp, norm, tokens, trace
from tests.references.oracle import Rewritten

STEPS = 5


@dataclass(frozen=True)
class Example:
    """A toy, its number of sites, and how many inputs each call takes. It is traced once per process."""

    name: str
    build: Callable[[], Toy]
    sites: int
    inputs: int = 1

    def traced(self, dynamic: bool = False) -> Traced:
        """Return its graph, called with other inputs at every step."""
        return _traced(self, dynamic)

    def rewritten(self, positions: tuple[int, ...] | None = None, dynamic: bool = False) -> Rewritten:
        """Return its graph with every site guarded, or those at `positions`."""
        return Rewritten.of(self.traced(dynamic), positions)


@cache
def _traced(example: Example, dynamic: bool) -> Traced:
    calls = [tuple(tokens(10 * step + i) for i in range(example.inputs)) for step in range(STEPS)]
    return trace(example.build(), *calls, dynamic=dynamic)


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled, shifted and gated by a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.ff = norm(), Attention(), mlp()
        self.modulate = linear(outer=6 * WIDTH)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(F.silu(signal)).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.ff(self.norm(x) * (1 + scale2) + shift2)


def blocks() -> Toy:
    def body(m: Toy, x: Tensor, signal: Tensor) -> Tensor:
        for block in m.blocks:
            x = block(x, signal)
        return m.head(x)

    return Toy(body, blocks=nn.ModuleList([Block(), Block()]), head=linear())


def nested() -> Toy:
    def body(m: Toy, x: Tensor) -> Tensor:
        a = m.one(x)
        b = m.two(a)
        return x + m.norm(a + m.norm(b + m.three(b)))

    return Toy(body, one=linear(), two=linear(), three=linear(), norm=norm())


def siblings() -> Toy:
    """Two branches side by side within a third, and a fourth after it."""

    def body(m: Toy, x: Tensor) -> Tensor:
        y = m.enter(x)
        y = y + m.attn(m.norm(y))
        x = x + m.leave(y + m.ff(m.norm(y)))
        return x + m.last(x)

    return Toy(body, enter=linear(), leave=linear(), attn=Attention(), ff=mlp(), last=mlp(), norm=norm())


def joint() -> Toy:
    """Two layers of joint attention and an MLP per stream; the second layer drops its text."""

    def attend(m: Toy, layer: int, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, o, text_q, text_k, text_v, text_o = m.projections[8 * layer : 8 * layer + 8]
        queries, keys, values = (
            heads(torch.cat([a(x), b(text)], 1)) for a, b in ((q, text_q), (k, text_k), (v, text_v))
        )
        out = merged(F.scaled_dot_product_attention(queries, keys, values))
        return o(out[:, :4]), text_o(out[:, 4:])

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        image, words = attend(m, 0, m.norm(x), m.norm(text))
        x, text = x + m.gate * image, text + words
        x, text = x + m.ff(x), text + m.text_ff(text)
        x = x + attend(m, 1, m.norm(x), m.norm(text))[0]
        return x + m.gate * m.last(x)

    projections = nn.ModuleList(linear() for _ in range(16))
    parts = {"ff": mlp(), "text_ff": mlp(), "last": mlp(), "norm": norm(), "gate": tokens(9, WIDTH)}
    return Toy(body, projections=projections, **parts)


def halves() -> Toy:
    """One MLP over two joined streams, whose output is split again."""

    def body(m: Toy, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        y = m.ff(m.norm(torch.cat([text, x], dim=1)))
        x, text = x + y[:, 4:], text + y[:, :4]
        return x + m.last(x), text

    return Toy(body, ff=mlp(), last=mlp(), norm=norm())


def around_a_joint() -> Toy:
    """A joint site inside a branch of a third stream."""

    def body(m: Toy, x: Tensor) -> Tensor:
        a, b = m.enter(x).chunk(2, dim=-1)
        y = m.ff(torch.cat([a, b], dim=1))
        return x + m.norm((a + y[:, 4:]) * (b + y[:, :4]))

    return Toy(body, enter=linear(outer=2 * WIDTH), ff=mlp(), norm=norm())


def constant() -> Toy:
    """A tensor made in the forward, an attribute of the graph, within a branch."""
    return Toy(lambda m, x: x + m.ff(x * torch.tensor([0.5, 2.0]).repeat(4)), ff=mlp())


BLOCKS = Example("blocks", blocks, sites=4, inputs=2)
NESTED = Example("nested", nested, sites=3)
SIBLINGS = Example("siblings", siblings, sites=4)
JOINT = Example("joint", joint, sites=5, inputs=2)
HALVES = Example("halves", halves, sites=2, inputs=2)
AROUND_A_JOINT = Example("around a joint", around_a_joint, sites=2)
CONSTANT = Example("constant", constant, sites=1)
EXAMPLES = [BLOCKS, NESTED, SIBLINGS, JOINT, HALVES, AROUND_A_JOINT, CONSTANT]
