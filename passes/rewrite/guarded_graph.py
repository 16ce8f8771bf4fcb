"""The result of `insert_guards`: the guarded graph, and the label of each guarded site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import fx

from dit_rewrite.passes.analysis.site import Site
from dit_rewrite.passes.rewrite.batch import Batch
from dit_rewrite.passes.rewrite.codec import Codec, ValueCodec


@dataclass(frozen=True)
class Guidance:
    """Which nodes carry a guided batch of that size (half_batch.py), and which of its halves is computed for both."""

    labels: Mapping[str, Batch]
    batch: int
    half: Literal[0, 1]


@dataclass(frozen=True)
class Guarded:
    """A site of the graph with the guard and strategy that its node shows; `site` is an index into the sites found.

    `codec` says what its slot holds in the place of its values, `guidance` how a GUIDANCE site is done otherwise.
    `depth` is how many computed values are held; above 1 a reusing step takes their weighted sum.
    """

    site: int
    guard: str
    strategy: str
    codec: Codec = ValueCodec()
    guidance: Guidance | None = None
    depth: int = 1


@dataclass(frozen=True)
class GuardedGraph:
    """A graph whose sites are cache_or_compute nodes; ``source`` is the graph that it was made from.

    Its inputs are those of the captured graph, then for each guarded site a decision (True: reuse), then what each of
    its slots holds; its outputs those of the captured graph, then what each slot holds now, if its site was computed
    (inside half of a batch a reused one gives that half twice: its slot is to be left as it is). ``sites`` are the
    guarded ones in the order of these inputs, ``held`` the number of tensors that each one's slot gets when it
    computes; ``depths`` how many computed values it has: if more than one, its inputs are those of the newest, then
    older ones, then an fp32 vector of their weights. ``parents`` index into the sites: the nearest one whose reuse
    takes this one's decision away.
    Every node that the captured graph has too knows its ``position`` there, in its meta; those that pack and unpack
    slots stand in between.
    """

    gm: fx.GraphModule
    sites: tuple[Site, ...]
    parents: tuple[int | None, ...]
    held: tuple[int, ...]
    depths: tuple[int, ...]
    num_inputs: int
    num_outputs: int
    source: fx.GraphModule

    @cached_property
    def taken(self) -> tuple[int, ...]:
        """For each site how many inputs its slot is: what it holds, and the weights."""
        return tuple(n * depth + (depth > 1) for n, depth in zip(self.held, self.depths, strict=True))

    @cached_property
    def stored(self) -> tuple[tuple[fx.Node, ...], ...]:
        """For each site the inputs that are what its slot holds, weights left out."""
        inputs = iter(self.gm.graph.find_nodes(op="placeholder")[self.num_inputs + len(self.sites) :])
        slots = [[next(inputs) for _ in range(count)] for count in self.taken]
        return tuple(tuple(slot[: n * depth]) for slot, n, depth in zip(slots, self.held, self.depths, strict=True))

    @cached_property
    def acting(self) -> frozenset[fx.Node]:
        """The nodes that must run for their effect, those of subgraphs too."""
        graphs = (module.graph for module in self.gm.modules() if isinstance(module, fx.GraphModule))
        calls = (node for graph in graphs for node in graph.nodes if node.op == "call_function")
        return frozenset(node for node in calls if node.is_impure())
