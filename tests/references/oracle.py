"""Run rewritten graphs over several steps, and compare them with an interpreter that does not use the rewrites."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.passes.analysis.site import Found, Part, Site, close
from dit_rewrite.passes.rewrite.codec import Codec, ValueCodec
from dit_rewrite.passes.rewrite.guarded_graph import Guarded, GuardedGraph, Guidance
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from dit_rewrite.passes.rewrite.segments import Segments, cut, relevant, whole
from dit_rewrite.passes.rewrite.specialise import Variant, normalise, specialise
from tests.helpers.tracing import Traced
from tests.references.dictionary import Dictionary, Recall

Form = str | Codec | Guidance | None  # a format, a core's codec, or the half that is computed for both
Values = dict[tuple[int, str], Tensor]  # the oracle's values, by site and value node
Slots = dict[tuple[int, int], Tensor]  # slot tensors, by guarded site and index in its slot


@dataclass(frozen=True)
class Rewritten:
    """A graph with guarded sites, and the slot format of each."""

    traced: Traced
    gm: fx.GraphModule
    found: Found
    guarded: GuardedGraph
    forms: tuple[Form, ...]

    @classmethod
    def of(cls, traced: Traced, positions: Sequence[int] | None = None) -> Rewritten:
        """Guard every branch, or those at `positions`."""
        found = traced.sites()
        chosen = range(len(found.sites)) if positions is None else positions
        return cls.built(traced, traced.gm, found, found.sites, {i: None for i in chosen})

    @classmethod
    def with_parts(
        cls, traced: Traced, gm: fx.GraphModule, parts: Sequence[Site], chosen: Mapping[int, Form]
    ) -> Rewritten:
        """Guard sites of a graph `gm` that contains the captured one. `chosen` maps site indices to their formats."""
        found = traced.sites()
        return cls.built(traced, gm, found, close(gm.graph, parts), chosen)

    @classmethod
    def built(
        cls,
        traced: Traced,
        gm: fx.GraphModule,
        found: Found,
        sites: Sequence[Site],
        chosen: Mapping[int, Form],
    ) -> Rewritten:
        labels = [label(i, form) for i, form in chosen.items()]
        with traced.captured.fake_mode:
            guarded = insert_guards(gm, sites, labels)
        return cls(traced, gm, found, guarded, tuple(chosen.values()))

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.guarded.sites

    @cached_property
    def whole(self) -> Segments:
        return whole(self.gm, self.sites)

    def cut(self, measured: bool = False) -> Segments:
        """Return the graph cut into segments."""
        return cut(self.gm, self.found, self.sites, measured)

    def variant(self, row: Sequence[bool], stored: Sequence[bool] | None = None) -> Variant:
        """Return the variant of the whole graph for a row."""
        return specialise(self.guarded, row, self.whole, stored=stored)

    def inside_a_reused_one(self, row: Sequence[bool], i: int) -> bool:
        """Return whether an enclosing site is reused, so that this site is neither computed nor looked up."""
        around = self.guarded.parents[i]
        return around is not None and (row[around] or self.inside_a_reused_one(row, around))

    def _values(self, sites: Sequence[int]) -> list[tuple[int, str, str | None]]:
        """Return the values that the slots of these sites store, each with its base."""
        holding = [i for i in sites if isinstance(self.forms[i], str | None)]
        pairs = ((i, itertools.zip_longest(self.sites[i].values, self.sites[i].bases)) for i in holding)
        return [(i, value, base) for i, both in pairs for value, base in both]

    def _encoded(self, i: int, seen: Mapping[str, Any]) -> Values:
        """Return the stored tensors of a core, encoded from its value and its inputs."""
        site, codec = self.sites[i], cast("Codec", self.forms[i])
        tensors = codec.encode(seen[site.values[0]], [seen[name] for name in site.inputs])
        return {(i, str(k)): tensor for k, tensor in enumerate(tensors)}

    def _decoded(self, core: int, kept: Values) -> Recall:
        """Return a core's value, decoded from its stored tensors and its inputs."""
        site, codec = self.sites[core], cast("Codec", self.forms[core])
        source = next(i for i in self.core_states if self.sites[i].values == site.values)
        stored = [kept[source, str(k)] for k in range(self.guarded.widths[source])]
        dtype = next(node.meta["val"].dtype for node in self.gm.graph.nodes if node.name == site.values[0])
        return lambda seen: codec.decode(stored, [seen[name] for name in site.inputs], dtype)

    @property
    def core_states(self) -> list[int]:
        return [i for i, site in enumerate(self.sites) if site.part is Part.CORE_STATE]

    def _recalled(self, row: Sequence[bool], sites: Sequence[int], kept: Values) -> dict[str, Recall]:
        """Return functions that reconstruct the values of the sites that `row` reuses."""

        def recall(value: Tensor, base: str | None) -> Recall:
            return lambda seen: value if base is None else seen[base] + value

        reused = [i for i in sites if row[i]]
        found = {value: recall(kept[i, value], base) for i, value, base in self._values(reused)}
        cores = [i for i in reused if self.sites[i].part is Part.CORE]
        return found | {self.sites[i].values[0]: self._decoded(i, kept) for i in cores}

    def _halves(self, row: Sequence[bool], sites: Sequence[int]) -> list[tuple[frozenset[str], int]]:
        """Return the nodes that are computed for half of the batch because `row` reuses these sites, and the half."""
        forms = ((i, self.forms[i]) for i in sites if row[i])
        return [(self.sites[i].closure, form.half) for i, form in forms if isinstance(form, Guidance)]

    def by_dictionary(self, step: int, row: Sequence[bool], kept: Values) -> tuple[list[Any], Values]:
        """Return the captured graph's outputs for the decisions `row`, and the stored values after the step."""
        seen_to = [i for i in range(len(row)) if not self.inside_a_reused_one(row, i)]
        recalled, halves = self._recalled(row, seen_to, kept), self._halves(row, seen_to)
        run = Dictionary(self.gm, recalled, halves, self.traced.captured.static)
        outputs = list(run.run(*self.traced.arguments[step]))
        computed = [i for i in seen_to if not row[i]]
        fresh = {
            (i, value): rounded(run.seen[value] if base is None else run.seen[value] - run.seen[base], self._format(i))
            for i, value, base in self._values(computed)
        }
        for i in set(computed) & set(self.core_states):
            fresh.update(self._encoded(i, run.seen))
        return outputs, {**kept, **fresh}

    def _format(self, i: int) -> str | None:
        form = self.forms[i]
        return form if isinstance(form, str) else None

    def by_guarded_graph(self, step: int, row: Sequence[bool], slots: Slots) -> tuple[list[Any], Slots]:
        """Run the guarded graph, with decisions and slot tensors as inputs. Slots of reused sites are unchanged."""
        results = self.guarded.gm(*self.traced.arguments[step], *row, *(slots[key] for key in self.slots))
        stored = results[self.guarded.num_outputs :]
        reused = normalise(row, self.guarded.parents)
        filled = {key: value for key, value in zip(self.slots, stored, strict=True) if not reused[key[0]]}
        return list(results[: self.guarded.num_outputs]), {**slots, **filled}

    def by_variant(self, step: int, row: Sequence[bool], slots: Slots) -> tuple[list[Any], Slots]:
        """Run the variant of the row."""
        return self.string(self.whole, [self.variant(row)], step, slots)

    def by_segments(
        self, step: int, row: Sequence[bool], slots: Slots, measured: bool = False
    ) -> tuple[list[Any], Slots]:
        """Run the segments, each specialised for the decisions that it depends on."""
        segments = self.cut(measured)
        depends = relevant(self.gm, segments, self.sites, measured)
        rows = [[row[i] and i in sites for i in range(len(row))] for sites in depends]
        variants = [specialise(self.guarded, own, segments, k) for k, own in enumerate(rows)]
        return self.string(segments, variants, step, slots)

    def string(
        self, segments: Segments, variants: Sequence[Variant], step: int, slots: Slots
    ) -> tuple[list[Any], Slots]:
        """Run segments in order. Returns the graph's outputs and the slot tensors after the step."""
        wires: dict[int, Any] = dict(enumerate(self.traced.arguments[step]))
        fresh: Slots = {}
        for variant in variants:
            results = self.call(variant, wires, slots)
            wires.update(zip(variant.outputs, results, strict=False))
            fresh.update(zip(variant.fresh, results[len(variant.outputs) :], strict=True))
        return self.returned(wires), {**slots, **fresh}

    @staticmethod
    def call(variant: Variant, wires: Mapping[int, Any], slots: Slots) -> Sequence[Any]:
        """Call a variant with the inputs that it takes."""
        return variant.gm(*(wires[i] for i in variant.inputs), *(slots[key] for key in variant.cached))

    def run(self, variant: Variant, step: int, kept: Mapping[str, Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
        """Call a variant of the whole graph. Returns the graph's outputs, and the new slot tensors by name."""
        slots = {key: kept[name] for key in variant.cached if (name := self.name(key)) in kept}
        outputs, stored = self.string(self.whole, [variant], step, slots)
        return outputs, {self.name(key): stored[key] for key in variant.fresh}

    def returned(self, wires: Mapping[int, Any]) -> list[Any]:
        """Return the captured graph's outputs from the wires that carry them."""
        position = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        outputs: Any = self.gm.graph.output_node().args[0]
        return [wires[position[out]] if isinstance(out, fx.Node) else out for out in outputs]

    @cached_property
    def slots(self) -> list[tuple[int, int]]:
        """Return the (site, index) pairs of all slot tensors."""
        return [(i, k) for i, count in enumerate(self.guarded.widths) for k in range(count)]

    def name(self, slot: tuple[int, int]) -> str:
        """Return the node whose value the slot tensor stores unchanged."""
        return self.sites[slot[0]].values[slot[1]]

    def names(self, slots: Sequence[tuple[int, int]]) -> list[str]:
        return [self.name(slot) for slot in slots]

    def decoded(self, slots: Slots) -> Values:
        """Decode the slot tensors to values."""
        values: Values = {}
        for i, site in enumerate(self.sites):
            stored = [slots[i, k] for k in range(self.guarded.widths[i])]
            if i in self.core_states:
                values.update({(i, str(k)): tensor for k, tensor in enumerate(stored)})
                continue
            for name in site.values if stored else ():
                value = stored.pop(0)
                values[i, name] = value.float() * stored.pop(0) if value.dtype in BYTES else value
            assert stored == []
        return values

    def started(self) -> tuple[Values, Slots]:
        """Return wrong initial values and slot tensors, so that the comparison fails if a slot is read too early."""
        example = Dictionary(self.gm, {})
        example.run(*self.traced.arguments[0])
        kept: Values = {}
        stored: list[Tensor] = []
        for i in range(len(self.sites)):
            wrong = {(i, name): torch.full_like(example.seen[name], 0.25) for _, name, _ in self._values([i])}
            if i in self.core_states:
                wrong = {key: torch.full_like(value, 0.25) for key, value in self._encoded(i, example.seen).items()}
            stored += [tensor for value in wrong.values() for tensor in encoded(value, self._format(i))]
            kept |= {key: rounded(value, self._format(i)) for key, value in wrong.items()}
        return kept, dict(zip(self.slots, stored, strict=True))

    def check(self, table: Sequence[Sequence[bool]], measured: bool = False, tolerance: float = 0.0) -> None:
        """Follow a table of decisions, a row per step, and compare all ways of running at each step.

        Values are equal bit for bit, or within a tolerance relative to the largest element.
        """
        expected, start = self.started()
        ways = (self.by_guarded_graph, self.by_variant, self.by_segments)
        stored = [start] * len(ways)
        for step, row in enumerate(table):
            outputs, expected = self.by_dictionary(step, row, expected)
            for w, way in enumerate(ways):
                more = {"measured": measured} if w == 2 else {}
                found, stored[w] = way(step, row, stored[w], **more)
                assert same(found, outputs, tolerance)
                values = self.decoded(stored[w])
                assert same(
                    [values[key].to(expected[key].dtype) for key in expected], list(expected.values()), tolerance
                )

    def check_reuse_0(self) -> None:
        """With all sites guarded and computed, every way of running equals the captured graph and the model."""
        never = (False,) * len(self.sites)
        self.check([never] * len(self.traced.arguments))
        variant = self.variant(never)
        assert variant.cached == ()
        for step in range(len(self.traced.arguments)):
            outputs, _ = self.string(self.whole, [variant], step, {})
            assert same(outputs, list(self.traced.returned[step]))

    def random_table(self, seed: int) -> list[DecisionRow]:
        """Return random decisions for each step."""
        chance = random.Random(seed)
        return [tuple(chance.random() < 0.5 for _ in self.sites) for _ in self.traced.arguments]


def label(i: int, form: Form) -> Guarded:
    """Return the Guarded of a site."""
    if isinstance(form, Guidance):
        return Guarded(i, f"step > {i}", "half", guidance=form)
    return Guarded(i, f"step > {i}", "reuse", ValueCodec(form) if isinstance(form, str | None) else form)


LARGEST = {"int8": 127.0, "fp8": 448.0}
BYTES = (torch.int8, torch.float8_e4m3fn)


def encoded(value: Tensor, format: str | None) -> tuple[Tensor, ...]:
    """Return the stored tensors of a value, written from the definition: numbers, and one scale per token."""
    if format is None or value.ndim < 2 or not value.is_floating_point():
        return (value,)
    if format == "bf16":
        return (value.bfloat16(),)
    scale = value.float().abs().max(-1, keepdim=True).values / LARGEST[format]
    scale = scale.masked_fill(scale == 0, 1.0)
    numbers = value.float() / scale
    numbers = numbers.round().to(torch.int8) if format == "int8" else numbers.to(torch.float8_e4m3fn)
    return numbers, scale


def rounded(value: Tensor, format: str | None) -> Tensor:
    """Return a value after encoding and decoding."""
    stored = encoded(value, format)
    return (stored[0].float() * stored[1] if len(stored) == 2 else stored[0]).to(value.dtype)


def same(found: Sequence[Any], expected: Sequence[Any], tolerance: float = 0.0) -> bool:
    """Return whether tensors are equal bit for bit, or within a tolerance relative to the largest element."""
    pairs = list(zip(found, expected, strict=True))
    return all(_alike(a, b, tolerance) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    near = torch.equal(a, b) or bool((a - b).abs().max() <= tolerance * b.abs().max())
    return a.dtype == b.dtype and a.shape == b.shape and near
