"""Helpers for tests of passes: toy modules, their capture, and short descriptions of the found sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, fx, nn

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.graph import is_view
from dit_rewrite.passes.analysis.sites import Found, find_sites
from dit_rewrite.passes.capture.capture import Captured, Runner, capture
from dit_rewrite.passes.rewrite.printing import op_name

WIDTH = 8
SHAPE = (2, 4, WIDTH)

Shown = tuple[str, tuple[str, ...]]  # a site's kind, and the op that computes each of its values


class Toy(nn.Module):
    """Modules and parameters by name, and a forward function that gets the toy and the inputs."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


class Attention(nn.Module):
    """Two heads of attention from the tokens to themselves or to a source."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        q, k, v = heads(self.q(x)), heads(self.k(source)), heads(self.v(source))
        return self.out(merged(F.scaled_dot_product_attention(q, k, v)))


def heads(tokens: Tensor) -> Tensor:
    """Split tokens into two heads."""
    return tokens.unflatten(-1, (2, -1)).transpose(1, 2)


def merged(split: Tensor) -> Tensor:
    """Merge the heads."""
    return split.transpose(1, 2).flatten(2)


def linear(inner: int = WIDTH, outer: int = WIDTH, bias: bool = True) -> nn.Linear:
    """A projection."""
    return nn.Linear(inner, outer, bias=bias)


def mlp(inplace: bool = False) -> nn.Sequential:
    """Two projections with an activation between them."""
    return nn.Sequential(linear(outer=2 * WIDTH), nn.ReLU(inplace=inplace), linear(inner=2 * WIDTH))


def norm() -> nn.LayerNorm:
    """A norm over the width."""
    return nn.LayerNorm(WIDTH)


def tokens(seed: int = 0, *shape: int) -> Tensor:
    """Return random tokens."""
    return torch.randn(shape or SHAPE, generator=Generator().manual_seed(seed))


@dataclass
class Traced:
    """A captured graph, the arguments of its calls, its results, and the outputs of the model."""

    captured: Captured
    arguments: list[list[Any]] = field(default_factory=list)
    returned: list[Sequence[Any]] = field(default_factory=list)
    result: Any = None

    @property
    def gm(self) -> fx.GraphModule:
        return self.captured.gm

    @property
    def nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.gm.graph.nodes}

    def sites(self) -> Found:
        """Return the sites of the graph."""
        return find_sites(self.gm, self.captured.static)


def trace(model: Callable[..., Any], *calls: tuple[Any, ...], dynamic: bool = False) -> Traced:
    """Capture a model and call it with each of `calls`. It must be one graph."""
    caught: list[Traced] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def then(captured: Captured) -> Runner:
            traced = Traced(captured)
            caught.append(traced)

            def run(arguments: list[Any]) -> Sequence[Any]:
                traced.arguments.append([a.clone() if isinstance(a, Tensor) else a for a in arguments])
                traced.returned.append(captured.gm(*arguments))
                return traced.returned[-1]

            return run

        return capture(gm, example_inputs, then)

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        results = [compiled(*call) for call in calls]
    (traced,) = caught
    traced.result = results[-1]
    return traced


@dataclass(frozen=True)
class Look:
    """The sites of a model in order, and the refused summands by op."""

    sites: list[Shown]
    refused: list[tuple[str, RefusalReason]] = field(default_factory=list)


def look(model: Callable[..., Any], *inputs: Any) -> Look:
    """Return the sites and refusals of a model."""
    traced = trace(model, inputs)
    found = traced.sites()
    return Look(
        [(str(site.kind), tuple(made_by(traced.nodes[name]) for name in site.values)) for site in found.sites],
        [(made_by(traced.nodes[refusal.node]), refusal.reason) for refusal in found.refused],
    )


def made_by(node: fx.Node) -> str:
    """Return the op that computes a node without its views, or "input"."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return "input" if node.op == "placeholder" else op_name(node).split(".")[-1]
