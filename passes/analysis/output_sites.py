"""The output site, all that a graph returns and computes: reusing it runs nothing of the model.

Its sibling holds how the two sides of the guidance differ: reusing that runs one of them.
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


def find_latent(graph: fx.Graph, known: Collection[int]) -> fx.Node | None:
    """The largest floating-point input that changes from step to step; `known` are the positions of those that do not.

    None where there is none.
    """
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    moving = [node for i, node in inputs if i not in known and _is_floating(node) and node.meta["val"].ndim]
    return max(moving, key=lambda node: math.prod(cost.shape(node.meta["val"])), default=None)


def find_output(gm: fx.GraphModule, known: Collection[int], less_latent: bool) -> tuple[list[Site], list[Refusal]]:
    """The output site of a graph, if it computes any output; `less_latent`: what is held is the change of the latent.

    `known` are the positions of inputs that stay the same from step to step.
    """
    name = "output-latent" if less_latent else "output"
    results = dict.fromkeys(gm.graph.output_node().all_input_nodes)
    values = [node for node in results if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)]
    if not values:
        return [], []
    base = find_latent(gm.graph, known) if less_latent else None
    if less_latent and (base is None or not all(_alike(value, base) for value in values)):
        return [], [Refusal(values[0].name, name, RefusalReason.NO_LATENT)]
    bases = (base.name,) * len(values) if base is not None else ()
    names = tuple(node.name for node in values)
    return [Site(name, Kind.SPAN, names, (), "", 0, part=Part.OUTPUT, bases=bases)], []


def find_delta(gm: fx.GraphModule) -> tuple[list[Site], list[Refusal]]:
    """The site of what a graph returns as the difference between the two sides of the guidance."""
    sites, refused = find_output(gm, (), less_latent=False)
    return [replace(site, name="output.delta", part=Part.DELTA) for site in sites], refused


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _alike(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)
