"""What a site is: a place of the graph whose values may be reused together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from torch import fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.graph import closures


class Kind(str, Enum):
    """What a branch is, by the attention core that lies in it; a SPAN holds branches."""

    SELF = "self"
    CROSS = "cross"
    JOINT = "joint"
    PARALLEL = "parallel"
    MLP = "mlp"
    SPAN = "span"

    def __str__(self) -> str:
        return self.value


class Part(str, Enum):
    """What of a place a strategy replaces, inner parts first.

    HELD is what is held for an attention CORE, KV its keys and values; GUIDANCE is a branch for both halves of a
    guided batch, BRANCH its output, SPAN the change of the stream across blocks, OUTPUT
    what the graph returns, DELTA how that differs between the two sides of the guidance.
    """

    HELD = "held"
    CORE = "core"
    KV = "kv"
    GUIDANCE = "guidance"
    BRANCH = "branch"
    SPAN = "span"
    DELTA = "delta"
    OUTPUT = "output"

    def __str__(self) -> str:
        return self.value


class Probe(NamedTuple):
    """A node that a guard measures, and the symbol that it is measured for.

    ``waits``: a decision of the same call waits for it, as it is neither an input nor what the call returns.
    ``output`` is the node of what the model returns, where the measurement reads it. ``latent`` is that of the latent
    where the probe is filtered on its grid, and ``patch`` what of it a token covers; none: it is the latent.
    """

    symbol: str
    node: str
    waits: bool = True
    output: str | None = None
    latent: str | None = None
    patch: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """A place whose values may be reused together.

    ``values`` names the nodes that are cached: one, or several that share a contraction (joint attention).
    ``closure`` are the nodes that vanish with them, ``flops`` their cost, ``bytes`` what holding the values takes.
    ``parent`` is the index of the innermost site that contains this one; ``layer`` counts blocks in graph order.
    ``sums`` are the residual sums that the values go into, over ``streams``. A span has the blocks ``span``, from the
    first up to the second, and ``bases``: the stream before it, for each of its values. ``probes`` are what
    its guard measures, ``entropy`` is the index of the value that holds the attention's
    entropy. ``inputs`` are what a core reads: query, key, value and perhaps a mask. ``conditioned``: what its slot
    holds is good for the same conditioning alone.
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
    probes: tuple[Probe, ...] = ()
    entropy: int | None = None
    inputs: tuple[str, ...] = ()
    conditioned: bool = False
    closure: frozenset[str] = field(default=frozenset(), repr=False)
    flops: int = 0
    bytes: int = 0
    parent: int | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """What is read even when the values are taken from the cache."""
        return (*self.bases, *self.inputs, *(probe.node for probe in self.probes if probe.node != probe.output))

    @property
    def measured(self) -> tuple[str, ...]:
        """The nodes that its measurements read."""
        return tuple(node for probe in self.probes for node in (probe.node, probe.output) if node is not None)

    @property
    def awaited(self) -> tuple[str, ...]:
        """The nodes that must be computed before it is decided by what changed up to this call."""
        return tuple(probe.node for probe in self.probes if probe.waits)

    @property
    def place(self) -> str:
        """The name of the branch or span that this is a part of."""
        return self.name.removesuffix(f".{self.part}")

    @property
    def depth(self) -> int:
        """How far out its part is, among parts of the same values."""
        return list(Part).index(self.part)


@dataclass(frozen=True)
class Found:
    """The result of `find_sites`: sites in the order of the graph, and refused places."""

    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]

    def describe(self) -> Iterator[str]:
        """A line for each site and each refused place."""
        for site in self.sites:
            yield f"{site.name}  {site.kind}  layer {site.layer}  values {', '.join(site.values)}"
        for refusal in self.refused:
            yield f"refused: {refusal.path} {refusal.node}: {refusal.reason}"

    @property
    def num_layers(self) -> int:
        return 1 + max((site.layer for site in self.sites), default=-1)


def close(graph: fx.Graph, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites with what vanishes with each, its cost, and which contains which. Sites that share a value, inner
    first."""
    nodes = {node.name: node for node in graph.nodes}
    solid = [site.part is not Part.CORE_STATE for site in sites]  # what is held for a core is no node of the graph
    values = [[nodes[name] for name in site.values] if s else [] for site, s in zip(sites, solid, strict=True)]
    read = [[nodes[name] for name in site.operands] if s else [] for site, s in zip(sites, solid, strict=True)]
    closed = closures(graph, values, read)
    return tuple(
        replace(
            site,
            closure=frozenset(node.name for node in closed[i]),
            flops=cost.flops(closed[i]),
            bytes=sum(cost.stored_bytes(node) for node in values[i]),
            parent=_parent(i, sites, values, closed) if solid[i] else _core(site, sites),
        )
        for i, site in enumerate(sites)
    )


def _core(held: Site, sites: Sequence[Site]) -> int:
    """The core for which a site holds something."""
    return next(j for j, site in enumerate(sites) if site.part is Part.CORE and site.values == held.values)


def _parent(
    i: int, sites: Sequence[Site], values: Sequence[Sequence[fx.Node]], closed: Sequence[frozenset[fx.Node]]
) -> int | None:
    """The innermost other site whose closure holds all values of this one; of two of the same values, the larger."""

    def around(j: int) -> bool:
        if j == i or not set(values[i]) <= closed[j]:
            return False
        mutual = set(values[j]) <= closed[i]
        return not mutual or order(j) > order(i)

    def order(j: int) -> tuple[int, int, int]:
        return len(closed[j]), sites[j].depth, j

    return min(filter(around, range(len(values))), key=order, default=None)
