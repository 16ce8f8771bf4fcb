"""The torch.compile backend: it runs the passes over each captured graph and hands the result to dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from dit_rewrite import lowering
from dit_rewrite.errors import Reason
from dit_rewrite.lowering import Lowering
from dit_rewrite.passes.capture import Captured, capture
from dit_rewrite.passes.guard import Guarded, GuardedGraph, guard
from dit_rewrite.passes.guards import Value
from dit_rewrite.passes.sites import Found, find_sites
from dit_rewrite.passes.specialise import Row, Variant, specialise
from dit_rewrite.policy import Policy, SiteRules, forced
from dit_rewrite.runtime.decide import Choose, Moment, SiteSpec, decide
from dit_rewrite.runtime.dispatch import Executable, Graph
from dit_rewrite.runtime.session import Session
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Trajectory

FORESEEN_STEPS = 64  # how far to look ahead where nobody told the number of steps
LONGEST = 1000  # and at most, whatever was told
MAX_FORESEEN = 8


@dataclass
class Rewritten:
    """One captured graph with all that the passes made of it."""

    captured: Captured
    found: Found
    rules: tuple[SiteRules, ...]
    guarded: GuardedGraph
    graph: Graph
    variants: dict[Row, Variant]
    whole: bool
    prologue: Variant | None = None

    @property
    def reached(self) -> tuple[int, ...]:
        """The indices of the sites that are guarded."""
        return tuple(i for i, rules in enumerate(self.rules) if rules.reachable)


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
    ) -> None:
        """`force` makes every decision compute, `store` limits how many sites' fresh values are returned; both are
        for `verify`. `observe` is called with each rewritten graph."""
        self.policy, self.lowering, self.force, self.observe, self.store = policy, lowering, force, observe, store
        self.hoist = hoist
        self.stats = Stats()
        self.session = Session(self.stats)
        self.rewritten: list[Rewritten] = []
        self._compiles: set[Any] = set()
        self._names = frozenset(n for named in (model.named_parameters, model.named_buffers) for n, _ in named())

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """What Dynamo calls with each graph that it captured."""
        self._count(gm)
        call = self.session.call
        return capture(gm, example_inputs, self._rewrite, call.conditioning if call is not None else ())

    def _count(self, gm: fx.GraphModule) -> None:
        """Count recompiles and graph breaks. Dynamo may start one compilation over, with the same id: that is none."""
        compile_id = torch._guards.CompileContext.current_compile_id()
        if compile_id is None or compile_id in self._compiles:
            return
        self.stats.recompiles += any(compile_id.frame_id == other.frame_id for other in self._compiles)
        self.stats.graph_breaks += bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))
        self._compiles.add(compile_id)

    def _rewrite(self, captured: Captured) -> Graph:
        found = find_sites(captured.gm, captured.static, captured.steady if self.hoist else None)
        whole = self._is_whole(captured)
        rules = tuple(self.policy.for_site(site, _known(found, site.layer, whole)) for site in found.sites)
        labels = [
            Guarded(i, site_rules.guard, site_rules.strategy)
            for i, site_rules in enumerate(rules)
            if site_rules.reachable
        ]
        hoisted = [Guarded(len(found.sites), "conditioning unchanged", "hoist")] if found.hoisted is not None else []
        guarded = guard(captured.gm, found.all, [*labels, *hoisted])
        specs = [self._spec(guarded, k, rules[label.site]) for k, label in enumerate(labels)]
        rewritten: Rewritten

        def compile_variant(row: Row) -> Executable:
            return self._compile(rewritten, row)

        graph = Graph(
            len(self.rewritten),
            specs,
            found.num_layers,
            captured.static,
            len(captured.placeholders),
            self.session,
            compile_variant,
            captured.steady,
        )
        rewritten = Rewritten(captured, found, rules, guarded, graph, {}, whole)
        if found.hoisted is not None:
            graph.prologue = self._compile_prologue(rewritten)
        for row in self._foresee(specs):
            graph.add_variant(row)
        self.rewritten.append(rewritten)
        if self.observe is not None:
            self.observe(rewritten)
        return graph

    def _is_whole(self, captured: Captured) -> bool:
        """Whether this graph is all of the model: rooted at it, not broken, and the first of its call."""
        call = self.session.call
        rooted = captured.parameter_names <= self._names
        return captured.complete and rooted and (call is None or not call.graphs)

    def _spec(self, guarded: GuardedGraph, index: int, rules: SiteRules) -> SiteSpec:
        site = guarded.sites[index]
        choose: Choose = forced
        if not self.force:
            choose = rules.chooser()
        return SiteSpec(site.name, site.kind, site.layer, guarded.parents[index], len(site.values), choose)

    def _foresee(self, specs: Sequence[SiteSpec]) -> list[Row]:
        """The rows that the plan is known to need, computing first; the most frequent where they are too many."""
        call = self.session.call
        trajectory = call.trajectory if call is not None else Trajectory(None)
        rows = simulate(specs, min(trajectory.num_steps or FORESEEN_STEPS, LONGEST), trajectory)
        counted = sorted(set(rows), key=lambda row: (any(row), -rows.count(row)))
        never = (False,) * len(specs)
        return [never, *(row for row in counted if row != never)][:MAX_FORESEEN]

    def _compile_prologue(self, rewritten: Rewritten) -> Executable:
        """The piece that computes what is hoisted, and nothing else."""
        count = len(rewritten.guarded.sites)
        row = [i < count - 1 for i in range(count)]
        rewritten.prologue = specialise(rewritten.guarded, row, outputs=False)
        return self._lower(rewritten, rewritten.prologue)

    def _compile(self, rewritten: Rewritten, row: Row) -> Executable:
        """The variant of one row; what is hoisted is an input of each."""
        hoisted = (True,) * (len(rewritten.guarded.sites) - len(row))
        stored = None if self.store is None else [i < self.store for i in range(len(row) + len(hoisted))]
        variant = specialise(rewritten.guarded, (*row, *hoisted), stored)
        rewritten.variants[row] = variant
        return self._lower(rewritten, variant)

    def _lower(self, rewritten: Rewritten, variant: Variant) -> Executable:
        """Lower a straight-line graph. Sizes that this assumes are checked by dispatch when Dynamo cannot."""
        fake_mode = rewritten.captured.fake_mode
        before = lowering.count_guards(fake_mode)
        placeholders = rewritten.captured.placeholders
        gm = fx.GraphModule(variant.gm, variant.gm.graph)  # lowering may change it
        run = self.lowering.lower(gm, fake_mode)
        late = torch._guards.CompileContext.try_get() is None
        assumed = lowering.new_guards(fake_mode, before) if late else ()
        symbols = {i: s for i, node in enumerate(placeholders) if (s := _symbol(node)) is not None}
        check = lowering.admits(assumed, symbols) if assumed else None
        if late and self.observe is not None:
            self.observe(rewritten)
        return Executable(run, variant.inputs, variant.cached, variant.fresh, check)


def simulate(specs: Sequence[SiteSpec], steps: int, trajectory: Trajectory) -> list[Row]:
    """The plan, as far as it can be known: the rows of a trajectory whose every call finds the slots it left."""
    computed_at, streak = [0] * len(specs), [0] * len(specs)
    rows = []
    for step in range(steps):
        holds = [step > 0] * len(specs)
        sigma, snr = trajectory.noise(step)
        moment = Moment(step, trajectory.num_steps, sigma=sigma, snr=snr)
        decided = decide(specs, moment, computed_at, streak, holds)
        rows.append(decided.row)
        for i, (reused, reason) in enumerate(zip(decided.row, decided.reasons, strict=True)):
            if not reused:
                computed_at[i], streak[i] = step, 0
            elif reason is not Reason.COVERED:
                streak[i] += 1
    return rows


def _known(found: Found, layer: int, whole: bool) -> dict[str, Value]:
    """What is known of a site at rewrite time. In a part of a model its layer is not: blocks may share the graph."""
    return {"layer": layer, "num_layers": found.num_layers} if whole else {}


def _symbol(node: fx.Node) -> sympy.Symbol | None:
    value = node.meta.get("val")
    expression = value.node.expr if isinstance(value, torch.SymInt) else None
    return expression if isinstance(expression, sympy.Symbol) else None
