"""Which straight-line graphs can be captured as CUDA graphs, by their ops and devices."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dit_rewrite.errors import GraphReason
from dit_rewrite.passes.analysis.unbacked import is_unbacked

UNSAFE = {torch.Tag.data_dependent_output, torch.Tag.cudagraph_unsafe}  # the host waits for the device


def refusal(gm: fx.GraphModule) -> GraphReason | None:
    """Return why no CUDA graph can be captured of a straight-line graph, or None. A failed capture may leave the
    device's random generator unusable, so it is not tried where it is known to fail."""
    values = [node.meta.get("val") for node in gm.graph.nodes]
    if any(UNSAFE & set(getattr(node.target, "tags", ())) for node in gm.graph.nodes) or any(map(is_unbacked, values)):
        return GraphReason.READS_DEVICE
    devices = {value.device.type for value in values if isinstance(value, Tensor)}
    return GraphReason.MIXED_DEVICES if len(devices) > 1 else None
