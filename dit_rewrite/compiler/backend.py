"""The torch.compile backend: it runs the passes over each captured graph and passes the result to dispatch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, get_args

import torch
from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.compiler import lowering
from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.capturable import refusal
from dit_rewrite.compiler.first_call import first_call
from dit_rewrite.compiler.foresee import Foreseen
from dit_rewrite.compiler.lowering import Compiled, Lowering
from dit_rewrite.compiler.partition import Partition
from dit_rewrite.compiler.pipeline import PASSES, STRAIGHT_LINE_PASSES
from dit_rewrite.compiler.request import Request, Tables, num_foreseen
from dit_rewrite.compiler.rewritten import Rewritten, row_name
from dit_rewrite.compiler.step_tables import TableProgram, timesteps_known
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import BadArgument, TableReason
from dit_rewrite.kernels.relative_l1 import relative_l1
from dit_rewrite.passes.analysis.graph import copied
from dit_rewrite.passes.analysis.structure import structure
from dit_rewrite.passes.capture.capture import Captured, capture
from dit_rewrite.passes.pipeline import Context, PassRun, Watch, check_disabled, run_passes
from dit_rewrite.passes.rewrite.hoist import Hoisted
from dit_rewrite.passes.rewrite.specialise import specialise
from dit_rewrite.policy.rules import Policy
from dit_rewrite.runtime.cuda_capture import CudaDevice
from dit_rewrite.runtime.cuda_graphs import AllGraphs
from dit_rewrite.runtime.dispatch import CompiledGraph
from dit_rewrite.runtime.prologue import Prologue
from dit_rewrite.runtime.released import Weights
from dit_rewrite.runtime.segments import Executable
from dit_rewrite.runtime.session import Session
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Trajectory
from dit_rewrite.torch_compat.kernel_builds import KernelBuilds

NAMED_STREAMS = 2  # a pipeline that names its streams has a conditional and an unconditional one


class Watcher(Protocol):
    """Observes compilation: it takes each captured and each straight-line graph, and returns a callback that is called
    after each pass over the graph."""

    def begin(self, graph: int, captured: Captured) -> Watch: ...

    def lowering(self, graph: int, name: str, gm: fx.GraphModule) -> Watch: ...


class Backend:
    """The backend of one model. It has no ``__eq__``: Dynamo would share graphs between models with equal backends."""

    def __init__(
        self,
        model: torch.nn.Module,
        policy: Policy,
        lowering: Lowering,
        force: bool = False,
        watcher: Watcher | None = None,
        store: int | None = None,
        disable_passes: Collection[str] = (),
        memory_budget: int | None = None,
        timing: bool = False,
        tables: Tables = "reuse",
        release: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        """`force` makes every decision compute, and `store` limits the number of sites whose new slot tensors are
        returned; `verify` uses both. `watcher` observes each graph after each pass. The slots of all streams of a
        trajectory take at most `memory_budget` bytes, by default half of the memory of the model's device. `timing`:
        the time of each call is measured, which waits for the device. `tables`: "reuse" if only reusing steps read step
        tables, "all" if computing ones do too. `release`: weights that only rows of step tables are computed from leave
        the memory. `cuda_graphs`: variants are captured as CUDA graphs. Raises BadArgument if a name in
        `disable_passes` is not an optional pass, for other values of `memory_budget` and `tables`, for `release`
        without "all", or for `cuda_graphs` where Inductor makes CUDA graphs itself."""
        self.policy, self.lowering, self.force, self.watcher, self.store = policy, lowering, force, watcher, store
        whole = isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget >= 0
        if memory_budget is not None and not whole:
            raise BadArgument("compile", "memory_budget", memory_budget, "a whole number of bytes >= 0, or None")
        self.disabled = check_disabled(disable_passes, (*PASSES, *STRAIGHT_LINE_PASSES))
        self.stats = Stats()
        self._model = weakref.ref(model)  # the model refers to its backend
        self.memory_budget, self.timing, self.tables = memory_budget, timing, tables
        if tables not in get_args(Tables):
            raise BadArgument("compile", "tables", tables, " or ".join(map(repr, get_args(Tables))))
        if release and tables != "all":
            raise BadArgument("compile", "release", release, 'False, or with tables="all"')
        self.release, self.weights = release, Weights(self.stats)
        if cuda_graphs and not lowering.owns_outputs:
            raise BadArgument(
                "compile", "cuda_graphs", cuda_graphs, "False, as the options make Inductor capture CUDA graphs"
            )
        self.graphs = AllGraphs(CudaDevice(), self.stats, self._limit) if cuda_graphs else None
        self.session = Session(self.stats, self._limit, self.graphs)
        self.rewritten: list[Rewritten] = []
        self.breaks: Counter[str] = Counter()  # graph breaks by location and reason
        self._compiles: set[Any] = set()
        self._compiling, self._first_call = threading.RLock(), threading.RLock()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Compile a graph; Dynamo calls this for each graph that it captures."""
        self._count(gm)
        self.weights.bring_back()  # this graph may read them in each step
        call = self.session.call
        if call is None:
            return capture(gm, example_inputs, self._rewrite)
        inputs = call.inputs
        told = call.conditioning, call.tensors, inputs.timestep, inputs.number
        return capture(gm, example_inputs, self._rewrite, *told)

    def capturing(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context for a call of the model. It serialises calls until one has captured, and pauses the garbage
        collector in the first call; a model that Dynamo does not capture has many without a graph."""
        if self.rewritten:
            return contextlib.nullcontext()
        return self._first_call if self.stats.calls else first_call(self._first_call)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the calling thread's cache, of released weights and of CUDA graphs, by names of Stats."""
        graphs = 0 if self.graphs is None else self.graphs.bytes
        return {
            "cache_bytes": self.session.cache_bytes(),
            "released_bytes": self.weights.bytes,
            "graph_bytes": graphs,
        }

    def close(self) -> None:
        """Free memory: Dynamo keeps this object. Brings released weights back, and drops all CUDA graphs and the cache
        of the calling thread."""
        self.weights.bring_back()
        self.session.forget()
        if self.graphs is not None:
            self.graphs.clear()

    def _count(self, gm: fx.GraphModule) -> None:
        """Count recompiles and graph breaks. If Dynamo restarts a compilation, the id stays and nothing is counted."""
        compile_id = torch_compat.compile_id()
        if compile_id is None or compile_id in self._compiles:
            return
        self.stats.add("recompiles", any(compile_id.frame_id == other.frame_id for other in self._compiles))
        if torch_compat.is_broken(gm):
            self.stats.add("graph_breaks")
            self.breaks[torch_compat.break_reason(gm)] += 1
        self._compiles.add(compile_id)

    def _rewrite(self, captured: Captured) -> CompiledGraph:
        with self._compiling:
            return self._rewrite_alone(captured)

    def _rewrite_alone(self, captured: Captured) -> CompiledGraph:
        call = self.session.call
        trajectory = call.trajectory if call is not None else Trajectory(None)
        known = (False, False) if call is None else timesteps_known(trajectory, call.inputs.timestep)
        levels = tuple(map(trajectory.noise, range(num_foreseen(trajectory.num_steps))))
        streams = 1 if self.session.named.name is None else NAMED_STREAMS
        free = self._limit() - streams * sum(each.stored_bytes for each in self.rewritten)
        limit = sys.maxsize if self.force else free
        whole, steps = self._is_whole(captured), trajectory.num_steps
        hoist = "hoist" not in self.disabled
        request = Request(whole, steps, levels, hoist, self.force, limit, streams, *known, self.tables)
        ctx = Context(captured, self.policy, self.lowering, request)
        runs: list[PassRun] = []
        watch = None if self.watcher is None else self.watcher.begin(len(self.rewritten), captured)
        run_passes(PASSES, captured.gm, ctx, runs, self.disabled, watch)
        rewritten = self._dispatched(captured, ctx, runs)
        self._compile_ahead(rewritten)
        self.rewritten.append(rewritten)
        return rewritten.graph

    def _compile_ahead(self, rewritten: Rewritten) -> None:
        """Compile the prologue and the variants that are foreseen. Their kernels are built at the same time."""
        graph = rewritten.graph
        rewritten.builds = builds = KernelBuilds()
        if rewritten.hoisted is not None:
            graph.prologue = Prologue(self._compile_prologue(rewritten, rewritten.hoisted), self.session)
        if rewritten.tables is not None and rewritten.has_table:
            weights = self.weights if self.release else None
            graph.program = TableProgram(rewritten.tables, weights, partial(self._released, rewritten))
        for number, row in rewritten.partition.foreseen(rewritten.context[Foreseen].rows):
            graph.add_variant(number, row)
        start, rewritten.builds = time.perf_counter(), None
        builds.finish()
        rewritten.runs.append(_timed("build", start, rewritten.captured.gm, rewritten.captured.gm))

    def _released(self, rewritten: Rewritten) -> tuple[int, ...]:
        """Return the positions of the weights that only rows of step tables are computed from, in every graph."""
        graphs = list(self.rewritten)
        if not all(each.context[Request].whole for each in graphs):
            self.stats.dropped(TableReason.PART_OF_MODEL)
            return ()
        return rewritten.positions(frozenset().union(*(each.weights_read for each in graphs)))

    def _dispatched(self, captured: Captured, ctx: Context, runs: list[PassRun]) -> Rewritten:
        rewritten: Rewritten
        partition, hoisted = ctx[Partition], ctx.get(Hoisted)

        def compile_variant(number: int, row: DecisionRow) -> Executable | None:
            return self._compile(rewritten, number, row)

        graph = CompiledGraph(
            len(self.rewritten),
            partition.wired(ctx[Foreseen].specs),
            ctx[Bound].found.num_layers,
            partition.wiring(captured, 0 if hoisted is None else len(hoisted.values)),
            partition.runtime_segments(),
            self.session,
            compile_variant,
            self.policy.lag,
            relative_l1,
        )
        rewritten = Rewritten(captured, ctx, runs, graph)
        return rewritten

    def _is_whole(self, captured: Captured) -> bool:
        """Return whether the graph is the whole model: it has only the model's parameters, no graph break, and is the
        first graph of the call. One that reads no parameter is a function that a model in parts calls first."""
        call, names = self.session.call, self._names()
        reads = any(captured.placeholders[i].users for i in captured.static)
        rooted = captured.parameter_names <= names and (reads or not names)
        return captured.complete and rooted and (call is None or not call.graphs)

    def _limit(self) -> int:
        return half_of_memory(self._model()) if self.memory_budget is None else self.memory_budget

    def _names(self) -> frozenset[str]:
        """Return the names of the model's current parameters and buffers. They change if a LoRA is loaded."""
        model = self._model()
        named = () if model is None else (model.named_parameters(), model.named_buffers())
        return frozenset(name for each in named for name, _ in each)

    def _compile_prologue(self, rewritten: Rewritten, hoisted: Hoisted) -> Executable:
        """Compile the code that computes the hoisted values."""
        run = self._lower(rewritten, hoisted.prologue, "prologue")
        fresh = tuple((0, k) for k in range(len(hoisted.values)))
        return Executable(run, hoisted.inputs, (), (), fresh, None)

    def _compile(self, rewritten: Rewritten, number: int, row: DecisionRow) -> Executable | None:
        """Compile the variant of a segment for a row of the decisions it depends on. Returns None if it has no nodes.

        Segments with equal structure share their code. Sizes that lowering assumes after Dynamo has finished are not in
        Dynamo's guards, so dispatch checks them.
        """
        guarded, partition = rewritten.guarded, rewritten.partition
        stored = None if self.store is None else [i < self.store for i in range(len(guarded.sites))]
        start = time.perf_counter()
        full, dense = partition.full_row(number, row), self.lowering.lays_out
        variant = specialise(guarded, full, partition.segments, number, stored, dense, rewritten.tables)
        rewritten.runs.append(_timed("specialise", start, guarded.gm, variant.gm))
        rewritten.variants[number, row] = variant
        if partition.segments.count > 1 and not (variant.outputs or variant.fresh):
            return None
        key, fake_mode = structure(variant.gm), rewritten.captured.fake_mode
        before = lowering.count_guards(fake_mode)
        if key not in rewritten.compiled:
            rewritten.compiled[key] = variant, self._lower(rewritten, variant.gm, self._name(rewritten, number, row))
            self.stats.add("variants")
        _, run = rewritten.compiled[key]
        late = not torch_compat.is_compiling()
        assumed = lowering.new_guards(fake_mode, before) if late else ()
        admits = lowering.admits(assumed, rewritten.captured.placeholders) if assumed else None
        wire = partition.wire
        if variant.columns and rewritten.graph.program is not None:
            rewritten.graph.program.add(variant.columns)
        return Executable(
            run,
            tuple(map(wire, variant.inputs)),
            variant.cached,
            tuple(map(wire, variant.outputs)),
            variant.fresh,
            admits,
            variant.columns,
            refusal(variant.gm),
        )

    @staticmethod
    def _name(rewritten: Rewritten, number: int, row: DecisionRow) -> str:
        """Return the name of a variant in the dump."""
        if rewritten.partition.segments.count == 1:
            return f"variant{len(rewritten.compiled)}_{row_name(row)}"
        return f"segment{number}_{row_name(row)}"

    def _lower(self, rewritten: Rewritten, gm: fx.GraphModule, name: str) -> Compiled:
        """Run the last passes over a copy of a straight-line graph and lower it."""
        watch = None if self.watcher is None else self.watcher.lowering(rewritten.graph.index, name, gm)
        gm = copied(gm)  # passes, and lowering, may change it in place
        gm = run_passes(STRAIGHT_LINE_PASSES, gm, rewritten.context, rewritten.runs, self.disabled, watch)
        start = time.perf_counter()
        run = self.lowering.lower(gm, rewritten.captured.fake_mode, rewritten.builds)
        rewritten.runs.append(_timed("lower", start, gm, gm))
        return run


def _timed(name: str, start: float, before: fx.GraphModule, after: fx.GraphModule) -> PassRun:
    return PassRun(name, time.perf_counter() - start, len(before.graph.nodes), len(after.graph.nodes))


def half_of_memory(model: torch.nn.Module | None) -> int:
    """Return half of the memory of the model's device, in bytes."""
    parameter = next(model.parameters(), None) if model is not None else None
    if parameter is not None and parameter.is_cuda:
        return torch.cuda.mem_get_info(parameter.device)[1] // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
