"""Tap tensors of a graph: reduce each one where it is made, against the same tensor of earlier steps.

The tensors of earlier steps are inputs of the new graph, and those of this step are outputs, so that nothing else has
to be stored. For statistics the graph returns the few moments of each comparison, in one small tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.passes.rewrite.codec import inline

MOMENTS = ("distance", "spread", "size", "product", "square", "reference_square")
LENT = 0  # the distance of a comparison with the same step of another stream

Derive = Callable[..., Tensor]
Axis = tuple[int, int, int]  # dimension, start, length


@dataclass(frozen=True)
class Cut:
    """A part of a tapped tensor: a range of indices along some dimensions. No axes means the whole tensor.

    ``against``: the axes of the part of the same tensor that this part is compared with, instead of with an earlier
    step.
    """

    axes: tuple[Axis, ...] = ()
    against: tuple[Axis, ...] | None = None


@dataclass(frozen=True)
class Tap:
    """A tensor to reduce: the result of `derive` on the nodes called ``read``; without it, the only one of these.

    ``heads``: the dimension of the attention heads. Each cut then has a comparison for all heads together, followed by
    one for each head.
    """

    read: tuple[str, ...]
    cuts: tuple[Cut, ...] = (Cut(),)
    derive: Derive | None = None
    heads: int | None = None


@dataclass(frozen=True)
class TappedGraph:
    """A graph with taps. Inputs: those of the graph, then for each tap the tensor at each of ``distances``.

    Outputs: those of the graph, then the moments (a row per comparison, in the order of `comparisons`), then the tensor
    of each tap.
    """

    gm: fx.GraphModule
    taps: tuple[Tap, ...]
    distances: tuple[int, ...]
    examples: tuple[Tensor, ...]

    def comparisons(self, tap: int) -> list[tuple[int, int | None, int]]:
        """Return the cut, the head (None for all heads together) and the distance of each comparison of a tap.

        The distance is that in steps, or `LENT` for two streams or two parts of one tensor.
        """
        each, found = self.taps[tap], []
        heads = [] if each.heads is None else list(range(self.examples[tap].shape[each.heads]))
        for i, cut in enumerate(each.cuts):
            for distance in self.distances if cut.against is None else (LENT,):
                found += [(i, head, distance) for head in (None, *heads)]
        return found


def insert_taps(gm: fx.GraphModule, taps: Sequence[Tap], distances: Sequence[int]) -> TappedGraph:
    """Return a copy of a captured graph with taps. It has as many comparisons as `TappedGraph.comparisons` says.

    `distances` are numbers of steps, and `LENT` if the graph also takes the tensors of another stream.
    """
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    place = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    nodes = {node.name: node for node in gm.graph.nodes}
    waiting: dict[str, list[int]] = {}
    for i, tap in enumerate(taps):
        waiting.setdefault(max(tap.read, key=place.__getitem__), []).append(i)
    for node in gm.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
    examples = [_example(tap, [nodes[name] for name in tap.read]) for tap in taps]
    past = [_inputs(graph, i, example, distances) for i, example in enumerate(examples)]
    tapped, moments = dict[int, fx.Node](), dict[int, fx.Node]()
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, env.__getitem__)
        for i in waiting.get(node.name, ()):
            read = [env[nodes[name]] for name in taps[i].read]
            tapped[i], moments[i] = _reduce(graph, taps[i], read, past[i], place[node.name])
    results: Any = gm.graph.output_node().args[0]
    outputs = fx.node.map_arg(results, env.__getitem__)
    numbers = _joined(graph, [moments[i] for i in range(len(taps))])
    graph.output((*outputs, *numbers, *(tapped[i] for i in range(len(taps)))))
    return TappedGraph(fx.GraphModule(gm, graph), tuple(taps), tuple(distances), tuple(examples))


def _example(tap: Tap, read: Sequence[fx.Node]) -> Tensor:
    """Return a fake tensor like the one that is tapped."""
    values = [node.meta["val"] for node in read]
    example: Tensor = values[0] if tap.derive is None else tap.derive(*values)
    return example


def _inputs(graph: fx.Graph, tap: int, example: Tensor, distances: Sequence[int]) -> list[fx.Node]:
    """Add the inputs for the tensors of earlier steps."""
    inputs = []
    for distance in distances:
        node = graph.placeholder(f"tap{tap}_{'lent' if distance == LENT else f'before{distance}'}")
        # a tensor of its own, because tracing takes two inputs with one fake tensor for the same input
        node.meta = {"val": example.new_empty_strided(example.shape, example.stride())}
        inputs.append(node)
    return inputs


def _reduce(
    graph: fx.Graph, tap: Tap, read: Sequence[fx.Node], past: Sequence[fx.Node], position: int
) -> tuple[fx.Node, fx.Node]:
    """Append the tapped tensor and its moments."""
    (node,) = read if tap.derive is None else inline(graph, lambda *a: (tap.derive(*a),), read, position, position)  # type: ignore[misc]
    (found,) = inline(graph, lambda *a: (_compare(tap, *a),), [node, *past], position, position)
    return node, found


def _compare(tap: Tap, value: Tensor, *past: Tensor) -> Tensor:
    rows = []
    for cut in tap.cuts:
        part = _cut(value, cut.axes)
        others = [_cut(before, cut.axes) for before in past] if cut.against is None else [_cut(value, cut.against)]
        rows += [_moments(part, other, heads) for other in others for heads in _dimensions(tap)]
    return torch.cat(rows)


def _dimensions(tap: Tap) -> list[int | None]:
    return [None] if tap.heads is None else [None, tap.heads]


def _cut(value: Tensor, axes: Sequence[Axis]) -> Tensor:
    for dim, start, length in axes:
        value = value.narrow(dim, start, length)
    return value


def _moments(value: Tensor, reference: Tensor, heads: int | None) -> Tensor:
    """Return the `MOMENTS` of two tensors in float32 (float64 for float64), a row for each head.

    The mean of |x - y|, the variance of |x - y| among the elements, and the means of |y|, x y, x² and y².
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    x, y = value.to(wide), reference.to(wide)
    mean = partial(torch.mean, dim=[d for d in range(x.ndim) if d != heads])
    apart = (x - y).abs()
    distance = mean(apart)
    shape = [1] * x.ndim
    if heads is not None:
        shape[heads] = x.shape[heads]
    spread = mean((apart - distance.reshape(shape)).square())
    found = [distance, spread, mean(y.abs()), mean(x * y), mean(x.square()), mean(y.square())]
    return torch.stack(found, dim=-1).reshape(-1, len(MOMENTS)).double()


def _joined(graph: fx.Graph, moments: list[fx.Node]) -> list[fx.Node]:
    """Append one tensor with all rows; a graph without taps has none."""
    if not moments:
        return []
    return inline(graph, lambda *rows: (torch.cat(rows),), moments, 0, 0)
