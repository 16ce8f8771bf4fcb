"""Running rewritten graphs over several steps, beside an interpreter that knows nothing of how they were rewritten."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.passes.guard import Guarded, GuardedGraph, guard
from dit_rewrite.passes.sites import Site
from dit_rewrite.passes.specialise import Row, Variant, specialise
from tests.passes.tracing import Traced

Values = dict[str, Tensor]  # what is kept from step to step: the value of each node, by its name


class Dictionary(fx.Interpreter):
    """Runs a captured graph, but the nodes named in `reuse` give what `kept` holds for them."""

    def __init__(self, gm: fx.GraphModule, kept: Values, reuse: set[str]) -> None:
        super().__init__(gm)
        self.kept, self.reuse = kept, reuse
        self.seen: Values = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = self.kept[n.name] if n.name in self.reuse else super().run_node(n)
        return self.seen[n.name]


@dataclass(frozen=True)
class Rewritten:
    """A toy's captured graph, and its guarded one with every site guarded, or those at `positions`."""

    traced: Traced
    guarded: GuardedGraph

    @classmethod
    def of(cls, traced: Traced, positions: Sequence[int] | None = None) -> Rewritten:
        sites = traced.sites().sites
        chosen = range(len(sites)) if positions is None else positions
        return cls(traced, guard(traced.gm, sites, [Guarded(i, f"step > {i}", "reuse") for i in chosen]))

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.guarded.sites

    def inside_a_reused_one(self, row: Sequence[bool], i: int) -> bool:
        """Whether a site around this one is reused, so that it is neither computed nor looked up."""
        around = self.guarded.parents[i]
        return around is not None and (row[around] or self.inside_a_reused_one(row, around))

    def by_dictionary(self, step: int, row: Sequence[bool], kept: Values) -> tuple[list[Tensor], Values]:
        """What the captured graph returns at a step when `row` says which sites are reused; and what is kept then."""
        seen_to = [i for i in range(len(row)) if not self.inside_a_reused_one(row, i)]
        run = Dictionary(self.traced.gm, kept, {name for i in seen_to if row[i] for name in self.sites[i].values})
        outputs = list(run.run(*self.traced.arguments[step]))
        fresh = {name: run.seen[name] for i in seen_to if not row[i] for name in self.sites[i].values}
        return outputs, {**kept, **fresh}

    def by_guarded_graph(self, step: int, row: Sequence[bool], kept: Values) -> tuple[list[Tensor], Values]:
        """The same by the guarded graph as it is, decisions and cached values being its inputs."""
        names = [name for site in self.sites for name in site.values]
        results = self.guarded.gm(*self.traced.arguments[step], *row, *(kept[name] for name in names))
        held = results[self.guarded.num_outputs :]
        return list(results[: self.guarded.num_outputs]), dict(zip(names, held, strict=True))

    def by_variant(self, step: int, row: Sequence[bool], kept: Values) -> tuple[list[Tensor], Values]:
        """The same by the straight-line graph of the row."""
        variant = specialise(self.guarded, row)
        results = self.run(variant, step, kept)
        fresh = dict(zip(self.names(variant.fresh), results[self.guarded.num_outputs :], strict=True))
        return list(results[: self.guarded.num_outputs]), {**kept, **fresh}

    def run(self, variant: Variant, step: int, kept: Values) -> Sequence[Tensor]:
        """Call a variant with what it asks for."""
        arguments = self.traced.arguments[step]
        return variant.gm(*(arguments[i] for i in variant.inputs), *(kept[name] for name in self.names(variant.cached)))

    def names(self, values: Sequence[tuple[int, int]]) -> list[str]:
        """The nodes of (site, index) pairs."""
        return [self.sites[i].values[k] for i, k in values]

    def check(self, table: Sequence[Sequence[bool]]) -> None:
        """Follow a table of decisions, a row for each step, in all three ways: equal bit for bit at every step."""
        names = [name for site in self.sites for name in site.values]
        first = Dictionary(self.traced.gm, {}, set())
        first.run(*self.traced.arguments[0])
        start = {name: torch.full_like(first.seen[name], 0.25) for name in names}  # seen if something wrong is reused
        expected = guarded = variant = start
        for step, row in enumerate(table):
            outputs, expected = self.by_dictionary(step, row, expected)
            by_graph, guarded = self.by_guarded_graph(step, row, guarded)
            by_variant, variant = self.by_variant(step, row, variant)
            for found, kept in ((by_graph, guarded), (by_variant, variant)):
                assert same(found, outputs)
                assert same([kept[name] for name in names], [expected[name] for name in names])

    def check_reuse_0(self) -> None:
        """With all guarded and none reused, every way returns what the captured graph and the model returned."""
        steps = range(len(self.traced.arguments))
        self.check([(False,) * len(self.sites)] * len(steps))
        variant = specialise(self.guarded, (False,) * len(self.sites))
        assert variant.cached == ()
        for step in steps:
            outputs = self.run(variant, step, {})[: self.guarded.num_outputs]
            assert same(outputs, list(self.traced.returned[step]))

    def random_table(self, seed: int) -> list[Row]:
        """Random decisions for each step."""
        chance = random.Random(seed)
        return [tuple(chance.random() < 0.5 for _ in self.sites) for _ in self.traced.arguments]


def same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether tensors are equal bit for bit."""
    pairs = list(zip(found, expected, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
