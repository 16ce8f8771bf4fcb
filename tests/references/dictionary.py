"""An interpreter of captured graphs that looks up the values of some nodes. It does not use the rewrites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

Recall = Callable[[Mapping[str, Any]], Tensor]  # computes a node's value from the values of earlier nodes


class Dictionary(fx.Interpreter):
    """Runs a graph, but takes the values of the nodes in `kept` from functions of the earlier values.

    `halves` are nodes that are computed for one half of the batch: they get this half of each operand that is not in
    `halves`, repeated. Weights, the inputs at the positions `static`, have no samples.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        kept: Mapping[str, Recall],
        halves: Sequence[tuple[Collection[str], int]] = (),
        static: Collection[int] = (),
    ) -> None:
        super().__init__(gm)
        self.kept, self.halves = kept, halves
        self.seen: dict[str, Any] = {}
        self.weights = {n for i, n in enumerate(gm.graph.find_nodes(op="placeholder")) if i in static}
        for node in gm.graph.nodes:
            if node.op != "placeholder" and self.weights.issuperset(node.all_input_nodes):
                self.weights.add(node)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        return fx.map_arg(args, lambda node: self._given(node, n))

    def _given(self, node: fx.Node, reader: fx.Node) -> Any:
        value = self.env[node]
        for names, half in self.halves:
            if reader.name in names and node.name not in names and node not in self.weights:
                value = both(value, half)
        return value

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.kept:
            self.seen[n.name] = super().run_node(n)
            return self.seen[n.name]
        value: Any = self.kept[n.name](self.seen)
        for names, half in self.halves:
            value = both(value, half) if n.name in names else value
        self.seen[n.name] = value
        return value


def both(value: Any, half: int) -> Any:
    """Repeat one half of the samples in place of both, with the memory order of the value."""

    def repeated(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor).copy_(torch.cat([tensor.chunk(2)[half]] * 2))

    return tree_map_only(Tensor, repeated, value)
