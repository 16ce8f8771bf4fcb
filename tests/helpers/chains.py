"""A hand-written graph of two segments on a fake device, the results by hand, and one variant that runs by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import DecisionReason, GraphReason
from dit_rewrite.runtime.cache import Cache, stamp_of
from dit_rewrite.runtime.cuda_graphs import WARM_UP, AllGraphs, Graphs
from dit_rewrite.runtime.decide import Choice, SiteSpec
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.runtime.history import Moment
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.segments import Executable, Segment, Wiring
from dit_rewrite.runtime.session import Session
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
        self.graphs = AllGraphs(self.device, self.stats, lambda: limit)
        self.session = Session(self.stats, lambda: limit, self.graphs)
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
        latent = torch.tensor([100.0 + self.time])  # continues from call to call, as that of a sampler does
        call = self.session.begin(Inputs(latent, self.time, (), number="timestep"))
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
    """The outputs of a chain, computed by hand."""

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
