"""Half of a batch for both halves: a rewritten graph repeats one half of the whole result and never reads the other."""

from __future__ import annotations

import operator
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dit_rewrite.passes.rewrite.batch import Batch, batch_labels
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute
from dit_rewrite.passes.rewrite.half_batch import halve
from tests.helpers.batches import BATCH, HALVES, OPS, SQUARE, TABLE, Op, X, chained, check, drawn, traced

EQUAL, LEADING, MIXED, SAME = Batch.EQUAL, Batch.LEADING, Batch.MIXED, Batch.SAME
aten = torch.ops.aten


def labels_of(gm: fx.GraphModule, batch: int = BATCH) -> list[Batch]:
    """Return the labels of a graph's inputs."""
    labels = batch_labels(gm.graph, batch)
    return [labels[node] for node in gm.graph.find_nodes(op="placeholder")]


def returning_tuple(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Wrap a function of one result to return a tuple, as the body of a site does."""
    return lambda *inputs: (function(*inputs),)


@pytest.mark.parametrize("op", OPS, ids=operator.attrgetter("name"))
def test_ops(op: Op) -> None:
    """Every op with a rule runs on half of the batch, and ops that mix samples are refused."""
    gm = traced(returning_tuple(op.function), op.inputs)
    if op.mixes:
        assert [halve(gm, labels_of(gm), BATCH, half) for half in HALVES] == [None, None]
    else:
        check(gm, labels_of(gm), op.inputs)


def test_random_functions() -> None:
    """Graphs of several ops; those that are refused mix samples or are not proven not to."""
    count = 0
    for seed in range(40, 80):
        gm = traced(returning_tuple(chained(seed)), (X,))
        (result,) = gm.graph.output_node().all_input_nodes
        if batch_labels(gm.graph, BATCH)[result] is MIXED:
            assert halve(gm, [LEADING], BATCH, 0) is None
        else:
            check(gm, [LEADING], (X,))
            count += 1
    assert 10 <= count <= 30


@pytest.mark.parametrize(("batch", "halvable"), [(1, False), (2, True), (3, False), (4, True), (6, True)])
def test_batches(batch: int, halvable: bool) -> None:
    """Any even number of samples works; an odd number is refused."""
    x = drawn(batch, 4, 6)
    gm = traced(lambda x: (x.view(2 * batch, 2, 6).softmax(-1).view(batch, 24) - 1,), (x,))
    if halvable:
        check(gm, [LEADING], (x,), batch)
    else:
        assert [halve(gm, [LEADING], batch, half) for half in HALVES] == [None, None]


def test_results_lie_as_they_did() -> None:
    """A repeated result has the memory order of the result for the whole batch.

    Readers of the slot, such as views, rely on that order.
    """
    orders = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2), (0, 2, 3, 1)]
    x = drawn(2, 3, 5, 4)

    def laid(x: Tensor, order: tuple[int, ...]) -> Tensor:
        back = [order.index(dim) for dim in range(4)]
        return (x.permute(order).contiguous() + 1).permute(back)

    gm = traced(lambda x: tuple(laid(x, order) for order in orders), (x,))
    check(gm, [LEADING], (x,), 2)
    for half in HALVES:
        halved = halve(gm, [LEADING], 2, half)
        assert halved is not None
        strides = [result.stride() for result in gm(x)]
        assert [result.stride() for result in halved(x)] == strides
        assert len(set(strides)) == len(orders)


def test_graph() -> None:
    """Each input is narrowed once, each output is repeated, and tables are unchanged."""
    gm = traced(lambda x, y, t, unread: (x * y + x, x + t, t * 2, 3), (X, X + 1, TABLE, X))
    halved = halve(gm, labels_of(gm), BATCH, 1)
    assert halved is not None
    calls = [node for node in halved.graph.nodes if node.op == "call_function"]
    assert [node.args[1:] for node in calls if node.target is aten.slice.Tensor] == [(0, 1, 2), (0, 1, 2)]
    assert [node.target for node in calls].count(aten.cat.default) == 2
    shapes = {node.name: tuple(node.meta["val"].shape) for node in calls if node.target is not aten.cat.default}
    assert shapes.pop("mul_1") == (1, 4, 6)
    assert set(shapes.values()) == {(1, 4, 6)}
    table, three = halved.graph.output_node().args[0][2:]
    assert (table.name, three) == ("mul_1", 3)
    x, y = X.clone(), X + 1
    found = halved(x, y, TABLE, X)
    assert torch.equal(found[1], (x + TABLE)[1:].expand(2, 4, 6))
    assert torch.equal(found[2], TABLE * 2)


def test_equal_parts() -> None:
    """A table with a row per sample is computed as a whole, and its half is used with half of the batch."""
    gm = traced(lambda x, t: (x @ t.expand(2, 6, 4), x[:, 0] @ t[0]), (X, SQUARE[None, :, :4]))
    check(gm, labels_of(gm), (X, SQUARE[None, :, :4]))
    both = traced(lambda x, e: (x + e, x[:, 0] * e[0]), (X, TABLE[:, :1].expand(2, 1, 6)))
    check(both, [LEADING, EQUAL], (X, TABLE[:, :1].expand(2, 1, 6)))
    assert halve(both, [LEADING, SAME], BATCH, 0) is None


def test_labels_that_shapes_deny() -> None:
    """Decisions and numbers are SAME whatever the given label; a tensor without rows of samples is MIXED."""
    gm = traced(lambda x, one: (x + one,), (X, drawn()))
    assert halve(gm, [LEADING, LEADING], BATCH, 0) is None
    graph = fx.Graph()
    x, reuse = graph.placeholder("x"), graph.placeholder("reuse")
    x.meta["val"] = X
    out = graph.call_function(aten.mul.Tensor, (x, 2.0))
    out.meta["val"] = X
    graph.output((out, reuse))
    halved = halve(fx.GraphModule({}, graph), [LEADING, LEADING], BATCH, 0)
    assert halved is not None
    result, decision = halved(X, True)
    assert decision is True
    assert torch.equal(result, 2 * X[:1].expand(2, 4, 6))


def test_what_is_not_needed_may_mix() -> None:
    """Only ancestors of the outputs must not mix; a tuple of tensors is no valid output."""
    graph = traced(lambda x: (x.flip(0), x * 2), (X,)).graph
    flipped, doubled = graph.output_node().args[0]  # type: ignore[misc]
    graph.output_node().args = ((doubled,),)
    assert flipped.op == "call_function"  # type: ignore[union-attr]
    check(fx.GraphModule({}, graph), [LEADING], (X,))
    split = traced(lambda x: x.chunk(2, 1), (X,)).graph
    pair = split.output_node().all_input_nodes[0].args[0]
    split.output_node().args = ((pair,),)
    assert halve(fx.GraphModule({}, split), [LEADING], BATCH, 0) is None


def test_attributes() -> None:
    """A tensor attribute of the graph is kept."""
    gm = traced(lambda x, t: (x * t,), (X, TABLE))
    gm.register_buffer("table", TABLE)
    (table,) = gm.graph.find_nodes(op="placeholder")[1:]
    with gm.graph.inserting_before(table):
        table.replace_all_uses_with(gm.graph.get_attr("table"))
    gm.graph.erase_node(table)
    gm.recompile()
    check(gm, [LEADING], (X,))


# --- nested sites -----------------------------------------------------------------------------------------------------


def nested(
    compute: Callable[..., Any], instead: Callable[..., Any] | None = None, slot: Tensor = X
) -> tuple[fx.GraphModule, list[Batch]]:
    """A branch (x, w, reuse, slot) -> (x + 2 v, v). v is computed from x and w, or comes from slot or `instead`."""
    graph = fx.Graph()
    x, w, reuse, cached = (graph.placeholder(name) for name in ("x", "w", "reuse", "slot"))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (X, SQUARE, slot)]
    for node, value in zip((x, w, cached), fake, strict=True):
        node.meta["val"] = value
    subgraphs = {"compute": compute, "instead": instead}
    bodies = {n: inside(f, fake) for n, f in subgraphs.items() if f is not None}
    references = {name: graph.get_attr(name) for name in bodies}
    live_ins = (x, w, cached)
    call = graph.call_function(cache_or_compute, (reuse, (cached,), references.pop("compute"), live_ins), references)
    call.kwargs = {**call.kwargs, "site": "inner", "guard": "step > 0", "strategy": "reuse"}
    call.meta["values"] = (7,)
    value = graph.call_function(getitem, (call, 0))
    value.meta["val"] = fake[0]
    doubled = graph.call_function(aten.add.Tensor, (x, value), {"alpha": 2})
    doubled.meta = {"val": fake[0], "position": 9}
    graph.output((doubled, value))
    return fx.GraphModule(bodies, graph), [LEADING, SAME, SAME, LEADING]


def inside(function: Callable[..., Any], fake: list[Tensor]) -> fx.GraphModule:
    """Return the subgraph of a site, whose nodes have positions 5, 6 and so on."""
    gm = make_fx(returning_tuple(function))(*fake)
    for k, node in enumerate(n for n in gm.graph.nodes if n.op == "call_function"):
        node.meta = {"val": node.meta["val"], "position": 5 + k}
    return gm


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("instead", [None, lambda x, w, slot: slot.softmax(-1) + x], ids=["cached", "otherwise"])
def test_a_site_within(instead: Callable[..., Any] | None, reuse: bool) -> None:
    """The subgraphs of a site take and return halves; only the outer graph narrows and repeats."""
    gm, labels = nested(lambda x, w, slot: (x.view(8, 6) @ w).view(2, 4, 6), instead)
    check(gm, labels, (X, SQUARE, reuse, X.cos()))
    halved = halve(gm, labels, BATCH, 0)
    assert halved is not None
    targets = [node.target for node in halved.graph.nodes]
    assert (targets.count(aten.slice.Tensor), targets.count(aten.cat.default)) == (2, 2)
    rows = [node.meta["val"].shape[0] for node in halved.compute.graph.nodes if node.op != "output"]
    assert rows == [1, 6, 1, 4, 4, 1]  # x, w, the slot; then the tokens of one sample


def test_a_site_within_that_mixes() -> None:
    """A site that mixes samples in `compute`, in `instead` or in its slot is refused."""
    gm, labels = nested(lambda x, w, slot: x.flip(0) * 2)
    assert halve(gm, labels, BATCH, 0) is None
    gm, labels = nested(lambda x, w, slot: x * 2, lambda x, w, slot: slot - x.mean(0))
    assert halve(gm, labels, BATCH, 0) is None
    gm, labels = nested(lambda x, w, slot: x * 2, slot=drawn(3, 4, 6))
    assert halve(gm, labels, BATCH, 0) is None
    gm, labels = nested(lambda x, w, slot: w.cos().view(2, 3, 6), slot=drawn(2, 3, 6))  # a SAME value, a LEADING slot
    assert halve(gm, labels, BATCH, 0) is None


def test_places() -> None:
    """A new node comes before its first reader or after the node it was made for, and has the same home."""
    gm, labels = nested(lambda x, w, slot: torch.sin(x) @ w, lambda x, w, slot: slot + x)
    halved = halve(gm, labels, BATCH, 1)
    assert halved is not None
    places = {(node.target, i): node.meta for i, node in enumerate(halved.graph.nodes) if "position" in node.meta}
    found = sorted((meta["position"], meta.get("home"), str(key[0])) for key, meta in places.items())
    assert found[:2] == [(4.5, 5, "aten.slice.Tensor")] * 2
    last = gm.compute.graph.output_node().args[0][0].meta["position"]  # type: ignore[union-attr, index]
    assert found[2:] == [
        (last + 2**-10, last, "aten.cat.default"),
        (9, None, "aten.add.Tensor"),
        (9 + 2**-10, 9, "aten.cat.default"),
    ]
