"""The memory of CUDA graphs: where values are, the limit, and the graphs that are dropped."""

from __future__ import annotations

import gc
import threading
import weakref

import torch

from dit_rewrite.errors import GraphReason
from dit_rewrite.runtime.cuda_graphs import MOST, WARM_UP
from dit_rewrite.runtime.trajectory import Clock
from tests.helpers.chains import STEPS, W0, Chain, Expected, Lone, inputs


def test_slots_stay_where_they_are() -> None:
    """Once both variants are captured, a computed value is written where the reusing graph reads it."""
    chain = Chain()
    addresses = []
    for x in inputs(STEPS):
        chain(x, W0)
        addresses.append([value.data_ptr() for value in chain.slots])
    assert all(each == addresses[-1] for each in addresses[2 * WARM_UP + 1 :])
    assert addresses[0] != addresses[-1]


def test_shapes_have_graphs_of_their_own() -> None:
    """Another shape computes, and the first one finds its graphs again."""
    chain = Chain()
    for turn, shape in enumerate([(2, 3), (4, 3), (2, 3), (4, 3)]):
        chain.session.forget()
        expected = Expected()
        for x in inputs(STEPS, *shape, seed=turn):
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 2 * 4


def test_no_more_than_some_shapes() -> None:
    chain = Chain()
    for size in range(1, MOST + 3):
        chain.session.forget()
        chain(torch.ones(size, 3), W0)
    assert len(chain.session._graphs._all) == MOST  # type: ignore[union-attr]


def test_graphs_that_serve_a_cache() -> None:
    """They are not free while they serve it, nor, in another queue, while its values are in their buffers."""
    chain, x = Chain(), torch.ones(2, 3)
    for _ in range(4 * WARM_UP + 1):
        chain(x, W0)
    (graphs,) = chain.session._graphs._all  # type: ignore[union-attr]
    assert not graphs.is_free
    chain.device.current = 1
    chain(x, W0)
    assert not graphs.is_free, "it was a reusing step"
    chain(x, W0)
    assert graphs.is_free


def test_a_slot_moves_into_the_buffer() -> None:
    """The value that a slot had is freed when it was copied."""
    lone = Lone(lambda x, value: (x + value,), 1, cached=1)
    lone.cache.values[0] = (torch.full((1,), 7.0),)
    value = weakref.ref(lone.cache.values[0][0])
    for i in range(4):
        assert (value() is None) == (i > WARM_UP)
        assert lone(torch.full((1,), float(i)))[0].item() == i + 7


def test_over_the_limit() -> None:
    """The first capture takes the memory that there is."""
    chain, expected = Chain(limit=500), Expected()
    for x in inputs(STEPS):
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 1
    assert chain.stats.uncaptured[GraphReason.OVER_LIMIT] > 0
    assert chain.graphs.bytes > 500


def test_free_graphs_are_dropped_for_others() -> None:
    """Graphs of an ended trajectory make room for those of another shape, and their memory is free at once."""
    chain = Chain(limit=4100)
    for shape in ((2, 3), (4, 3)):
        chain.session.forget()
        for x in inputs(STEPS, *shape):
            chain(x, W0)
        if shape == (2, 3):
            gc.disable()
            (graphs,) = (weakref.ref(each) for each in chain.session._graphs._all)  # type: ignore[union-attr]
    assert graphs() is None
    gc.enable()
    assert 4000 < chain.graphs.bytes < 6000


def test_the_bytes_of_a_thread_that_has_ended() -> None:
    """They count for all threads, as long as the thread that captured the graphs runs."""
    chain = Chain()
    before = []

    def run() -> None:
        chain.session.enter(Clock(STEPS))
        for x in inputs(STEPS):
            chain(x, W0)
        before.append(chain.graphs.bytes)

    for x in inputs(STEPS):
        chain(x, W0)
    own = chain.graphs.bytes
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    del thread
    assert before == [2 * own] and own > 4000
    assert chain.graphs.bytes == own
