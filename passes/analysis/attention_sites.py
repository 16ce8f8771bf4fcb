"""Sites inside attention: the core that a strategy replaces, and the state that its slot stores for that."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.graph import aten, operands, packet
from dit_rewrite.passes.analysis.site import Kind, Part, Site
from dit_rewrite.passes.capture import opaque_attention

_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def arguments(core: fx.Node) -> dict[str, Any]:
    """Return the arguments of an attention op by name, defaults included."""
    return {**_DEFAULTS, **dict(zip(_POSITIONAL, core.args, strict=False)), **core.kwargs}


def cores(nodes: dict[str, fx.Node], site: Site) -> list[fx.Node]:
    """Return the attention ops in the closure of `site`."""
    return [nodes[name] for name in site.closure if nodes[name].target is opaque_attention.OP]


def find_cores(gm: fx.GraphModule, sites: Sequence[Site]) -> tuple[list[Site], list[Refusal]]:
    """Return a CORE site and, inside it, a CORE_STATE site for each attention among `sites`, and the refusals."""
    nodes = {node.name: node for node in gm.graph.nodes}
    found, refused = list[Site](), list[Refusal]()
    for site in sites:
        if site.kind is Kind.MLP:
            continue
        inside = cores(nodes, site)
        reason = _refusal(inside)
        if reason is not None:
            refused.append(Refusal(site.values[0], site.name, reason))
            continue
        for part in (Part.CORE, Part.CORE_STATE):
            found.append(_core(site, inside[0], part))
    return found, refused


def find_shared(sites: Sequence[Site]) -> list[Site]:
    """Return a CFG_SHARED site, which may be computed for half of a guided batch, for each attention among `sites`."""
    attention = (site for site in sites if site.kind is not Kind.MLP)
    return [replace(s, name=f"{s.name}.{Part.CFG_SHARED}", part=Part.CFG_SHARED, sums=(), probes=()) for s in attention]


def find_tiled(sites: Sequence[Site]) -> list[Site]:
    """Return a TILES site, of which some tokens may be computed, for each branch among `sites`."""
    return [replace(s, name=f"{s.name}.{Part.TILES}", part=Part.TILES, sums=(), probes=()) for s in sites]


def _refusal(inside: Sequence[fx.Node]) -> RefusalReason | None:
    """Return the reason why no strategy can replace the attention ops of a site, or None."""
    if len(inside) != 1:
        return RefusalReason.NO_CORE
    given = arguments(inside[0])
    return RefusalReason.CAUSAL if given["is_causal"] or given["enable_gqa"] or given["dropout_p"] else None


def _core(site: Site, core: fx.Node, part: Part) -> Site:
    given = arguments(core)
    read = (given[name] for name in ("query", "key", "value", "attn_mask"))
    inputs = tuple(node.name for node in read if isinstance(node, fx.Node))
    name = f"{site.name}.{part}"
    return replace(site, name=name, values=(core.name,), part=part, inputs=inputs, sums=(), entropy=None, probes=())


def is_of_one_sequence(core: fx.Node) -> bool:
    """Return whether queries and keys have equal shapes, which suggests that they come from the same tokens."""
    query, key = (cost.shape(node.meta["val"]) for node in operands(core)[:2])
    return query == key


def text_tokens(core: fx.Node, image: int) -> tuple[int, bool]:
    """Return how many tokens an attention has besides the `image` image tokens, and whether they come last.

    Looks for the nearest cat before the values that concatenates the image tokens and others along the token dimension.
    Returns (0, False) if there is none.
    """
    total = cost.shape(operands(core)[2].meta["val"])[2]
    for dim, parts in concatenations(operands(core)[2]):
        sizes = [cost.shape(part.meta["val"])[dim] for part in parts]
        if len(sizes) == 2 and dim != 0 and sum(sizes) == total and (sizes[0] == image) != (sizes[1] == image):
            return (sizes[1], True) if sizes[0] == image else (sizes[0], False)
    return 0, False


def concatenations(node: fx.Node) -> Iterator[tuple[int, list[fx.Node]]]:
    """Yield the dimension and the parts of each cat that `node` depends on, nearest first, up to other attentions."""
    waiting, seen = deque([node]), set[fx.Node]()
    while waiting:
        node = waiting.popleft()
        if node in seen or node.target is opaque_attention.OP:
            continue
        seen.add(node)
        waiting.extend(node.all_input_nodes)
        if packet(node) is aten.cat:
            parts: Any = node.args[0]
            dim: Any = node.args[1] if len(node.args) > 1 else 0
            yield dim % node.meta["val"].ndim, list(parts)
