"""What a site is: a place of the graph whose values may be reused together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import fx

from dit_rewrite.passes import cost
from dit_rewrite.passes.branches import Refusal
from dit_rewrite.passes.graph import closures


class Kind(str, Enum):
    """What a branch is, by the attention core that lies in it; a SPAN holds branches, HOISTED is what pass 01 found."""

    SELF = "self"
    CROSS = "cross"
    JOINT = "joint"
    PARALLEL = "parallel"
    MLP = "mlp"
    SPAN = "span"
    HOISTED = "hoisted"

    def __str__(self) -> str:
        return self.value


class Part(str, Enum):
    """What of a place is cached: a branch's output, the keys and values inside it, or a span's change of the stream."""

    BRANCH = "branch"
    KV = "kv"
    SPAN = "span"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Site:
    """A place whose values may be reused together.

    ``values`` names the nodes that are cached: one, or several that share a contraction (joint attention).
    ``closure`` are the nodes that vanish with them, ``flops`` their cost, ``bytes`` what holding the values takes.
    ``parent`` is the index of the innermost site that contains this one; ``layer`` counts blocks in graph order.
    ``sums`` are the residual sums that the values go into, over ``streams``. A span has the blocks ``span``, from the
    first up to the second, and ``bases``: the stream before it, for each of its values. ``probes`` are pairs of a
    symbol and the node that is measured for it, ``entropy`` is the index of the value that holds the attention's
    entropy.
    """

    name: str
    kind: Kind
    values: tuple[str, ...]
    streams: tuple[str, ...]
    block: str
    layer: int
    sums: tuple[str, ...] = ()
    part: Part = Part.BRANCH
    span: tuple[int, int] | None = None
    bases: tuple[str, ...] = ()
    probes: tuple[tuple[str, str], ...] = ()
    entropy: int | None = None
    closure: frozenset[str] = field(default=frozenset(), repr=False)
    flops: int = 0
    bytes: int = 0
    parent: int | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """What is read even when the values are taken from the cache."""
        return (*self.bases, *(node for _, node in self.probes))


@dataclass(frozen=True)
class Found:
    """What pass 02 returns: sites in the order of the graph, and refused places.

    ``hoisted`` is a site of another kind: what is computed once per trajectory (pass 01), if anything is.
    """

    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    hoisted: Site | None = None

    @property
    def all(self) -> tuple[Site, ...]:
        """The sites, then the hoisted one."""
        return self.sites if self.hoisted is None else (*self.sites, self.hoisted)

    @property
    def num_layers(self) -> int:
        return 1 + max((site.layer for site in self.sites), default=-1)


def close(graph: fx.Graph, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites with what vanishes with each, its cost, and which contains which. Sites that share a value, inner
    first."""
    nodes = {node.name: node for node in graph.nodes}
    values = [[nodes[name] for name in site.values] for site in sites]
    closed = closures(graph, values, [[nodes[name] for name in site.operands] for site in sites])
    return tuple(
        replace(
            site,
            closure=frozenset(node.name for node in closed[i]),
            flops=cost.flops(closed[i]),
            bytes=sum(cost.stored_bytes(node) for node in values[i]),
            parent=None if site.kind is Kind.HOISTED else _parent(i, values, closed),
        )
        for i, site in enumerate(sites)
    )


def _parent(i: int, values: Sequence[Sequence[fx.Node]], closed: Sequence[frozenset[fx.Node]]) -> int | None:
    """The innermost other site whose closure holds all values of this one; of two of the same values, the larger."""

    def around(j: int) -> bool:
        if j == i or not set(values[i]) <= closed[j]:
            return False
        mutual = set(values[j]) <= closed[i]
        return not mutual or (len(closed[j]), j) > (len(closed[i]), i)

    return min(filter(around, range(len(values))), key=lambda j: (len(closed[j]), j), default=None)
