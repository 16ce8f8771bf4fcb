"""The output site, whose values are the outputs of the graph. If it is reused, no op of the model runs.

The delta site stores the difference between the two halves of classifier-free guidance. If it is reused, one half runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.site import Kind, Part, Site


def find_latent(graph: fx.Graph, invariant: Collection[int]) -> fx.Node | None:
    """Return the largest floating-point input that changes from step to step, or None.

    `invariant` are the positions of trajectory-invariant inputs.
    """
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    moving = [node for i, node in inputs if i not in invariant and _is_floating(node) and node.meta["val"].ndim]
    return max(moving, key=lambda node: math.prod(cost.shape(node.meta["val"])), default=None)


def find_output(gm: fx.GraphModule, invariant: Collection[int], less_latent: bool) -> tuple[list[Site], list[Refusal]]:
    """Return the output site of a graph (none if it computes no output), and the refusals.

    With `less_latent`, the slot stores output minus latent. `invariant` are the positions of trajectory-invariant
    inputs.
    """
    name = "output-latent" if less_latent else "output"
    results = dict.fromkeys(gm.graph.output_node().all_input_nodes)
    values = [node for node in results if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)]
    if not values:
        return [], []
    base = find_latent(gm.graph, invariant) if less_latent else None
    if less_latent and (base is None or not all(_alike(value, base) for value in values)):
        return [], [Refusal(values[0].name, name, RefusalReason.NO_LATENT)]
    bases = (base.name,) * len(values) if base is not None else ()
    names = tuple(node.name for node in values)
    return [Site(name, Kind.SPAN, names, (), "", 0, part=Part.OUTPUT, bases=bases)], []


def find_delta(gm: fx.GraphModule) -> tuple[list[Site], list[Refusal]]:
    """Return the site whose slot stores the difference between the two halves of guidance in the output."""
    sites, refused = find_output(gm, (), less_latent=False)
    return [replace(site, name="output.delta", part=Part.DELTA) for site in sites], refused


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _alike(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)
