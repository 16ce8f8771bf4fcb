"""The result of `insert_guards`: the guarded graph, and the label of each guarded site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import fx

from dit_rewrite.passes.analysis.site import Site
from dit_rewrite.passes.rewrite.batch import Batch
from dit_rewrite.passes.rewrite.codec import Codec, ValueCodec


@dataclass(frozen=True)
class Guidance:
    """A guided batch: the labels of the nodes by name, the batch size, and the half that is computed for both."""

    labels: Mapping[str, Batch]
    batch: int
    half: Literal[0, 1]


@dataclass(frozen=True)
class Guarded:
    """The guard and the strategy of a site, as text for its node. `site` is an index into the found sites.

    `codec` is the format in which the slot stores the values. `guidance` is set if a reusing step computes half of a
    guided batch. `depth` is the number of computed values that the slot keeps; if it is above 1, a reusing step takes
    their weighted sum.
    """

    site: int
    guard: str
    strategy: str
    codec: Codec = ValueCodec()
    guidance: Guidance | None = None
    depth: int = 1


def parent_of(sites: Sequence[Site], guarded: Sequence[Guarded], index: int) -> int | None:
    """Return the nearest enclosing guarded site of a site, as an index into `guarded`, or None."""
    around = sites[index].parent
    positions = {g.site: i for i, g in enumerate(guarded)}
    while around is not None and around not in positions:
        around = sites[around].parent
    return None if around is None else positions[around]


@dataclass(frozen=True)
class GuardedGraph:
    """A graph whose guarded sites are cache_or_compute nodes, made from the captured graph ``source``.

    Inputs: the ``num_inputs`` inputs of the captured graph; a decision for each guarded site (True: reuse); the tensors
    of each slot. Outputs: the ``num_outputs`` outputs of the captured graph; the new tensors of each slot, which are
    valid only if its site was computed.

    ``sites`` are the guarded sites in the order of these inputs. ``widths``: how many tensors the slot of each site
    gets when the site computes. ``depths``: how many computed values each slot keeps. If more than one, the slot's
    inputs are the tensors of the newest value, those of older values, and an fp32 vector ``(depth,)`` of weights.
    ``parents``: for each site, the index of the nearest enclosing site whose reuse makes its decision irrelevant.

    Nodes of the captured graph have their ``position`` there in their meta. Nodes that encode and decode slots have
    fractional positions in between.
    """

    gm: fx.GraphModule
    sites: tuple[Site, ...]
    parents: tuple[int | None, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    num_inputs: int
    num_outputs: int
    source: fx.GraphModule

    @cached_property
    def num_slot_inputs(self) -> tuple[int, ...]:
        """For each site the number of inputs for its slot: tensors and weights."""
        return tuple(n * depth + (depth > 1) for n, depth in zip(self.widths, self.depths, strict=True))

    @cached_property
    def slot_tensors(self) -> tuple[tuple[fx.Node, ...], ...]:
        """For each site the inputs that are tensors of its slot, without the weights."""
        inputs = iter(self.gm.graph.find_nodes(op="placeholder")[self.num_inputs + len(self.sites) :])
        slots = [[next(inputs) for _ in range(count)] for count in self.num_slot_inputs]
        return tuple(tuple(slot[: n * depth]) for slot, n, depth in zip(slots, self.widths, self.depths, strict=True))

    @cached_property
    def acting(self) -> frozenset[fx.Node]:
        """The impure nodes of the graph and its subgraphs, which must run for their side effects."""
        graphs = (module.graph for module in self.gm.modules() if isinstance(module, fx.GraphModule))
        calls = (node for graph in graphs for node in graph.nodes if node.op == "call_function")
        return frozenset(node for node in calls if node.is_impure())
