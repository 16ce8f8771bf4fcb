"""The bytes that values take while a graph runs, on graphs written node by node."""

from __future__ import annotations

from operator import getitem

import pytest
import torch
from torch import fx

from dit_rewrite.passes.analysis.graph import aten
from dit_rewrite.passes.analysis.liveness import owner, peak_bytes


def chain(views: bool) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """x of 4 numbers is widened to 12, from which 3 numbers are computed; in between, perhaps, a view of a part."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4)
    wide = graph.call_function(aten.repeat.default, (x, [3]))
    parts = graph.call_function(aten.split.Tensor, (wide, 6))
    part = graph.call_function(getitem, (parts, 0)) if views else wide
    small = graph.call_function(aten.narrow_copy.default, (part, 0, 0, 3))
    last = graph.call_function(aten.neg.default, (small,))
    graph.output((last,))
    wide.meta["val"], small.meta["val"], last.meta["val"] = torch.empty(12), torch.empty(3), torch.empty(3)
    parts.meta["val"] = wide.meta["val"].split(6)
    part.meta["val"] = parts.meta["val"][0] if views else wide.meta["val"]
    return graph, {"x": x, "wide": wide, "part": part, "small": small, "last": last}


@pytest.mark.parametrize("views", [True, False])
def test_a_value_lives_until_its_last_reader(views: bool) -> None:
    """The widening reads 4 numbers and writes 12; later ones are fewer, because x is freed."""
    graph, named = chain(views)
    nodes = list(graph.nodes)[:-1]
    assert peak_bytes(nodes, nodes, [named["last"]]) == 4 * (4 + 12)
    assert peak_bytes(nodes, nodes, [named["last"], named["x"]]) == 4 * (4 + 12 + 3)
    assert owner(named["part"]) is named["wide"]


def test_a_view_keeps_what_it_is_a_view_of() -> None:
    graph, named = chain(views=True)
    nodes = list(graph.nodes)[:-1]
    assert peak_bytes(nodes, nodes, [named["last"], named["part"]]) == 4 * (12 + 3 + 3)


def test_values_that_do_not_count() -> None:
    graph, named = chain(views=True)
    nodes = list(graph.nodes)[:-1]
    assert peak_bytes(nodes, {named["x"], named["small"]}, [named["last"]]) == 4 * 4
    assert peak_bytes([], nodes, []) == 0
