"""The slot format of each reachable site: how its slot encodes values, or the reason why nothing can be held."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import sympy
from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.compiler.attention_codecs import Blockwise, codec
from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.output_sites import find_latent
from dit_rewrite.passes.analysis.probes import Probes
from dit_rewrite.passes.analysis.site import Site
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_nodes
from dit_rewrite.passes.analysis.unbacked import moving_sizes
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.rewrite.codec import Codec, DeltaCodec, ValueCodec
from dit_rewrite.passes.rewrite.guarded_graph import Guidance
from dit_rewrite.passes.rewrite.half_batch import Batch, batch_labels
from dit_rewrite.policy.site_rules import SiteRules
from dit_rewrite.policy.strategies import GuidanceDelta, ShareGuidance

SlotFormat = tuple[Codec, Guidance | None]


class SlotFormats:
    """Answers for the sites of one graph; `probes` knows its streams."""

    def __init__(self, captured: Captured, probes: Probes) -> None:
        self.captured, self.probes = captured, probes
        self.steady = captured.static | captured.conditioning  # dispatch asks whether it still is (Site.conditioned)
        self.graph = probes.gm.graph
        self.nodes = {node.name: node for node in self.graph.nodes}

    def of(self, site: Site, rules: SiteRules) -> SlotFormat | RefusalReason:
        """The form of a site under its rules."""
        form = rules.form
        if any(self._moves(self.nodes[name]) for name in (*site.values, *site.inputs)):
            return RefusalReason.MOVING_SIZE
        if isinstance(form, ShareGuidance | GuidanceDelta):
            return self._shared(site, form)
        if form is None or isinstance(form, str):
            return ValueCodec(form), None
        core = self.nodes[site.values[0]]
        keys, mask = (all(self.nodes[n] in self._still for n in names) for names in (site.inputs[1:3], site.inputs[3:]))
        found = codec(form, core, self._image, keys, mask)
        return found if isinstance(found, RefusalReason) else (found, None)

    @cached_property
    def _image(self) -> int | None:
        return self.probes.image_tokens()

    @cached_property
    def _still(self) -> Any:
        return invariant_nodes(self.graph, self.steady)

    def is_conditioned(self, site: Site, form: SlotFormat) -> bool:
        """Whether what is held for a site is good for the same conditioning alone: its size follows from that, or keys,
        values or a mask do that the held state takes for the same in every call."""
        sized = any(torch_compat.unbacked_symbols(self.nodes[name].meta["val"]) for name in site.values)
        return sized or (isinstance(form[0], Blockwise) and (form[0].kv_static or len(site.inputs) > 3))

    def _moves(self, node: fx.Node) -> bool:
        """Whether a value's size is decided by data that change from step to step."""
        return bool(torch_compat.unbacked_symbols(node.meta["val"]) & self._moving_sizes)

    @cached_property
    def _moving_sizes(self) -> frozenset[sympy.Symbol]:
        return moving_sizes(self.graph, self.steady)

    @cached_property
    def _batch(self) -> int:
        """The size of the batch: that of the largest input that changes from step to step, the latent."""
        latent = find_latent(self.graph, self.steady)
        size = None if latent is None else latent.meta["val"].shape[0]
        return size if isinstance(size, int) else 0

    @cached_property
    def _labels(self) -> dict[str, Batch]:
        labels = batch_labels(self.graph, self._batch, self.captured.static)
        return {node.name: label for node, label in labels.items()}

    def _shared(self, site: Site, form: ShareGuidance | GuidanceDelta) -> SlotFormat | RefusalReason:
        store = form.do.store if isinstance(form, GuidanceDelta) else None
        if form.half is None:
            return ValueCodec(store), None
        if self._batch == 0 or self._batch % 2:
            return RefusalReason.ODD_BATCH
        inside = (self._labels[name] for name in site.closure)
        together = all(self._labels[name] is Batch.LEADING for name in site.values)
        if Batch.MIXED in inside or not together:
            return RefusalReason.MIXES_SAMPLES
        codec = DeltaCodec(store, form.half) if isinstance(form, GuidanceDelta) else ValueCodec()
        return codec, Guidance(self._labels, self._batch, form.half)
