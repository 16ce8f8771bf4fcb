"""Hoist trajectory-invariant values: compute them once per trajectory, in a separate graph. Lossless.

The rest of the graph takes them as its last inputs. A call reuses them as long as its conditioning and the weights are
the same, unmodified tensors (`runtime.cache.Memoized`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import ancestors, attribute
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_values
from dit_rewrite.passes.capture import module_paths


@dataclass(frozen=True)
class Hoisted:
    """The hoisted part of a graph. ``prologue`` takes the inputs at the positions ``inputs`` and returns ``values``.

    ``paths`` are the paths of the modules that the values were traced in. To compute the values takes ``flops``
    floating-point operations, to store them ``bytes``.
    """

    prologue: fx.GraphModule
    inputs: tuple[int, ...]
    values: tuple[str, ...]
    paths: tuple[str, ...]
    flops: int
    bytes: int


def hoist(gm: fx.GraphModule, invariant_inputs: Iterable[int]) -> tuple[fx.GraphModule, Hoisted] | None:
    """Split a graph into a prologue and a rest, which takes the hoisted values as its last inputs.

    `invariant_inputs` are the positions of weights and conditioning. Returns None if no value is worth hoisting. Does
    not modify `gm`. Nodes keep their names.
    """
    values = invariant_values(gm.graph, invariant_inputs)
    if not values:
        return None
    needed = ancestors(values)
    placeholders = gm.graph.find_nodes(op="placeholder")
    taken = [i for i, node in enumerate(placeholders) if node in needed or not hasattr(node.meta.get("val"), "dtype")]
    prologue = _graph(gm, [placeholders[i] for i in taken], (), needed, values)
    ends = [node for node in gm.graph.nodes if not node.users or node.is_impure()]  # guards measure some of them
    rest = _graph(gm, placeholders, values, ancestors(ends, values), None)
    paths = tuple(dict.fromkeys(module_paths.module_path(node) or node.name for node in values))
    size = sum(cost.stored_bytes(node) for node in values)
    flops = cost.flops(node for node in needed if node.op == "call_function")
    return rest, Hoisted(prologue, tuple(taken), tuple(node.name for node in values), paths, flops, size)


def _graph(
    gm: fx.GraphModule,
    inputs: Iterable[fx.Node],
    given: Iterable[fx.Node],
    needed: set[fx.Node],
    returned: tuple[fx.Node, ...] | None,
) -> fx.GraphModule:
    """Return a graph of the `needed` nodes in order, with the `given` nodes as additional inputs.

    It returns the nodes `returned`, or the outputs of `gm` if that is None.
    """
    graph = fx.Graph()
    env = {node: graph.node_copy(node) for node in inputs}
    for node in given:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    attributes = {}
    for node in gm.graph.nodes:
        if node in needed and node not in env and node.op != "output":
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.op == "get_attr":
                attributes[str(node.target)] = attribute(gm, node)
    results = gm.graph.output_node().args[0] if returned is None else returned
    graph.output(fx.map_arg(results, lambda n: env[n]))
    return fx.GraphModule(attributes, graph)
