"""The patch of the latent that a token covers."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import aten


def find_patch(graph: fx.Graph, latent: fx.Node, signal: fx.Node) -> tuple[int, ...] | None:
    """Return the patch size of a latent ``(batch, channels, [frames,] height, width)`` per token of `signal`.

    Returns () if `signal` has the shape of the latent, and None if the patch size is unknown. If the graph has a
    convolution with as many output positions as there are tokens, its strides follow from that. Otherwise the patch is
    square and covers one or more whole frames, and exactly one patch size must give the number of tokens.
    """
    sizes = cost.shape(latent.meta["val"])[2:]
    shape = cost.shape(signal.meta["val"])
    convolved = [places for node in graph.nodes if (places := _places(node)) and len(places) == len(sizes)]
    if len(sizes) not in (2, 3) or (len(sizes) == 3 and signal is latent and not convolved):
        return None  # the order of frames and channels is unknown
    if shape == cost.shape(latent.meta["val"]):
        return ()
    if len(shape) != 3:
        return None
    for places in convolved:
        if math.prod(places) == shape[1] and all(s % p == 0 for s, p in zip(sizes, places, strict=True)):
            return tuple(s // p for s, p in zip(sizes, places, strict=True))
    fitting = [patch for patch in _patches(sizes) if math.prod(sizes) == shape[1] * math.prod(patch)]
    return fitting[0] if len(fitting) == 1 else None


def _places(node: fx.Node) -> tuple[int, ...]:
    """Return the spatial shape of a convolution's result, or () for another node."""
    value = node.meta.get("val")
    if node.target is not aten.convolution.default or not isinstance(value, Tensor):
        return ()
    return cost.shape(value)[2:]


def _patches(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the square patches that divide the latent. For a video, a patch starts with its number of frames."""
    *frames, height, width = sizes
    spans = [n for n in range(1, frames[0] + 1) if frames[0] % n == 0] if frames else [1]
    sides = [n for n in range(1, min(height, width) + 1) if height % n == width % n == 0]
    return [(*([span] if frames else []), side, side) for span, side in itertools.product(spans, sides)]
