"""Running rewritten graphs over several steps, beside an interpreter that knows nothing of how they were rewritten."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.passes.guard import guard
from dit_rewrite.passes.guarded import Guarded, GuardedGraph
from dit_rewrite.passes.segments import Segments, cut, relevant, whole
from dit_rewrite.passes.site import Found, Site, close
from dit_rewrite.passes.specialise import Row, Variant, specialise
from dit_rewrite.passes.store import Store
from tests.passes.tracing import Traced

Values = dict[tuple[int, str], Tensor]  # what the oracle keeps from step to step: by site, and its value's node
Slots = dict[tuple[int, int], Tensor]  # what is held: by guarded site, and number of the tensor in its slot


class Dictionary(fx.Interpreter):
    """Runs a graph, but the nodes named in `kept` give that tensor, or what it and the node of a base add up to."""

    def __init__(self, gm: fx.GraphModule, kept: Mapping[str, tuple[Tensor, str | None]]) -> None:
        super().__init__(gm)
        self.kept = kept
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.kept:
            value, base = self.kept[n.name]
            self.seen[n.name] = value if base is None else self.seen[base] + value
        else:
            self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


@dataclass(frozen=True)
class Rewritten:
    """A graph with some of its sites guarded, each with what its slot holds."""

    traced: Traced
    gm: fx.GraphModule
    found: Found
    guarded: GuardedGraph
    stores: tuple[str | None, ...]

    @classmethod
    def of(cls, traced: Traced, positions: Sequence[int] | None = None) -> Rewritten:
        """With every branch guarded, or those at `positions`."""
        found = traced.sites()
        chosen = range(len(found.sites)) if positions is None else positions
        return cls.built(traced, traced.gm, found, found.sites, {i: None for i in chosen})

    @classmethod
    def with_parts(
        cls, traced: Traced, gm: fx.GraphModule, parts: Sequence[Site], chosen: Mapping[int, str | None]
    ) -> Rewritten:
        """With any sites of a graph `gm` that holds the captured one; `chosen` are indices, and their stores."""
        found = traced.sites()
        return cls.built(traced, gm, found, close(gm.graph, parts), chosen)

    @classmethod
    def built(
        cls,
        traced: Traced,
        gm: fx.GraphModule,
        found: Found,
        sites: Sequence[Site],
        chosen: Mapping[int, str | None],
    ) -> Rewritten:
        labels = [Guarded(i, f"step > {i}", "reuse", Store(store)) for i, store in chosen.items()]
        with traced.captured.fake_mode:
            guarded = guard(gm, sites, labels)
        return cls(traced, gm, found, guarded, tuple(chosen.values()))

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.guarded.sites

    @cached_property
    def whole(self) -> Segments:
        return whole(self.gm, self.sites)

    def cut(self, measured: bool = False) -> Segments:
        """The graph in segments."""
        return cut(self.gm, self.found, self.sites, measured)

    def variant(self, row: Sequence[bool], store: Sequence[bool] | None = None) -> Variant:
        """The straight-line graph of all of it for a row."""
        return specialise(self.guarded, row, self.whole, store=store)

    def inside_a_reused_one(self, row: Sequence[bool], i: int) -> bool:
        """Whether a site around this one is reused, so that it is neither computed nor looked up."""
        around = self.guarded.parents[i]
        return around is not None and (row[around] or self.inside_a_reused_one(row, around))

    def _values(self, sites: Sequence[int]) -> list[tuple[int, str, str | None]]:
        """The values of these sites, each with its base."""
        pairs = ((i, itertools.zip_longest(self.sites[i].values, self.sites[i].bases)) for i in sites)
        return [(i, value, base) for i, both in pairs for value, base in both]

    def by_dictionary(self, step: int, row: Sequence[bool], kept: Values) -> tuple[list[Any], Values]:
        """What the captured graph returns at a step when `row` says which sites are reused; and what is kept then."""
        seen_to = [i for i in range(len(row)) if not self.inside_a_reused_one(row, i)]
        reused = self._values([i for i in seen_to if row[i]])
        run = Dictionary(self.gm, {value: (kept[i, value], base) for i, value, base in reused})
        outputs = list(run.run(*self.traced.arguments[step]))
        fresh = {
            (i, value): rounded(run.seen[value] if base is None else run.seen[value] - run.seen[base], self.stores[i])
            for i, value, base in self._values([i for i in seen_to if not row[i]])
        }
        return outputs, {**kept, **fresh}

    def by_guarded_graph(self, step: int, row: Sequence[bool], slots: Slots) -> tuple[list[Any], Slots]:
        """The same by the guarded graph as it is, decisions and cached values being its inputs."""
        results = self.guarded.gm(*self.traced.arguments[step], *row, *(slots[key] for key in self.slots))
        held = results[self.guarded.num_outputs :]
        return list(results[: self.guarded.num_outputs]), dict(zip(self.slots, held, strict=True))

    def by_variant(self, step: int, row: Sequence[bool], slots: Slots) -> tuple[list[Any], Slots]:
        """The same by the straight-line graph of the row."""
        return self.string(self.whole, [self.variant(row)], step, slots)

    def by_segments(
        self, step: int, row: Sequence[bool], slots: Slots, measured: bool = False
    ) -> tuple[list[Any], Slots]:
        """The same by segments, each made of the decisions that it depends on alone."""
        segments = self.cut(measured)
        depends = relevant(self.gm, segments, self.sites, measured)
        rows = [[row[i] and i in sites for i in range(len(row))] for sites in depends]
        pieces = [specialise(self.guarded, own, segments, k) for k, own in enumerate(rows)]
        return self.string(segments, pieces, step, slots)

    def string(self, segments: Segments, pieces: Sequence[Variant], step: int, slots: Slots) -> tuple[list[Any], Slots]:
        """Run pieces one after the other: what the graph returns, and what is held then."""
        wires: dict[int, Any] = dict(enumerate(self.traced.arguments[step]))
        fresh: Slots = {}
        for piece in pieces:
            results = self.call(piece, wires, slots)
            wires.update(zip(piece.outputs, results, strict=False))
            fresh.update(zip(piece.fresh, results[len(piece.outputs) :], strict=True))
        return self.returned(wires), {**slots, **fresh}

    @staticmethod
    def call(variant: Variant, wires: Mapping[int, Any], slots: Slots) -> Sequence[Any]:
        """Call a variant with what it asks for."""
        return variant.gm(*(wires[i] for i in variant.inputs), *(slots[key] for key in variant.cached))

    def run(self, variant: Variant, step: int, kept: Mapping[str, Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
        """Call a variant of the whole graph: what the graph returns, and the fresh values by name."""
        slots = {key: kept[name] for key in variant.cached if (name := self.name(key)) in kept}
        outputs, held = self.string(self.whole, [variant], step, slots)
        return outputs, {self.name(key): held[key] for key in variant.fresh}

    def returned(self, wires: Mapping[int, Any]) -> list[Any]:
        """What the captured graph returns, by the wires that carry it."""
        position = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        outputs: Any = self.gm.graph.output_node().args[0]
        return [wires[position[out]] if isinstance(out, fx.Node) else out for out in outputs]

    @cached_property
    def slots(self) -> list[tuple[int, int]]:
        """What is held: for each guarded site the numbers of its tensors."""
        return [(i, k) for i, count in enumerate(self.guarded.held) for k in range(count)]

    def name(self, slot: tuple[int, int]) -> str:
        """The node whose value a slot holds as it is."""
        return self.sites[slot[0]].values[slot[1]]

    def names(self, slots: Sequence[tuple[int, int]]) -> list[str]:
        return [self.name(slot) for slot in slots]

    def unpacked(self, slots: Slots) -> Values:
        """What is held, put together to the values that it stands for."""
        values: Values = {}
        for i, site in enumerate(self.sites):
            held = [slots[i, k] for k in range(self.guarded.held[i])]
            for name in site.values:
                value = held.pop(0)
                values[i, name] = value.float() * held.pop(0) if value.dtype in BYTES else value
            assert held == []
        return values

    def started(self) -> tuple[Values, Slots]:
        """What is kept before the first step, other than anything computed: seen if something wrong is reused."""
        example = Dictionary(self.gm, {})
        example.run(*self.traced.arguments[0])
        kept = {
            (i, name): torch.full_like(example.seen[name], 0.25) for i, name, _ in self._values(range(len(self.sites)))
        }
        held = [tensor for (i, _), value in kept.items() for tensor in packed(value, self.stores[i])]
        rounded_off = {(i, name): rounded(value, self.stores[i]) for (i, name), value in kept.items()}
        return rounded_off, dict(zip(self.slots, held, strict=True))

    def check(self, table: Sequence[Sequence[bool]], measured: bool = False) -> None:
        """Follow a table of decisions, a row for each step, in all ways: equal bit for bit at every step."""
        expected, start = self.started()
        ways = (self.by_guarded_graph, self.by_variant, self.by_segments)
        held = [start] * len(ways)
        for step, row in enumerate(table):
            outputs, expected = self.by_dictionary(step, row, expected)
            for w, way in enumerate(ways):
                more = {"measured": measured} if w == 2 else {}
                found, held[w] = way(step, row, held[w], **more)
                assert same(found, outputs)
                values = self.unpacked(held[w])
                assert same([values[key].to(expected[key].dtype) for key in expected], list(expected.values()))

    def check_reuse_0(self) -> None:
        """With all guarded and none reused, every way returns what the captured graph and the model returned."""
        never = (False,) * len(self.sites)
        self.check([never] * len(self.traced.arguments))
        variant = self.variant(never)
        assert variant.cached == ()
        for step in range(len(self.traced.arguments)):
            outputs, _ = self.string(self.whole, [variant], step, {})
            assert same(outputs, list(self.traced.returned[step]))

    def random_table(self, seed: int) -> list[Row]:
        """Random decisions for each step."""
        chance = random.Random(seed)
        return [tuple(chance.random() < 0.5 for _ in self.sites) for _ in self.traced.arguments]


LARGEST = {"int8": 127.0, "fp8": 448.0}
BYTES = (torch.int8, torch.float8_e4m3fn)


def packed(value: Tensor, store: str | None) -> tuple[Tensor, ...]:
    """What a slot may hold of a value, written from the definition: the numbers, and one scale for each token."""
    if store is None or value.ndim < 2 or not value.is_floating_point():
        return (value,)
    if store == "bf16":
        return (value.bfloat16(),)
    scale = value.float().abs().max(-1, keepdim=True).values / LARGEST[store]
    scale = scale.masked_fill(scale == 0, 1.0)
    numbers = value.float() / scale
    numbers = numbers.round().to(torch.int8) if store == "int8" else numbers.to(torch.float8_e4m3fn)
    return numbers, scale


def rounded(value: Tensor, store: str | None) -> Tensor:
    """A value as a slot gives it back."""
    held = packed(value, store)
    return (held[0].float() * held[1] if len(held) == 2 else held[0]).to(value.dtype)


def same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether tensors are equal bit for bit."""
    pairs = list(zip(found, expected, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
