"""The slot format of each reachable site: the codec of its slot, or the reason why its value cannot be stored."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import sympy
from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.compiler.attention_codecs import Blockwise, blockwise, codec, windowed
from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.attention_sites import text_tokens
from dit_rewrite.passes.analysis.condition_keys import condition_keys
from dit_rewrite.passes.analysis.dimensions import Dimensions
from dit_rewrite.passes.analysis.output_sites import find_latent
from dit_rewrite.passes.analysis.probes import Probes
from dit_rewrite.passes.analysis.site import Kind, Site
from dit_rewrite.passes.analysis.token_grid import TokenGrid, token_grid
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_nodes
from dit_rewrite.passes.analysis.unbacked import moving_sizes
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.rewrite.codec import Codec, DeltaCodec, ValueCodec
from dit_rewrite.passes.rewrite.guarded_graph import Guidance
from dit_rewrite.passes.rewrite.half_batch import Batch, batch_labels
from dit_rewrite.passes.rewrite.rows import find_tokens, token_dim
from dit_rewrite.passes.rewrite.tiles import tile_codec
from dit_rewrite.policy.site_rules import SiteRules
from dit_rewrite.policy.strategies import BlockwiseReuse, GuidanceDelta, ReuseTiles, ShareGuidance, WindowResidual

SlotFormat = tuple[Codec, Guidance | None]


class SlotFormats:
    """Chooses the slot formats of one graph's sites; `probes` gives the number of image tokens."""

    def __init__(self, captured: Captured, probes: Probes) -> None:
        self.captured, self.probes = captured, probes
        self.steady = captured.static | captured.conditioning  # dispatch checks this for sites that are `conditioned`
        self.graph = probes.gm.graph
        self.nodes = {node.name: node for node in self.graph.nodes}

    def of(self, site: Site, rules: SiteRules) -> SlotFormat | RefusalReason:
        """Return the slot format of a site under its rules, or the reason why there is none."""
        rule_format = rules.slot_format
        if any(self._moves(self.nodes[name]) for name in (*site.values, *site.inputs)):
            return RefusalReason.MOVING_SIZE
        if isinstance(rule_format, ShareGuidance | GuidanceDelta):
            return self._shared(site, rule_format)
        if rule_format is None or isinstance(rule_format, str):
            return ValueCodec(rule_format), None
        if isinstance(rule_format, ReuseTiles):
            return self._tiled(site, rule_format)
        core = self.nodes[site.values[0]]
        invariant = [self.nodes[name] in self._invariant for name in site.inputs]
        steady = all(invariant[1:3]), all(invariant[3:])
        if isinstance(rule_format, BlockwiseReuse) and rule_format.keys == "condition":
            condition = condition_keys(core, self.captured.static, self.captured.conditioning)
            found = blockwise(rule_format, core, *steady, condition)
        elif isinstance(rule_format, WindowResidual) and rule_format.grid == "latent":
            found = windowed(rule_format, core, self._grid_of(core))
        elif isinstance(rule_format, WindowResidual) and site.kind is Kind.JOINT and not self._shows_text(core):
            found = RefusalReason.NO_TEXT_TOKENS
        else:
            found = codec(rule_format, core, self._image, *steady)
        return found if isinstance(found, RefusalReason) else (found, None)

    def _shows_text(self, core: fx.Node) -> bool:
        """Return whether it is known which tokens of a joint attention are text, so that all tokens may see them."""
        return self._image is not None and text_tokens(core, self._image)[0] > 0

    def _grid_of(self, core: fx.Node) -> TokenGrid | None:
        return None if self._latent is None else token_grid(core, self._latent, self._dimensions)

    @cached_property
    def _dimensions(self) -> Dimensions:
        return Dimensions(self.graph, self.captured.static | self.captured.ambient)

    @cached_property
    def _latent(self) -> fx.Node | None:
        return find_latent(self.graph, self.steady)

    @cached_property
    def _image(self) -> int | None:
        return self.probes.image_tokens()

    @cached_property
    def _invariant(self) -> Any:
        return invariant_nodes(self.graph, self.steady)

    def is_conditioned(self, site: Site, slot_format: SlotFormat) -> bool:
        """Return whether the slot is valid only for the conditioning under which it was filled.

        That is so if the size of the value depends on the conditioning, or if the stored state assumes that keys,
        values or a mask are the same in every call.
        """
        codec = slot_format[0]
        sized = any(torch_compat.unbacked_symbols(self.nodes[name].meta["val"]) for name in site.values)
        return sized or (isinstance(codec, Blockwise) and (codec.kv_static or len(site.inputs) > 3))

    def _moves(self, node: fx.Node) -> bool:
        """Return whether the size of a value depends on data that change from step to step."""
        return bool(torch_compat.unbacked_symbols(node.meta["val"]) & self._moving_sizes)

    @cached_property
    def _moving_sizes(self) -> frozenset[sympy.Symbol]:
        return moving_sizes(self.graph, self.steady)

    @cached_property
    def _batch(self) -> int:
        """The batch size of the latent, the largest input that changes from step to step; 0 if unknown."""
        size = None if self._latent is None else self._latent.meta["val"].shape[0]
        return size if isinstance(size, int) else 0

    @cached_property
    def _labels(self) -> dict[str, Batch]:
        labels = batch_labels(self.graph, self._batch, self.captured.static)
        return {node.name: label for node, label in labels.items()}

    def _tiled(self, site: Site, strategy: ReuseTiles) -> SlotFormat | RefusalReason:
        value = self.nodes[site.values[0]]
        dim = token_dim(value.meta["val"])
        if dim is None:
            return RefusalReason.NO_TOKENS
        closure = [node for node in self.graph.nodes if node.name in site.closure]
        if len(site.values) > 1 or find_tokens(value, closure) is None:
            return RefusalReason.MIXES_TOKENS
        tokens = value.meta["val"].shape[dim]
        return tile_codec(tokens, dim, strategy.tile, strategy.refresh, strategy.order == "change"), None

    def _shared(self, site: Site, strategy: ShareGuidance | GuidanceDelta) -> SlotFormat | RefusalReason:
        store = strategy.do.store if isinstance(strategy, GuidanceDelta) else None
        if strategy.half is None:
            return ValueCodec(store), None
        if self._batch == 0 or self._batch % 2:
            return RefusalReason.ODD_BATCH
        inside = (self._labels[name] for name in site.closure)
        together = all(self._labels[name] is Batch.LEADING for name in site.values)
        if Batch.MIXED in inside or not together:
            return RefusalReason.MIXES_SAMPLES
        codec = DeltaCodec(store, strategy.half) if isinstance(strategy, GuidanceDelta) else ValueCodec()
        return codec, Guidance(self._labels, self._batch, strategy.half)
