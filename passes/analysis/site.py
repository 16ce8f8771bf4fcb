"""Sites: places of a graph whose values may be reused together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from torch import fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.graph import closures
from dit_rewrite.passes.analysis.unbacked import size_assertions


class Kind(str, Enum):
    """The kind of a branch, determined by its attention core. A SPAN contains branches."""

    SELF = "self"
    CROSS = "cross"
    JOINT = "joint"
    PARALLEL = "parallel"
    MLP = "mlp"
    SPAN = "span"

    def __str__(self) -> str:
        return self.value


class Part(str, Enum):
    """The part of a place that a strategy replaces, inner parts first.

    CORE_STATE: the state that a strategy stores to replace an attention CORE. CORE: the attention op. KV: its keys and
    values. CFG_SHARED: a branch that is computed for one half of a guided batch and used for both. TILES: a branch of
    which some tokens are computed and the others reused. BRANCH: the output of a branch. SPAN: the change of the stream
    across blocks. DELTA: the difference between the two halves of guidance in the output. OUTPUT: the outputs of the
    graph.
    """

    CORE_STATE = "core_state"
    CORE = "core"
    KV = "kv"
    CFG_SHARED = "cfg_shared"
    TILES = "tiles"
    BRANCH = "branch"
    SPAN = "span"
    DELTA = "delta"
    OUTPUT = "output"

    def __str__(self) -> str:
        return self.value


class Probe(NamedTuple):
    """A node that a guard measures for `symbol`.

    ``waits``: a decision of the same call must wait for the node, because it is neither an input nor an output.
    ``output``: the output of the model, if the measurement reads it. ``latent``: the latent, if the probe is filtered
    on its grid; ``patch`` is the patch of the latent that a token covers, () if the probe has the latent's shape.
    """

    symbol: str
    node: str
    waits: bool = True
    output: str | None = None
    latent: str | None = None
    patch: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """A place whose values may be reused together. Nodes are given by name.

    ``values``: the nodes that a slot stores; several if they share a contraction (joint attention).
    ``streams``: the residual stream of each value. ``sums``: the residual sum that each value is added to.
    ``block``: the module path of the block. ``layer``: the index of the block in graph order.
    ``span``: for a span, the first block and the block after the last. ``bases``: the tensors that the slot subtracts
    from the values, such as the stream before a span. ``inputs``: query, key, value and mask of a core.
    ``probes``: the nodes that the guard measures. ``entropy``: the index of the value that is the attention's entropy.
    ``conditioned``: the slot is valid only under the conditioning that it was filled with.
    ``closure``: the nodes that only the values need; they move into the subgraph of the site.
    ``skipped``: the nodes that a reusing step leaves out, with ``flops`` operations: the closure, and nodes that
    besides the values only assertions about sizes need. ``bytes``: the size of the values.
    ``parent``: the index of the innermost enclosing site.
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
    skipped: frozenset[str] = field(default=frozenset(), repr=False)
    flops: int = 0
    bytes: int = 0
    parent: int | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """The nodes that are read even if the site is reused."""
        return (*self.bases, *self.inputs, *(probe.node for probe in self.probes if probe.node != probe.output))

    @property
    def measured(self) -> tuple[str, ...]:
        """The nodes that the measurements read."""
        return tuple(node for probe in self.probes for node in (probe.node, probe.output) if node is not None)

    @property
    def awaited(self) -> tuple[str, ...]:
        """The probe nodes that must be computed before the site is decided, if measured in the same call."""
        return tuple(probe.node for probe in self.probes if probe.waits)

    @property
    def place(self) -> str:
        """The name of the branch or span that this site is a part of."""
        return self.name.removesuffix(f".{self.part}")

    @property
    def nesting(self) -> int:
        """The order of the part among parts with the same values; an enclosing part has a larger number."""
        return list(Part).index(self.part)


@dataclass(frozen=True)
class Found:
    """The result of `find_sites`: sites in graph order, and refused places."""

    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]

    def describe(self) -> Iterator[str]:
        """Yield a line for each site and each refused place."""
        for site in self.sites:
            yield f"{site.name}  {site.kind}  layer {site.layer}  values {', '.join(site.values)}"
        for refusal in self.refused:
            yield f"refused: {refusal.path} {refusal.node}: {refusal.reason}"

    @property
    def num_layers(self) -> int:
        return 1 + max((site.layer for site in self.sites), default=-1)


def close(graph: fx.Graph, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return `sites` with their closures, costs and parents. Of sites that share a value, the inner one comes first."""
    nodes = {node.name: node for node in graph.nodes}
    has_nodes = [site.part is not Part.CORE_STATE for site in sites]  # the captured graph does not compute this state
    values = [[nodes[name] for name in site.values] if has else [] for site, has in zip(sites, has_nodes, strict=True)]
    read = [[nodes[name] for name in site.operands] if has else [] for site, has in zip(sites, has_nodes, strict=True)]
    closed, dropped = closures(graph, values, read), size_assertions(graph)
    skipped = closures(graph, values, read, dropped) if dropped else closed
    return tuple(
        replace(
            site,
            closure=frozenset(node.name for node in closed[i]),
            skipped=frozenset(node.name for node in skipped[i]),
            flops=cost.flops(skipped[i]),
            bytes=sum(cost.stored_bytes(node) for node in values[i]),
            parent=_parent(i, sites, values, closed) if has_nodes[i] else _core(site, sites),
        )
        for i, site in enumerate(sites)
    )


def _core(state: Site, sites: Sequence[Site]) -> int:
    """Return the index of the CORE site that a CORE_STATE site belongs to."""
    return next(j for j, site in enumerate(sites) if site.part is Part.CORE and site.values == state.values)


def _parent(
    i: int, sites: Sequence[Site], values: Sequence[Sequence[fx.Node]], closed: Sequence[frozenset[fx.Node]]
) -> int | None:
    """Return the innermost other site whose closure contains all values of site `i`.

    If two sites have the same values, the one with the larger closure encloses the other.
    """

    def around(j: int) -> bool:
        if j == i or not set(values[i]) <= closed[j]:
            return False
        mutual = set(values[j]) <= closed[i]
        return not mutual or order(j) > order(i)

    def order(j: int) -> tuple[int, int, int]:
        return len(closed[j]), sites[j].nesting, j

    return min(filter(around, range(len(values))), key=order, default=None)
