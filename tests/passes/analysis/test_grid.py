"""The patch of the latent that a token covers, or None if it is ambiguous."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from dit_rewrite.passes.analysis.graph import aten
from dit_rewrite.passes.analysis.grid import find_patch


def patch(latent: tuple[int, ...], signal: tuple[int, ...], convolved: tuple[int, ...] = ()) -> tuple[int, ...] | None:
    """Return the patch for tensors of these shapes, in a graph that convolves the latent to a given size."""
    graph = fx.Graph()
    input_ = graph.placeholder("latent")
    input_.meta["val"] = torch.empty(latent, device="meta")
    if convolved:
        node = graph.call_function(aten.convolution.default, (input_,))
        node.meta["val"] = torch.empty(convolved, device="meta")
    if signal == latent:
        return find_patch(graph, input_, input_)
    node = graph.call_function(aten.relu.default, (input_,))
    node.meta["val"] = torch.empty(signal, device="meta")
    return find_patch(graph, input_, node)


@pytest.mark.parametrize(
    ("latent", "signal", "convolved", "expected"),
    [
        ((1, 4, 8, 8), (1, 4, 8, 8), (), ()),
        ((1, 4, 8, 12), (1, 24, 16), (), (2, 2)),
        ((1, 4, 8, 12), (1, 96, 16), (), (1, 1)),
        ((1, 4, 8, 12), (1, 24, 16), (1, 16, 2, 12), (4, 1)),  # known from the convolution
        ((1, 4, 8, 12), (1, 25, 16), (), None),  # the tokens include text
        ((1, 4, 8, 12), (1, 24), (), None),
        ((1, 4, 4, 8, 8), (1, 64, 16), (), None),  # (1, 2, 2) or (4, 1, 1)
        ((1, 4, 4, 8, 8), (1, 64, 16), (1, 16, 4, 4, 4), (1, 2, 2)),
        ((1, 4, 3, 8, 8), (1, 48, 16), (), (1, 2, 2)),
        ((1, 4, 3, 8, 8), (1, 4, 3, 8, 8), (), None),  # the frames may come before the channels
        ((1, 4, 3, 8, 8), (1, 4, 3, 8, 8), (1, 16, 3, 4, 4), ()),
        ((1, 64, 16), (1, 64, 32), (), None),  # packed before the model is called
        ((1, 64, 16), (1, 64, 16), (), None),
    ],
)
def test_patches(
    latent: tuple[int, ...], signal: tuple[int, ...], convolved: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    assert patch(latent, signal, convolved) == expected
