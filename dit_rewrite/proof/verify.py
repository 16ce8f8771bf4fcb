"""Proof that a rewrite computes what it should: reuse 0 against the untouched model, and a replay of the decisions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
    """The calls of one trajectory: keyword arguments and stream of each."""

    calls: tuple[Mapping[str, Any], ...]
    streams: tuple[str, ...]
    scheduler: Any = None

    @property
    def steps(self) -> list[int]:
        """The step of each call: how many calls of its stream came before."""
        return [self.streams[:i].count(name) for i, name in enumerate(self.streams)]

    @property
    def num_steps(self) -> int:
        return max(self.streams.count(name) for name in self.streams)


@dataclass
class Verification:
    """What `verify` found. ``exact``: equal bit for bit. ``passed``: exact, or within rounding of float64."""

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
) -> Verification:
    """Prove the rewrite of `model` under `policy` on one trajectory; prints one line.

    `inputs` are the keyword arguments of each call of the trajectory, in order; `streams` names the stream of each,
    where there are several ("cond", "uncond", …). `scheduler` is read for noise levels, `lowering` is `compile`'s. The
    ambient autocast holds for all runs.

    (a) *reuse 0*: every site that the policy reaches is guarded and stored, each decision is forced to compute, and the
    outputs must be those of torch.compile(model, backend) bit for bit. Where low precision under Inductor cannot hold
    that, their RMS distance from a float64 run may be at most eager's own, and a note names the stored value.
    (b) *replay*: the policy runs over the trajectory twice; its recorded decisions are replayed by an interpreter of
    the captured graphs that keeps values in a dictionary. Outputs and held values must be equal; lowered by Inductor,
    their RMS distance from a float64 replay may be at most twice the interpreter's own.

    Raises UnreachedPolicy where the policy reaches no site, BadArgument for arguments that are no trajectory.
    """
    policy = as_policy(policy)
    trajectory = Trajectory(_calls(model, inputs), _names(inputs, streams), scheduler)
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
    """The calls, once they are known to be some. Values stay out of messages: they are models and tensors."""
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
    """The output tensors of each call, copied, so that nothing later can change them."""
    rewritten = isinstance(model, RewrittenModule)
    outputs = []
    with model.trajectory(trajectory.num_steps, trajectory.scheduler) if rewritten else nullcontext():
        for kwargs, name, step in zip(trajectory.calls, trajectory.streams, trajectory.steps, strict=True):
            with model.cache_context(name, step_index=step) if rewritten else one_graph():
                result = model(**kwargs)
            outputs.append([leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
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
    """Promise 2's bound: the outputs are no further from float64 than those of the eager model are."""
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
    """Bisect for the first of `sites` whose values, when stored, change the outputs; the note that names it."""

    def exact(stored: int) -> bool:
        ours = attach(twin(model), Backend(model, policy, lower, force=True, store=stored))
        return _compare(_run(ours, trajectory), expected).exact

    low, high = 0, len(sites)  # with `low` sites stored it is exact, with `high` it is not
    if not exact(0):
        return "not exact even with nothing stored"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exact(middle) else (low, middle)
    return f"storing {sites[low].name} ({', '.join(sites[low].values)}) rounds what a fused kernel kept"


def _check_replay(
    model: torch.nn.Module, trajectory: Trajectory, policy: Policy, lower: Lowering, dump: str | Path | None
) -> tuple[Check, list[Observation]]:
    """Run the policy over the trajectory twice, and replay each run on its own: nothing may pass between them."""
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
    """The stream of each observed graph call: a call of the model begins where the position in it is 0."""
    names, call = [], -1
    for observation in observed:
        call += observation.position == 0
        names.append(streams[call])
    return names
