"""CUDA graphs with hand-written variants, on a fake device that overwrites all memory that no buffer owns."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import DecisionReason, GraphReason
from dit_rewrite.runtime import captured
from dit_rewrite.runtime.cache import Cache, stamp_of
from dit_rewrite.runtime.cuda_capture import CudaDevice
from dit_rewrite.runtime.cuda_graphs import CAPTURES, MOST, WARM_UP, Graphs
from dit_rewrite.runtime.decide import Choice, SiteSpec
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.runtime.history import Moment
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.segments import Executable, Segment, Wiring
from dit_rewrite.runtime.session import Session
from dit_rewrite.runtime.static_buffers import Buffer, Layout, duplicates, fill
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Clock
from tests.helpers.fake_graphs import FakeDevice

STEPS = 6 * (WARM_UP + 1)
X, W, N, Y, Z = range(5)  # wires
BIG = 1 << 30


def odd(moment: Moment, *_: object) -> Choice:
    reuse = moment.step % 2 == 1
    return Choice(reuse, DecisionReason.RULE if reuse else DecisionReason.NO_RULE)


def verifying(moment: Moment, *_: object) -> Choice:
    """Reuse at odd steps. At half of the even ones, the site computes and leaves its slot as it is."""
    return Choice(False, DecisionReason.VERIFIED) if moment.step and moment.step % 4 == 0 else odd(moment)


class Chain:
    """``x, w, n -> z``, where ``y = x + x * w`` and ``z = y + n * y.abs()``, in two segments.

    The products are sites; the caller gets z, and with `leak` a view of the second product.
    """

    def __init__(
        self, leak: bool = False, choose: Any = odd, limit: int = 1 << 30, plain: tuple[int, ...] = ()
    ) -> None:
        """Segments in `plain` cannot be captured."""
        self.device, self.stats, self.leak, self.plain = FakeDevice(), Stats(), leak, plain
        self.session = Session(self.stats, lambda: limit, self.device)
        self.session.enter(Clock(STEPS))
        sites = [SiteSpec("first", "mlp", 0, None, choose), SiteSpec("second", "mlp", 1, None, choose)]
        wiring = Wiring(5 + leak, 3, (Z, 5) if leak else (Z,), static=frozenset({W}))
        segments = [Segment((0,)), Segment((1,), spent=(Y,))]
        self.graph = CompiledGraph(0, sites, 2, wiring, segments, self.session, self.compile, 0, torch.dist)
        self.time = 0.0

    def compile(self, segment: int, row: DecisionRow) -> Executable:
        slots, why = (((segment, 0),), ()) if row[0] else ((), ((segment, 0),)), None
        if segment in self.plain:
            why = GraphReason.READS_DEVICE
        if segment == 0:
            run = self.add if row[0] else self.first
            return Executable(run, (X,) if row[0] else (X, W), *self.ends(slots, (Y,)), uncapturable=why)
        outputs = (Z, 5) if self.leak else (Z,)
        run = self.again if row[0] else self.second
        return Executable(run, (Y,) if row[0] else (Y, N), *self.ends(slots, outputs), uncapturable=why)

    @staticmethod
    def ends(slots: Any, outputs: tuple[int, ...]) -> tuple[Any, ...]:
        cached, fresh = slots
        return cached, outputs, fresh

    @staticmethod
    def first(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x + x * w, x * w

    @staticmethod
    def add(x: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (x + value,)

    def second(self, y: Tensor, n: int) -> tuple[Tensor, ...]:
        value = n * y.abs()
        return (y + value, *((value.view(-1),) if self.leak else ()), value)

    def again(self, y: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (y + value, *((value.view(-1),) if self.leak else ()))

    def __call__(self, x: Tensor, w: Tensor, n: int = 2) -> list[Tensor]:
        self.time -= 1.0
        call = self.session.begin(Inputs(x, self.time, ()))
        outputs = self.graph([x, w, n])
        self.session.end(call)
        self.device.poison()
        return list(outputs)

    @property
    def slots(self) -> list[Tensor]:
        (cache,) = call_caches(self.session)
        return [value for values in cache.values if values is not None for value in values]


def call_caches(session: Session) -> list[Any]:
    assert session.explicit is not None
    return [cache for stream in session.explicit.trajectory.streams.all for cache in stream.caches.values()]


class Expected:
    """What a chain returns, computed by hand."""

    def __init__(self) -> None:
        self.step, self.values = 0, (torch.empty(0), torch.empty(0))

    def __call__(self, x: Tensor, w: Tensor, n: int = 2, compute: bool | None = None) -> Tensor:
        first, second = self.values
        if self.step % 2 == 0 if compute is None else compute:
            first = x * w
            second = n * (x + first).abs()
            self.values = first, second
        self.step += 1
        return x + first + second


def inputs(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, *(shape or (2, 3)), generator=torch.Generator().manual_seed(seed)))


W0 = torch.tensor([0.5, -2.0, 3.0])


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("plain", [(), (0,), (1,)])
def test_a_trajectory(leak: bool, plain: tuple[int, ...]) -> None:
    """Outputs keep their values, also where the caller writes to one, and where a segment runs without a graph."""
    chain, expected = Chain(leak, plain=plain), Expected()
    given = inputs(STEPS)
    wanted = [expected(x, W0) for x in given]
    found = []
    for x in given:
        z, *view = chain(x.clone(), W0)
        for each in view:
            each.zero_()
        found.append(z)
    assert all(map(torch.equal, found, wanted))
    segments = 2 - len(plain)
    assert chain.stats.captures == 2 * segments
    assert chain.stats.replays == segments * (STEPS - 2 * WARM_UP)
    warm = {GraphReason.WARM_UP: 2 * segments * WARM_UP}
    assert chain.stats.uncaptured == warm | ({GraphReason.READS_DEVICE: STEPS} if plain else {})


class Passing(Chain):
    """A chain whose second segment returns views of its input, to the caller and to its slot."""

    def second(self, y: Tensor, n: int) -> tuple[Tensor, ...]:
        return y.view_as(y), y.view_as(y)


def test_views_of_buffers() -> None:
    """Without a graph, a segment may return views of what another one's graph has written, and will write again."""
    chain, found, wanted = Passing(plain=(1,)), [], []
    for i, x in enumerate(inputs(STEPS)):
        first = x * W0 if i % 2 == 0 else first  # noqa: F821
        second = x + first if i % 2 == 0 else second  # noqa: F821
        wanted.append(x + first + (second if i % 2 else 0))
        found.append(chain(x, W0)[0])
    assert all(map(torch.equal, found, wanted))


def test_an_output_that_is_a_slot() -> None:
    """Whether outputs alias slots is not concluded from a call that a graph has served."""

    def choose(moment: Moment, layer: int, *_: object) -> Choice:
        return Choice(True, DecisionReason.RULE) if layer == 0 and moment.step >= 8 else odd(moment)

    chain = Chain(leak=True, plain=(0,), choose=choose)
    for i, x in enumerate(inputs(14)):
        z, view = chain(x, W0, 3 if i == 10 else 2)
        if i % 2 == 0:
            value = view.clone()
        assert torch.equal(view, value)
        view.zero_()
    assert chain.stats.uncaptured[GraphReason.CHANGED_NUMBER] == 1


def test_slots_stay_where_they_are() -> None:
    """Once both variants are captured, a computed value is written where the reusing graph reads it."""
    chain = Chain()
    addresses = []
    for x in inputs(STEPS):
        chain(x, W0)
        addresses.append([value.data_ptr() for value in chain.slots])
    assert all(each == addresses[-1] for each in addresses[2 * WARM_UP + 1 :])
    assert addresses[0] != addresses[-1]


def test_an_input_may_be_overwritten_behind_the_call() -> None:
    chain, expected, x = Chain(), Expected(), torch.empty(2, 3)
    for given in inputs(STEPS):
        assert torch.equal(chain(x.copy_(given), W0)[0], expected(given, W0))
        x.fill_(torch.nan)


def test_a_second_trajectory_uses_the_same_graphs() -> None:
    chain = Chain()
    for seed in range(3):
        chain.session.forget()
        expected = Expected()
        for x in inputs(STEPS, seed=seed):
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 4


def test_shapes_have_graphs_of_their_own() -> None:
    """Another shape computes, and the first one finds its graphs again."""
    chain = Chain()
    for turn, shape in enumerate([(2, 3), (4, 3), (2, 3), (4, 3)]):
        chain.session.forget()
        expected = Expected()
        for x in inputs(STEPS, *shape, seed=turn):
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 2 * 4


def test_a_shape_changes_within_a_trajectory() -> None:
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        given = x if i % 6 < 3 else torch.cat([x, x])
        assert torch.equal(chain(given, W0)[0], expected(given, W0, compute=i % 2 == 0 or i % 3 == 0))


def test_no_more_than_some_shapes() -> None:
    chain = Chain()
    for size in range(1, MOST + 3):
        chain.session.forget()
        chain(torch.ones(size, 3), W0)
    assert len(chain.session._graphs._all) == MOST  # type: ignore[union-attr]


def test_moved_weights() -> None:
    """A captured graph reads its weights where they were; where they have moved, it is captured again, a few times."""
    chain, weight = Chain(), W0.clone()
    for turn in range(CAPTURES + 1):
        chain.session.forget()
        expected = Expected()
        for x in inputs(STEPS, seed=turn):
            assert torch.equal(chain(x, weight)[0], expected(x, weight))
        weight.data = torch.randn(3)
    assert chain.stats.uncaptured[GraphReason.MOVED_WEIGHTS] == CAPTURES
    assert chain.stats.uncaptured[GraphReason.WEIGHTS_MOVE] == STEPS / 2 - 1
    assert chain.stats.captures == 3 + CAPTURES


def test_weights_that_are_changed_in_place() -> None:
    """The graph reads the new values. They empty the slots, which a step that computes fills again."""
    chain, expected, weight = Chain(), Expected(), W0.clone()
    for x in inputs(STEPS):
        assert torch.equal(chain(x, weight)[0], expected(x, weight))
        if expected.step % 2 == 0:
            weight.mul_(1.5)


def test_another_number_runs_without_the_graph() -> None:
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        n = 3 if i == STEPS - 2 else 2
        assert torch.equal(chain(x, W0, n)[0], expected(x, W0, n))
    assert chain.stats.uncaptured[GraphReason.CHANGED_NUMBER] == 1


def test_a_verified_slot_is_not_overwritten() -> None:
    """A step that computes for a comparison leaves the slot, so it must not write where the slot's value is."""
    chain, expected = Chain(choose=verifying), Expected()
    for i, x in enumerate(inputs(STEPS)):
        kept = expected.values
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
        if i and i % 4 == 0:
            expected.values = kept
    assert chain.stats.uncaptured[GraphReason.SLOT_IN_USE] > 2


def test_another_queue() -> None:
    """Graphs of one pool may not run side by side, so another CUDA stream has a pool of its own."""
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(2 * STEPS)):
        chain.device.current = i // 3 % 2
        chain.session.explicit.clock.num_steps = 2 * STEPS  # type: ignore[union-attr]
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    first, second = chain.device.pools
    assert first.captures and second.captures


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


def test_a_failed_capture() -> None:
    chain, expected = Chain(), Expected()
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        for x in inputs(STEPS):
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
            chain.device.pools[0].fails = True
    assert chain.stats.uncaptured[GraphReason.CAPTURE_FAILED] == 2 * (STEPS - 2 * WARM_UP)
    assert not chain.stats.captures


def test_over_the_limit() -> None:
    """The first capture takes the memory that there is."""
    chain, expected = Chain(limit=500), Expected()
    for x in inputs(STEPS):
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 1
    assert chain.stats.uncaptured[GraphReason.OVER_LIMIT] > 0
    assert chain.stats.graph_bytes > 500


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
    assert 4000 < chain.stats.graph_bytes < 6000


def test_a_capture_by_the_caller() -> None:
    """Where the caller captures calls itself, they run without graphs, on what the slots have."""
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        chain.device.current = GraphReason.CAPTURING if i in (7, 9, 10) else 0
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.uncaptured[GraphReason.CAPTURING] == 3
    assert chain.stats.captures == 4, "the graphs from before serve again"


def test_an_observed_call_runs_without_graphs() -> None:
    """The observer keeps values that a replay would overwrite."""
    chain, expected, seen = Chain(), Expected(), []
    for i, x in enumerate(inputs(STEPS)):
        chain.session.observer = seen.append if i > STEPS - 3 else None
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.uncaptured[GraphReason.OBSERVED] == 2 == len(seen)


def test_inference_mode_and_no_grad_share_graphs() -> None:
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        with torch.inference_mode(i % 3 == 0), torch.no_grad():
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 4


class Lone:
    """One variant of one segment, run by itself."""

    def __init__(self, run: Any, given: int, cached: int = 0, fresh: int = 0, hoisted: int = 0, **site: Any) -> None:
        self.device, self.stats = FakeDevice(), Stats()
        self.graphs = Graphs(self.device, self.stats, lambda: BIG)
        places = tuple((0, k) for k in range(max(cached, fresh)))
        self.run = Executable(run, tuple(range(given)), places[:cached], (given,), places[:fresh])
        self.wiring = Wiring(given + 1, given, (given,), num_hoisted=hoisted)
        self.sites = [SiteSpec("site", "mlp", 0, None, odd, **site)]
        self.cache = Cache(1)

    def __call__(self, *given: Any) -> list[Any]:

        served = self.graphs.serve(
            0, self.cache, stamp_of([a for a in given if isinstance(a, Tensor)]), self.wiring, self.sites
        )
        assert served is not None
        self.cache.graphs = served
        wires = [*given, *[None] * len(self.run.outputs)]
        fresh = served.execute((0, (True,)), self.run, wires, self.cache.values, (), self.cache)
        self.device.poison()
        return [*wires[len(given) :], *(value for _, value in fresh)]


def test_tensors_on_two_devices() -> None:
    lone = Lone(lambda x, y: (x + 1,), 2)
    for _ in range(4):
        assert lone(torch.zeros(2), torch.zeros(2, device="meta"))[0].tolist() == [1, 1]
    assert lone.stats.uncaptured == Counter({GraphReason.MIXED_DEVICES: 4})


def test_the_device_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that comes as a tensor on the CPU, as the time may, is not where the model is."""
    lone, asked = Lone(lambda t, x: (x + 1,), 2), []
    monkeypatch.setattr(lone.device, "queue", asked.append)
    lone(torch.tensor(0.5), torch.zeros(2, device="meta"))
    lone(torch.tensor(0.5), torch.zeros(2))
    assert [device.type for device in asked] == ["meta", "cpu"]


def test_a_state_that_is_updated_in_place() -> None:
    def count(x: Tensor, counters: Tensor) -> tuple[Tensor]:
        return (x + counters.add_(1),)

    lone = Lone(count, 1, cached=1, counters=0)
    lone.cache.values[0] = (torch.zeros(1),)
    assert [lone(torch.zeros(1))[0].item() for _ in range(4)] == [1, 2, 3, 4]
    assert lone.stats.uncaptured == Counter({GraphReason.STATE_IN_PLACE: 4})


def test_a_value_of_the_slot_that_the_graph_fills() -> None:
    """A result that is a view of the old value is copied before the new one is written over it."""

    def swap(x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        return old.view(-1), x * 2

    lone = Lone(swap, 1, cached=1, fresh=1)
    lone.cache.values[0] = (torch.zeros(1, 1),)
    before = 0.0
    for i in range(1, 7):
        old, new = lone(torch.full((1, 1), float(i)))
        assert old.item() == before
        held, before = new, 2.0 * i
        assert held.item() == before
        lone.cache.values[0] = (held.clone(),)
    assert lone.stats.replays == 4


def test_hoisted_values_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody changes a hoisted value, so its buffer is filled when there is another one. An input is always copied."""
    counts: list[int] = []
    monkeypatch.setattr(captured, "fill", lambda to, values: (counts.append(len(to)), fill(to, values)))
    lone, given, hoisted = Lone(lambda x, hoisted: (x + hoisted,), 2, hoisted=1), torch.zeros(1), torch.zeros(1)
    for i in range(8):
        hoisted = torch.full((1,), 5.0) if i == 5 else hoisted
        assert lone(given.fill_(i), hoisted)[0].item() == i + (5 if i >= 5 else 0)
    assert [count for count in counts if count] == [2, 1, 1, 2, 1, 1]


def test_repeated_memory() -> None:
    """An expanded tensor is kept expanded. A graph that was captured for one does not run on others."""
    lone = Lone(lambda x: (x.sum() + 0 * x,), 1)
    for i in range(1, 5):
        assert lone(torch.full((2, 1), float(i)).expand(2, 3))[0][0, 0] == 6 * i
    assert lone.stats.replays == 2
    assert lone(torch.arange(6.0).view(2, 3))[0][0, 0] == 15
    assert lone.stats.uncaptured[GraphReason.CHANGED_LAYOUT] == 1


def test_buffers() -> None:
    value = torch.randn(3, 4).T
    buffer = Buffer(Layout.of(value))
    assert buffer.tensor.stride() == value.stride() and not buffer.is_copy_of(value)
    fill([buffer], [value])
    assert torch.equal(buffer.tensor, value)
    buffer.note_source(value)
    assert buffer.is_copy_of(value) and not buffer.is_copy_of(value.clone())
    assert buffer.fits(value.contiguous())
    for other in (value[:3], value.double(), 3):
        assert not buffer.fits(other)
    (copied,) = duplicates([value], [buffer.layout])
    assert torch.equal(copied, value) and copied.stride() == value.stride()


def test_a_cpu_has_no_graphs() -> None:
    assert CudaDevice().queue(torch.device("cpu")) is GraphReason.NO_GPU
