"""Hoist trajectory-invariant values: compute them once per trajectory, in a separate graph. Lossless.

The rest of the graph takes them as its last inputs. A call reuses them as long as its conditioning and the weights are
the same, unmodified tensors (`runtime.cache.Memoized`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import ancestors
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_values
from dit_rewrite.passes.capture import module_paths
from dit_rewrite.passes.rewrite.subgraph import subgraph


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
    prologue = subgraph(gm, [placeholders[i] for i in taken], (), needed, values)
    ends = [node for node in gm.graph.nodes if not node.users or node.is_impure()]  # guards measure some of them
    rest = subgraph(gm, placeholders, values, ancestors(ends, values))
    paths = tuple(dict.fromkeys(module_paths.module_path(node) or node.name for node in values))
    size = sum(cost.stored_bytes(node) for node in values)
    flops = cost.flops(node for node in needed if node.op == "call_function")
    return rest, Hoisted(prologue, tuple(taken), tuple(node.name for node in values), paths, flops, size)
