"""Inputs of graphs, and parts of a graph as graphs of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from dit_rewrite.passes.analysis.graph import attribute


def add_input(graph: fx.Graph, name: str) -> fx.Node:
    """Add an input. fx numbers its name if the name exists."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def subgraph(
    gm: fx.GraphModule,
    inputs: Iterable[fx.Node],
    given: Iterable[fx.Node],
    needed: Collection[fx.Node],
    returned: Iterable[fx.Node] | None = None,
) -> fx.GraphModule:
    """Return a graph of the `needed` nodes in order, with the `given` nodes as additional inputs.

    It returns the nodes `returned`, or the outputs of `gm` if that is None. Nodes keep their names.
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
    results = gm.graph.output_node().args[0] if returned is None else tuple(returned)
    graph.output(fx.map_arg(results, lambda n: env[n]))
    return fx.GraphModule(attributes, graph)
