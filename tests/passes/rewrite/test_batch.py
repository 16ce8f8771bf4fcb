"""Batch labels against an oracle that sets one sample to NaN and observes which rows change."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dit_rewrite.errors import BadArgument
from dit_rewrite.passes.rewrite.batch import Batch, batch_labels
from tests.helpers.batches import BATCH, HEADS, OPS, SQUARE, TABLE, Op, Recorded, X, chained, drawn, ours, traced

SAME, EQUAL, LEADING, MIXED = Batch.SAME, Batch.EQUAL, Batch.LEADING, Batch.MIXED


def label_of(function: Callable[..., Any], *inputs: Tensor, batch: int = BATCH) -> Batch:
    """Return the label of a function's result."""
    gm = traced(function, inputs)
    (result,) = gm.graph.output_node().all_input_nodes
    return batch_labels(gm.graph, batch)[result]


def changed_parts(function: Callable[..., Any], *inputs: Tensor, sample: int = 1, batch: int = BATCH) -> set[int]:
    """Return which of the equal parts of a result's rows change if a sample becomes NaN."""

    def parts(result: Tensor) -> tuple[Tensor, ...]:
        divides = result.ndim > 0 and result.shape[0] % batch == 0
        return result.chunk(batch) if divides else (result,)

    spoilt = [x.clone() for x in inputs]
    for x in spoilt:
        if x.ndim and x.shape[0] == batch:
            x[sample] = torch.nan
    pairs = zip(parts(function(*inputs)), parts(function(*spoilt)), strict=True)
    return {i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)}


@pytest.mark.parametrize("op", OPS, ids=operator.attrgetter("name"))
def test_ops(op: Op) -> None:
    """Ops that keep samples apart are LEADING, and ops that mix samples are MIXED."""
    assert label_of(op.function, *op.inputs) is (MIXED if op.mixes else LEADING)
    changed = changed_parts(op.function, *op.inputs)
    assert changed - {1} if op.mixes else changed == {1}


def test_random_functions() -> None:
    """No part of a LEADING node depends on another sample; the random functions give enough labels of both kinds."""
    ends = []
    for seed in range(40):
        gm = traced(chained(seed), (X,))
        labels = batch_labels(gm.graph, BATCH)
        clean = Recorded(gm, X).seen
        for sample in range(BATCH):
            spoilt = Recorded(gm, X.index_fill(0, torch.tensor(sample), torch.nan)).seen
            for node in (
                node for node in labels if labels[node] in (LEADING, SAME) and isinstance(clean[node], Tensor)
            ):
                parts = zip(clean[node].chunk(BATCH), spoilt[node].chunk(BATCH), strict=True)
                changed = {i for i, (a, b) in enumerate(parts) if not torch.equal(a, b)}
                assert changed <= ({sample} if labels[node] is LEADING else set())
        ends.append(labels[gm.graph.output_node().all_input_nodes[0]])
    assert set(ends) == {LEADING, MIXED}
    assert min(ends.count(LEADING), ends.count(MIXED)) >= 10


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_other_batches(batch: int) -> None:
    """Batches of other sizes: four samples may not be merged to two rows, and one sample gives labels too."""
    x = drawn(batch, 6, 4)
    assert label_of(lambda x: x.reshape(2 * batch, 3, 4), x, batch=batch) is LEADING
    assert label_of(lambda x: x.softmax(0), x, batch=batch) is MIXED
    if batch == 4:
        assert label_of(lambda x: x.reshape(2, 12, 4), x, batch=batch) is MIXED


def test_inputs() -> None:
    """Weights, tables with another number of rows, numbers and 0-dimensional tensors are SAME; a batch is LEADING."""
    gm = traced(lambda x, ids, weight, one: x + ids[:2].sum() + weight + one, (X, drawn(4, 3), drawn(2, 4, 6), drawn()))
    inputs = gm.graph.find_nodes(op="placeholder")
    labels = batch_labels(gm.graph, BATCH, static={2})
    assert [labels[node] for node in inputs] == [LEADING, SAME, SAME, SAME]
    assert [batch_labels(gm.graph, BATCH)[node] for node in inputs] == [LEADING, SAME, LEADING, SAME]
    assert [batch_labels(gm.graph, 4)[node] for node in inputs] == [SAME, LEADING, SAME, SAME]


@pytest.mark.parametrize(
    ("function", "label"),
    [
        (lambda t: t * 2, SAME),
        (lambda t: t.sum(0), SAME),
        (lambda t: t[0].t(), SAME),
        (lambda t: t.expand(2, 4, 6), EQUAL),
        (lambda t: t.expand(4, 4, 6), EQUAL),
        (lambda t: t.expand(3, 4, 6), SAME),
        (lambda t: t[0].expand(2, 4, 6) * t[0] + 1, EQUAL),
        (lambda t: t.expand(2, 4, 6).transpose(0, 1), SAME),
        (lambda t: t.repeat(2, 1, 1), EQUAL),
        (lambda t: t[0, :2].repeat(1, 2), SAME),
        (lambda t: torch.ones(2, 4, dtype=t.dtype) + t[0, :, 0], EQUAL),
        (lambda t: torch.arange(2) + t[0, 0, 0], SAME),
    ],
)
def test_tables(function: Callable[[Tensor], Tensor], label: Batch) -> None:
    """A value that does not depend on the batch is SAME, or EQUAL if it has a row per sample."""
    assert label_of(function, TABLE) is label
    result = function(TABLE)
    if label is EQUAL:
        assert torch.equal(*result.chunk(2))


@pytest.mark.parametrize(
    ("function", "label"),
    [
        (lambda x, t: x + t.expand(2, 4, 6), LEADING),  # used as rows of samples
        (lambda x, t: x @ t[0].t().expand(2, 6, 4), LEADING),
        (lambda x, t: torch.cat([t.expand(2, 4, 6), x], 1), LEADING),
        (lambda x, t: x[:, 0] @ t[0, 0].expand(2, 6).t(), LEADING),  # the same node used as a table
        (lambda x, t: torch.cat([t[0, :2, None].clone(), t[0, 0].expand(2, 1, 6)], 1) + x[:, :2], MIXED),
        (lambda x, t: x + t[0, :2, None], MIXED),  # two rows of a table are not two samples
    ],
)
def test_tables_beside_samples(function: Callable[..., Tensor], label: Batch) -> None:
    """EQUAL values combine with samples and with tables; a table with as many rows as samples combines with neither."""
    assert label_of(function, X, TABLE) is label


def test_without_a_rule() -> None:
    """An op without a rule, a random op, and one number for all samples are MIXED."""
    assert label_of(lambda x: x.cumprod(1), X) is MIXED
    assert label_of(lambda t: t.cumprod(1), TABLE) is SAME
    assert label_of(torch.rand_like, X) is MIXED
    assert label_of(lambda q: ours.attention_entropy(q, q), HEADS) is MIXED
    assert label_of(lambda x, w: (x.transpose(0, 1) @ w).transpose(0, 1), X, SQUARE) is MIXED  # MIXED stays MIXED


def test_symbolic_sizes() -> None:
    """Symbolic sizes prove nothing, and the analysis adds no Dynamo guard."""
    gm = make_fx(lambda x: x * 2, tracing_mode="symbolic")(X)
    (result,) = gm.graph.output_node().all_input_nodes
    environment = gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode.shape_env
    before = len(environment.guards)
    assert batch_labels(gm.graph, BATCH)[result] is SAME  # symbolic rows are not counted
    assert len(environment.guards) == before


def test_batch_below_1() -> None:
    with pytest.raises(BadArgument, match="batch=0"):
        batch_labels(fx.Graph(), 0)
