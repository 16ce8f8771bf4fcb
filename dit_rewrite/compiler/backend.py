"""The torch.compile backend: it runs the passes over each captured graph and hands the result to dispatch."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.compiler import lowering
from dit_rewrite.compiler.bind import Placed, place
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.compiler.partition import Layout
from dit_rewrite.compiler.simulate import simulate
from dit_rewrite.kernels.relative_l1 import relative_l1
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.site import Found, Part
from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.analysis.structure import structure
from dit_rewrite.passes.capture.capture import Captured, capture
from dit_rewrite.passes.guards.symbols import measured
from dit_rewrite.passes.rewrite.guarded_graph import Guarded, GuardedGraph
from dit_rewrite.passes.rewrite.insert_guards import guard
from dit_rewrite.passes.rewrite.segments import whole
from dit_rewrite.passes.rewrite.specialise import Row, Variant, prologue, specialise
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.site_rules import SiteRules, forced
from dit_rewrite.policy.strategies import GuidanceDelta, ShareGuidance
from dit_rewrite.runtime.decide import NO_SLOT, Choose, SiteSpec
from dit_rewrite.runtime.dispatch import Graph
from dit_rewrite.runtime.pieces import Executable
from dit_rewrite.runtime.session import Session
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Trajectory


@dataclass
class Rewritten:
    """One captured graph with all that the passes made of it. ``variants`` are by piece and row."""

    captured: Captured
    placed: Placed
    guarded: GuardedGraph
    layout: Layout
    graph: Graph
    variants: dict[tuple[int, Row], Variant] = field(default_factory=dict)
    prologue: Variant | None = None
    compiled: dict[Any, tuple[Variant, Callable[..., Any]]] = field(default_factory=dict)  # by structure

    @property
    def found(self) -> Found:
        return self.placed.found

    @property
    def rules(self) -> tuple[SiteRules, ...]:
        return self.placed.rules

    @property
    def reached(self) -> tuple[int, ...]:
        """The indices of the sites that are guarded."""
        return self.placed.reached

    @property
    def held_bytes(self) -> dict[int, int]:
        """For each guarded site, by its index among all sites, the bytes that its slot holds of a stream."""
        slots = zip(self.reached, self.guarded.stored, strict=False)  # less the hoisted
        return {i: sum(map(cost.stored_bytes, slot)) for i, slot in slots}

    def straight(self, row: Row) -> Variant:
        """All of the graph under a row of decisions, as one piece; for people to look at."""
        hoisted = (True,) * (len(self.guarded.sites) - len(row))
        return specialise(self.guarded, (*row, *hoisted), whole(self.placed.gm, self.layout.sites))

    @property
    def most_reused(self) -> Row:
        """The row that reuses all that any compiled code reuses."""
        row = [False] * len(self.layout.sites)
        for number, part in self.variants:
            for site, reused in zip(self.layout.depends[number], part, strict=True):
                row[site] |= reused
        return tuple(row)


class Backend:
    """Compared by identity: Dynamo would share one graph between two models whose backends are equal."""

    def __init__(
        self,
        model: torch.nn.Module,
        policy: Policy,
        lowering: Lowering,
        force: bool = False,
        observe: Callable[[Rewritten], None] | None = None,
        store: int | None = None,
        hoist: bool = True,
        cache_limit: int | None = None,
    ) -> None:
        """`force` makes every decision compute, `store` limits how many sites' fresh values are returned; both are
        for `verify`. `observe` is called with each rewritten graph. The streams of a trajectory hold at most
        `cache_limit` bytes, by default half of the memory of the model's device."""
        self.policy, self.lowering, self.force, self.observe, self.store = policy, lowering, force, observe, store
        self.hoist = hoist
        self.stats = Stats()
        self._model = weakref.ref(model)  # the model holds its backend
        self.cache_limit = cache_limit
        self.session = Session(self.stats, self._limit)
        self.rewritten: list[Rewritten] = []
        self.breaks: Counter[str] = Counter()  # graph breaks by place and reason
        self._compiles: set[Any] = set()
        self._compiling, self._first_call = threading.RLock(), threading.RLock()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """What Dynamo calls with each graph that it captured."""
        self._count(gm)
        call = self.session.call
        if call is None:
            return capture(gm, example_inputs, self._rewrite)
        return capture(gm, example_inputs, self._rewrite, call.conditioning, call.inputs.tensors)

    def capturing(self) -> contextlib.AbstractContextManager[Any]:
        """To be entered around a call: of threads whose first calls come together one captures, for all of them."""
        return contextlib.nullcontext() if self.rewritten else self._first_call

    def _count(self, gm: fx.GraphModule) -> None:
        """Count recompiles and graph breaks. Dynamo may start one compilation over, with the same id: that is none."""
        compile_id = torch_compat.compile_id()
        if compile_id is None or compile_id in self._compiles:
            return
        self.stats.add("recompiles", any(compile_id.frame_id == other.frame_id for other in self._compiles))
        if torch_compat.is_broken(gm):
            self.stats.add("graph_breaks")
            self.breaks[torch_compat.break_reason(gm)] += 1
        self._compiles.add(compile_id)

    def _rewrite(self, captured: Captured) -> Graph:
        with self._compiling:
            return self._rewrite_alone(captured)

    def _rewrite_alone(self, captured: Captured) -> Graph:
        found = find_sites(captured.gm, captured.static, captured.steady if self.hoist else None)
        placed = place(captured, found, self.policy, self._is_whole(captured), self.hoist)
        labels = placed.labels
        hoisted = placed.found.hoisted is not None
        moved = [Guarded(len(placed.found.sites), "conditioning unchanged", "hoist")] if hoisted else []
        guarded = guard(placed.gm, placed.found.all, [*labels, *moved])
        trajectory = self.session.call.trajectory if self.session.call is not None else Trajectory(None)
        specs = [self._spec(guarded, k, placed.rules[label.site]) for k, label in enumerate(labels)]
        measures = bool(measured(self.policy.mentions))
        rows = simulate(specs, trajectory.num_steps, trajectory.noise, self.policy.streams, measures)
        layout = Layout.of(placed, guarded, rows, self.lowering, self.policy)
        rewritten = self._dispatched(captured, placed, guarded, layout, layout.wired(specs))
        if hoisted:
            rewritten.graph.prologue = self._compile_prologue(rewritten)
        for number, row in layout.foreseen(rows):
            rewritten.graph.add_variant(number, row)
        self.rewritten.append(rewritten)
        if self.observe is not None:
            self.observe(rewritten)
        return rewritten.graph

    def _dispatched(
        self,
        captured: Captured,
        placed: Placed,
        guarded: GuardedGraph,
        layout: Layout,
        specs: Sequence[SiteSpec],
    ) -> Rewritten:
        rewritten: Rewritten

        def compile_variant(number: int, row: Row) -> Executable | None:
            return self._compile(rewritten, number, row)

        graph = Graph(
            len(self.rewritten),
            specs,
            placed.found.num_layers,
            layout.wiring(captured),
            layout.pieces(),
            self.session,
            compile_variant,
            self.policy.lag,
            relative_l1,
        )
        rewritten = Rewritten(captured, placed, guarded, layout, graph)
        return rewritten

    def _is_whole(self, captured: Captured) -> bool:
        """Whether this graph is all of the model: rooted at it, not broken, and the first of its call."""
        call = self.session.call
        rooted = captured.parameter_names <= self._names()
        return captured.complete and rooted and (call is None or not call.graphs)

    def _limit(self) -> int:
        return half_of_memory(self._model()) if self.cache_limit is None else self.cache_limit

    def _names(self) -> frozenset[str]:
        """The model's parameters and buffers as they are now: a LoRA may have been loaded since."""
        model = self._model()
        named = () if model is None else (model.named_parameters(), model.named_buffers())
        return frozenset(name for each in named for name, _ in each)

    def _spec(self, guarded: GuardedGraph, index: int, rules: SiteRules) -> SiteSpec:
        site = guarded.sites[index]
        choose: Choose = forced
        if not self.force:
            choose = rules.chooser()
        entropy = None if site.entropy is None else guarded.held[index] - 1
        parent, reads, serves = guarded.parents[index], None, None
        borrows = rules.form.stream if isinstance(rules.form, ShareGuidance | GuidanceDelta) else None
        if site.part is Part.CORE:
            reads = guarded.parents.index(index)
        elif site.part is Part.GUIDANCE and borrows is None:
            reads = NO_SLOT
        elif site.part is Part.HELD and not self.force:
            serves = parent
        return SiteSpec(
            site.name,
            site.kind,
            site.layer,
            parent,
            choose,
            (),
            entropy,
            reads,
            serves,
            rules.foreseen,
            borrows,
            width=guarded.held[index],
            depth=guarded.depths[index],
            differs=isinstance(rules.form, GuidanceDelta) and borrows is not None,
        )

    def _compile_prologue(self, rewritten: Rewritten) -> Executable:
        """The piece that computes what is hoisted, and nothing else."""
        variant = rewritten.prologue = prologue(rewritten.guarded, rewritten.layout.segments)
        return self._lower(rewritten, variant)

    def _compile(self, rewritten: Rewritten, number: int, row: Row) -> Executable | None:
        """The variant of one piece for a row of the decisions that it depends on; None where nothing is left of it."""
        guarded, layout = rewritten.guarded, rewritten.layout
        stored = None if self.store is None else [i < self.store for i in range(len(guarded.sites))]
        hoisted = (True,) * (len(guarded.sites) - len(layout.sites))
        full, dense = (*layout.full_row(number, row), *hoisted), self.lowering.lays_out
        variant = specialise(guarded, full, layout.segments, number, stored, dense)
        rewritten.variants[number, row] = variant
        if layout.segments.count > 1 and not (variant.outputs or variant.fresh):
            return None
        before = len(rewritten.compiled)
        executable = self._lower(rewritten, variant)
        self.stats.add("variants", len(rewritten.compiled) - before)
        return executable

    def _lower(self, rewritten: Rewritten, variant: Variant) -> Executable:
        """Lower a straight-line graph, unless one of the same structure was: they share the code.

        Sizes that lowering assumes are checked by dispatch when Dynamo cannot.
        """
        key = structure(variant.gm)
        fake_mode = rewritten.captured.fake_mode
        before = lowering.count_guards(fake_mode)
        if key not in rewritten.compiled:
            run = self.lowering.lower(fx.GraphModule(variant.gm, variant.gm.graph), fake_mode)  # it may change it
            rewritten.compiled[key] = variant, run
        _, run = rewritten.compiled[key]
        late = not torch_compat.is_compiling()
        assumed = lowering.new_guards(fake_mode, before) if late else ()
        symbols = {i: s for i, node in enumerate(rewritten.captured.placeholders) if (s := _symbol(node)) is not None}
        check = lowering.admits(assumed, symbols) if assumed else None
        if late and self.observe is not None:
            self.observe(rewritten)
        wire = rewritten.layout.wire
        return Executable(
            run,
            tuple(map(wire, variant.inputs)),
            variant.cached,
            tuple(map(wire, variant.outputs)),
            variant.fresh,
            check,
        )


def half_of_memory(model: torch.nn.Module | None) -> int:
    """Half of the memory of the device that a model lies on, in bytes."""
    parameter = next(model.parameters(), None) if model is not None else None
    if parameter is not None and parameter.is_cuda:
        return torch.cuda.mem_get_info(parameter.device)[1] // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _symbol(node: fx.Node) -> sympy.Symbol | None:
    value = node.meta.get("val")
    expression = value.node.expr if isinstance(value, torch.SymInt) else None
    return expression if isinstance(expression, sympy.Symbol) else None
