"""Verify a rewrite: compare reuse 0 with the unmodified model, and replay the decisions of a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering, isolated
from dit_rewrite.errors import BadArgument, UnreachedPolicy
from dit_rewrite.module import RewrittenModule, attach, twin
from dit_rewrite.passes.analysis.sites import Site
from dit_rewrite.passes.capture.capture import one_graph
from dit_rewrite.policies import as_policy
from dit_rewrite.policy.rules import Policy
from dit_rewrite.proof.compare import Check, Difference, rms
from dit_rewrite.proof.interpreter import widen
from dit_rewrite.proof.replay import check_replay, kept_as_seen
from dit_rewrite.report.dump import Dump
from dit_rewrite.runtime.session import Observation
from dit_rewrite.torch_compat import tree_leaves, tree_map


@dataclass(frozen=True)
class Trajectory:
    """The calls of one trajectory: the keyword arguments and the stream of each. ``tick`` is called after each call."""

    calls: tuple[Mapping[str, Any], ...]
    streams: tuple[str, ...]
    scheduler: Any = None
    tick: Callable[[], object] = lambda: None

    @property
    def steps(self) -> list[int]:
        """The step of each call: the number of earlier calls of its stream."""
        return [self.streams[:i].count(name) for i, name in enumerate(self.streams)]

    @property
    def num_steps(self) -> int:
        return max(self.streams.count(name) for name in self.streams)


@dataclass
class Verification:
    """The result of `verify`. ``exact``: equal bit for bit. ``passed``: exact, or different only by rounding."""

    reuse0: Check
    replay: Check
    sites: int
    values: int
    calls: int
    decisions: int
    reused: int
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.reuse0.exact and self.replay.exact

    @property
    def passed(self) -> bool:
        return self.reuse0.within and self.replay.within

    @property
    def max_abs_error(self) -> float:
        return max(self.reuse0.max_abs_error, self.replay.max_abs_error)

    @property
    def first_difference(self) -> Difference | None:
        return self.reuse0.first_difference or self.replay.first_difference

    def __str__(self) -> str:
        line = (
            f"{'ok' if self.passed else 'FAILED'}: reuse 0 {self.reuse0} ({self.sites} sites forced, {self.values} "
            f"values exported), replay {self.replay} ({self.calls} calls, {self.reused} of {self.decisions} decisions "
            f"reused), max abs error {self.max_abs_error:.3g}"
        )
        first = self.first_difference
        return "; ".join([line, *([] if first is None else [f"first difference {first}"]), *self.notes])


def verify(
    model: torch.nn.Module,
    inputs: Sequence[Mapping[str, Any]],
    policy: Policy | str | Path,
    *,
    backend: InnerBackend = "inductor",
    lowering: str = "auto",
    streams: Sequence[str] | None = None,
    scheduler: Any = None,
    dump: str | Path | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Verification:
    """Verify the rewrite of `model` under `policy` on one trajectory, and print one line with the result.

    `inputs` has the keyword arguments of each call of the trajectory, in order. `streams` names the stream of each call
    if there are several ("cond", "uncond", …). `scheduler` provides noise levels; `lowering` and `dump` are those of
    `compile`. All runs use the ambient autocast. `progress` is called after each call of a model: of each input four
    times, and more often where results differ by rounding.

    (a) *reuse 0*: every site that the policy reaches is guarded and stored, and each decision is forced to compute. The
    outputs must equal those of torch.compile(model, backend) bit for bit. If low precision under Inductor prevents
    that, their RMS distance from a float64 run may be at most eager's, and a note names the stored value.
    (b) *replay*: the policy runs over the trajectory twice, and an interpreter of the captured graphs, which keeps
    values in a dictionary, replays the recorded decisions. Outputs and stored values must be equal; under Inductor, or
    if steps read a step table, their RMS distance from a float64 replay may be at most twice the interpreter's.

    Raises UnreachedPolicy if the policy reaches no site, BadArgument for arguments that do not form a trajectory.
    """
    policy = as_policy(policy)
    trajectory = Trajectory(_calls(model, inputs), _names(inputs, streams), scheduler, progress)
    model = twin(model) if isinstance(model, RewrittenModule) else model  # the reference is the model as it was
    lower = Lowering.of(backend, partition=lowering)
    with torch.no_grad():
        reuse0, forced, notes = _check_reuse0(model, trajectory, policy, lower)
        replay, observed = _check_replay(model, trajectory, policy, lower, dump)
    rows = [o.record.row for o in observed]
    places = [p for p in forced.explain().sites if p.reachable]
    values = sum(len(place.site.values) for place in places)
    reused = sum(map(sum, rows))
    result = Verification(reuse0, replay, len(places), values, len(inputs), sum(map(len, rows)), reused, notes)
    print(result)
    return result


def _calls(model: object, inputs: object) -> tuple[Mapping[str, Any], ...]:
    """Check the arguments and return the calls. The messages have no values, because these are models and tensors."""
    if not isinstance(model, torch.nn.Module):
        raise BadArgument("verify", "model", type(model).__name__, "the denoiser, a torch.nn.Module")
    allowed = "a list with one mapping of keyword arguments for each call: [{…}, {…}]"
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise BadArgument("verify", "inputs", type(inputs).__name__, allowed)
    for i, call in enumerate(inputs):
        if not isinstance(call, Mapping) or not all(isinstance(name, str) for name in call):
            raise BadArgument("verify", f"inputs[{i}]", type(call).__name__, "a mapping of keyword arguments")
    if not inputs:
        raise BadArgument("verify", "inputs", len(inputs), allowed)
    return tuple(inputs)


def _names(inputs: Sequence[object], streams: Sequence[str] | None) -> tuple[str, ...]:
    if streams is None:
        return ("main",) * len(inputs)
    named = isinstance(streams, Sequence) and all(isinstance(name, str) for name in streams)
    if not named or isinstance(streams, str) or len(streams) != len(inputs):
        raise BadArgument("verify", "streams", streams, f"a list of {len(inputs)} names, one for each call, or None")
    return tuple(streams)


def _run(model: Any, trajectory: Trajectory) -> list[list[Tensor]]:
    """Return copies of the output tensors of each call."""
    rewritten = isinstance(model, RewrittenModule)
    outputs = []
    with model.trajectory(trajectory.num_steps, trajectory.scheduler) if rewritten else nullcontext():
        for kwargs, name, step in zip(trajectory.calls, trajectory.streams, trajectory.steps, strict=True):
            with model.cache_context(name, step_index=step) if rewritten else one_graph():
                result = model(**kwargs)
            outputs.append([leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
            trajectory.tick()
    return outputs


def _check_reuse0(
    model: torch.nn.Module, trajectory: Trajectory, policy: Policy, lower: Lowering
) -> tuple[Check, RewrittenModule, list[str]]:
    ours = attach(twin(model), Backend(model, policy, lower, force=True))
    found = _run(ours, trajectory)
    if not any(place.reachable for place in ours.explain().sites):
        raise UnreachedPolicy(policy, len(ours.explain().sites))
    expected = _run(isolated(model, lower.backend), trajectory)
    check = _compare(found, expected)
    notes = []
    if not check.exact and lower.backend != "aot_eager":
        check.within = _as_near_as_eager(model, trajectory, found)
        sites = [place.site for place in ours.explain().sites if place.reachable and place.occurrence == 0]
        notes = [_first_rounded(model, trajectory, policy, lower, expected, sites)]
    return check, ours, notes


def _compare(found: list[list[Tensor]], expected: list[list[Tensor]]) -> Check:
    check = Check()
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            check.compare(a, b, Difference(f"output {i}", step, "reuse 0"))
    return check


def _as_near_as_eager(model: torch.nn.Module, trajectory: Trajectory, found: list[list[Tensor]]) -> bool:
    """Return whether the outputs are at most as far from float64 (RMS) as those of the eager model."""
    wide = copy.deepcopy(model).double()
    calls = tuple(tree_map(widen, dict(kwargs)) for kwargs in trajectory.calls)
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        reference = _run(wide, Trajectory(calls, trajectory.streams))
    return rms(found, reference) <= rms(_run(model, trajectory), reference)


def _first_rounded(
    model: torch.nn.Module,
    trajectory: Trajectory,
    policy: Policy,
    lower: Lowering,
    expected: list[list[Tensor]],
    sites: list[Site],
) -> str:
    """Bisect for the first of `sites` whose stored values change the outputs, and return a note that names it."""

    def exact(stored: int) -> bool:
        ours = attach(twin(model), Backend(model, policy, lower, force=True, store=stored))
        return _compare(_run(ours, trajectory), expected).exact

    low, high = 0, len(sites)  # exact with `low` sites stored, not exact with `high`
    if not exact(0):
        return "not exact even without stored values"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exact(middle) else (low, middle)
    return f"storing {sites[low].name} ({', '.join(sites[low].values)}) rounds a value inside a fused kernel"


def _check_replay(
    model: torch.nn.Module, trajectory: Trajectory, policy: Policy, lower: Lowering, dump: str | Path | None
) -> tuple[Check, list[Observation]]:
    """Run the policy over the trajectory twice, and replay each run separately, so that values cannot leak between
    trajectories unnoticed."""
    dumps = Dump(Path(dump)) if dump is not None else None
    backend = Backend(model, policy, lower, watcher=dumps)
    ours = attach(twin(model), backend)
    check = Check()
    observed: list[Observation] = []

    def see(observation: Observation) -> None:
        observed.append(kept_as_seen(observation, backend.rewritten[observation.graph].captured.static))

    backend.session.observer = see
    for _ in range(2):
        observed.clear()
        _run(ours, trajectory)
        streams = _stream_of_each(observed, trajectory.streams)
        check_replay(check, backend.rewritten, observed, streams, exact=lower.backend == "aot_eager")
    return check, observed


def _stream_of_each(observed: Sequence[Observation], streams: Sequence[str]) -> list[str]:
    """Return the stream of each observed graph call. A call of the model begins at position 0."""
    names, call = [], -1
    for observation in observed:
        call += observation.position == 0
        names.append(streams[call])
    return names
