"""The tensors of a graph that the analysis measures, found by structure: keys, values and outputs of attention, MLPs,
branches, blocks, the stack and the model's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, fx

from dit_rewrite.analysis.modalities import TEXT, Modalities
from dit_rewrite.compiler.attention_codecs import codec
from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.attention_sites import arguments, cores
from dit_rewrite.passes.analysis.branches import Refusal, summands
from dit_rewrite.passes.analysis.graph import Dependence, aten, is_contraction, packet
from dit_rewrite.passes.analysis.output_sites import find_output
from dit_rewrite.passes.analysis.probes import Probes
from dit_rewrite.passes.analysis.site import Found, Kind, Site
from dit_rewrite.passes.analysis.spans import Stream, block_range, is_shape_only
from dit_rewrite.passes.analysis.stacks import Stacks
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_nodes
from dit_rewrite.passes.analysis.unbacked import is_unbacked
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.rewrite.tap import Derive, Tap
from dit_rewrite.policy.strategies import WindowResidual

Keys = Literal["core", "projection"]


class Quantity(str, Enum):
    """The tensors that are measured, with their names in files and plots.

    KEYS and VALUES: of an attention. ATTENTION: the output of the attention op alone, before any projection. BRANCH:
    the output of an attention branch, or of a parallel one with its MLP. MLP: the output of an MLP branch; in a
    parallel branch, the input of the common projection beside the attention. BLOCK and STACK: the change of the
    residual stream. OUTPUT: the output of the model. WINDOW and WINDOW_RESIDUAL: window attention, and full less window
    attention (DiTFastAttn).
    """

    KEYS = "keys"
    VALUES = "values"
    ATTENTION = "attention"
    MLP = "mlp"
    BRANCH = "branch"
    BLOCK = "block"
    STACK = "stack"
    OUTPUT = "output"
    WINDOW = "window"
    WINDOW_RESIDUAL = "window residual"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Place:
    """A tapped tensor: of which site and which quantity, and a label for the modality of each cut of the tap."""

    site: str
    kind: str
    layer: int
    quantity: Quantity
    tap: Tap
    labels: tuple[str, ...] = ("all",)


@dataclass
class Places:
    """Finds the places of a captured graph whose branches are `found`.

    `keys`: whether keys and values are measured as the attention op reads them ("core", behind norms and rotations), or
    as their projection computes them ("projection"). `window`: the window of WINDOW, or None for none. `whole`: the
    graph is the whole model. ``refused`` lists the places that are left out, with the reasons.
    """

    captured: Captured
    found: Found
    keys: Keys = "core"
    window: float | None = None
    heads: bool = False
    whole: bool = True
    refused: list[Refusal] = field(default_factory=list)

    def find(self) -> list[Place]:
        """Return the places in graph order."""
        found = [*self._branches(), *self._attentions(), *self._spans(), *self._outputs()]
        return [place for place in found if self._fits(place)]

    @cached_property
    def gm(self) -> fx.GraphModule:
        return self.captured.gm

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.gm.graph.nodes}

    @cached_property
    def _dependence(self) -> Dependence:
        return Dependence(self.gm.graph, self.captured.static)

    @cached_property
    def _invariant(self) -> dict[fx.Node, None]:
        return invariant_nodes(self.gm.graph, self.captured.static | self.captured.conditioning)

    @cached_property
    def _image(self) -> int | None:
        return Probes(self.gm, self.found, self.captured.static, self.captured.conditioning).image_tokens()

    @cached_property
    def _cores(self) -> dict[str, list[fx.Node]]:
        """The attention ops of each site, without those of sites inside it."""
        inner: dict[str, str] = {}
        for site in sorted(self.found.sites, key=lambda site: -len(site.closure)):
            inner.update((core.name, site.name) for core in cores(self._nodes, site))
        order = [node for node in self.gm.graph.nodes if node.name in inner]
        return {site.name: [c for c in order if inner[c.name] == site.name] for site in self.found.sites}

    @cached_property
    def _modalities(self) -> Modalities:
        return Modalities(self._image, [core for inside in self._cores.values() for core in inside])

    def _branches(self) -> Iterator[Place]:
        for site in self.found.sites:
            quantity = Quantity.MLP if site.kind is Kind.MLP else Quantity.BRANCH
            for name in site.values:
                yield self._place(site, quantity, self._nodes[name])
            if site.kind is Kind.PARALLEL:
                for node in self._beside_attention(site):
                    yield self._place(site, Quantity.MLP, node)

    def _attentions(self) -> Iterator[Place]:
        for site in self.found.sites:
            if site.kind is Kind.MLP:
                continue
            inside = self._cores[site.name]
            if not inside:
                self.refused.append(Refusal(site.values[0], site.name, RefusalReason.NO_CORE))
            for core in inside:
                given = arguments(core)
                for quantity, operand in ((Quantity.KEYS, given["key"]), (Quantity.VALUES, given["value"])):
                    for node in self._tapped_at(operand):
                        yield self._place(site, quantity, node, self._heads(node, operand))
                yield self._place(site, Quantity.ATTENTION, core, 1)
                if self.window is not None:
                    yield from self._windows(site, core, self.window)

    def _tapped_at(self, operand: fx.Node) -> list[fx.Node]:
        """Return the operand of an attention, or the projections that it is computed from."""
        return [operand] if self.keys == "core" else projections(self._dependence, operand)

    def _heads(self, node: fx.Node, operand: fx.Node) -> int | None:
        """Return the dimension of the heads, which a projection has only behind a view that splits it into heads."""
        shape, split = node.meta["val"].shape, operand.meta["val"].shape
        if node is operand:
            return 1
        fitting = [d for d in (2, 1) if len(shape) == 4 and shape[d] == split[1] and shape[-1] == split[-1]]
        return fitting[0] if fitting else None

    def _beside_attention(self, site: Site) -> list[fx.Node]:
        """Return the tensors that a parallel branch joins with its attention: parts of a cat, or summands."""
        depends, inside = self._dependence.depends, self._cores[site.name]
        streams = [self._nodes[name] for name in site.streams]
        joined = [node.all_input_nodes for name in site.closure if packet(node := self._nodes[name]) is aten.cat]
        for value in (self._nodes[name] for name in site.values):
            joined += [list(summands(value))] if packet(value) is aten.add else []
        found: dict[fx.Node, None] = {}
        for parts in joined:
            beside = [p for p in parts if not any(depends(p, core) for core in inside)]
            if len(beside) < len(parts):
                found.update((p, None) for p in beside if any(depends(p, stream) for stream in streams))
        return list(found)

    def _windows(self, site: Site, core: fx.Node, window: float) -> Iterator[Place]:
        given = arguments(core)
        made: Any = RefusalReason.CAUSAL
        if is_unbacked(core.meta["val"]):
            made = RefusalReason.MOVING_SIZE
        elif site.kind is Kind.CROSS:
            made = RefusalReason.OTHER_TOKENS
        elif not (given["is_causal"] or given["enable_gqa"] or given["dropout_p"]):
            made = codec(WindowResidual(window), core, self._image, False, False)
        if isinstance(made, RefusalReason):
            self.refused.append(Refusal(core.name, site.name, made))
            return
        read = [node for name in ("query", "key", "value", "attn_mask") if (node := given[name]) is not None]

        def residual(value: Tensor, *operands: Tensor) -> Tensor:
            found: Tensor = made.encode(value, operands)[0]
            return found

        def inside(value: Tensor, *operands: Tensor) -> Tensor:
            return value - residual(value, *operands)

        for quantity, derive in ((Quantity.WINDOW, inside), (Quantity.WINDOW_RESIDUAL, residual)):
            place = self._place(site, quantity, core, 1, read, derive)
            seen = [i for i, label in enumerate(place.labels) if label != TEXT]  # text tokens attend to all tokens
            cuts = tuple(place.tap.cuts[i] for i in seen)
            yield replace(place, tap=replace(place.tap, cuts=cuts), labels=tuple(place.labels[i] for i in seen))

    def _spans(self) -> Iterator[Place]:
        """Yield the change of the stream across each block, and across the stack with most FLOPs."""
        if not self.found.sites:
            return
        stream = Stream(self.gm.graph, self.found)
        stack = Stacks(stream).find().layers
        wanted: list[tuple[Quantity, tuple[int, ...]]]
        wanted = [(Quantity.BLOCK, (layer,)) for layer in sorted({site.layer for site in self.found.sites})]
        if len(stack) > 1:
            wanted.append((Quantity.STACK, tuple(stack)))
        elif not self.whole:
            self.refused.append(Refusal("", str(Quantity.STACK), RefusalReason.SPAN_PER_GRAPH))
        for quantity, layers in wanted:
            name = block_range(self.found, layers[0], layers[-1])
            pairs = stream.pairs(layers[0], layers[-1] + 1, layers)
            if pairs is None:
                self.refused.append(Refusal("", name, RefusalReason.NO_COUNTERPART))
            site = Site(name, Kind.SPAN, (), (), name, layers[0])
            for value, base in pairs or ():
                yield self._place(site, quantity, value, None, [base], lambda after, before: after - before)

    def _outputs(self) -> Iterator[Place]:
        if not self.whole:
            self.refused.append(Refusal("", str(Quantity.OUTPUT), RefusalReason.OUTPUT_IN_PART))
            return
        sites, _ = find_output(self.gm, (), less_latent=False)
        for site in sites:
            for name in site.values:
                if self._nodes[name].meta["val"].is_floating_point():
                    yield Place(site.name, str(site.kind), site.layer, Quantity.OUTPUT, Tap((name,)))

    def _place(
        self,
        site: Site,
        quantity: Quantity,
        node: fx.Node,
        heads: int | None = None,
        operands: Sequence[fx.Node] = (),
        derive: Derive | None = None,
    ) -> Place:
        read = (node.name, *(operand.name for operand in operands))
        labels, cuts = self._modalities.cuts(node, self._cores.get(site.name, ()), heads)
        tap = Tap(read, cuts, derive, heads if self.heads else None)
        return Place(site.name, str(site.kind), site.layer, quantity, tap, labels)

    def _fits(self, place: Place) -> bool:
        """Return whether a place can be measured; otherwise note why not."""
        node = self._nodes[place.tap.read[0]]
        reason = None
        if is_unbacked(node.meta["val"]):
            reason = RefusalReason.MOVING_SIZE
        elif node in self._invariant:
            reason = RefusalReason.TRAJECTORY_INVARIANT
        if reason is not None:
            self.refused.append(Refusal(node.name, f"{place.site} {place.quantity}", reason))
        return reason is None and node.op == "call_function"


def projections(dependence: Dependence, operand: fx.Node) -> list[fx.Node]:
    """Return the nearest contractions that an operand of an attention is computed from, each followed through views and
    selections as far as all its ways to the operand go."""
    found: dict[fx.Node, None] = {}
    waiting, seen = [operand], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or not dependence.is_data(node):
            continue
        seen.add(node)
        if is_contraction(node):
            found[_followed(dependence, node, operand)] = None
        else:
            waiting += node.all_input_nodes
    return sorted(found, key=dependence.position.__getitem__)


def _followed(dependence: Dependence, node: fx.Node, until: fx.Node) -> fx.Node:
    while node is not until:
        users = [user for user in node.users if dependence.depends(until, user)]
        if len(users) != 1 or not is_shape_only(users[0]):
            break
        node = users[0]
    while not isinstance(node.meta.get("val"), Tensor):  # a split that is read by several of its parts
        node = node.all_input_nodes[0]
    return node
