"""Replay recorded decisions by an interpreter of the captured graph: the oracle that shares nothing with the rewrite.

It keeps the values of sites in a dictionary, by their node's name, and knows nothing of guards, variants or slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from dit_rewrite.backend import Rewritten
from dit_rewrite.check import Check, Difference, equal, max_abs_error, rms
from dit_rewrite.errors import Reason
from dit_rewrite.passes.sites import Site
from dit_rewrite.runtime.session import Observation

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SLACK = 2.0  # lowered code may be this much further from float64 than the interpreter's own rounding

Key = tuple[str, int, str]  # stream, position of the graph in its call, node of the value


class Replay(fx.Interpreter):
    """Runs a captured graph: nodes named in `reuse` give those tensors, everything else is computed.

    After `run`, ``values`` holds the tensor of every node named in `keep`.
    """

    def __init__(self, gm: fx.GraphModule, reuse: Mapping[str, Tensor], keep: frozenset[str]) -> None:
        super().__init__(gm)
        self.reuse, self.keep = reuse, keep
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = self.reuse[n.name] if n.name in self.reuse else super().run_node(n)
        if n.name in self.keep:
            self.values[n.name] = result
        return result


class Replay64(Replay):
    """The same in float64, whatever dtypes the graph names: the reference that roundings are measured from."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(*tree_map(widen, args), **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, tree_map(_wide_dtype, args), tree_map(_wide_dtype, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().get_attr(target, args, kwargs))


def widen(value: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in FLOATS else value


def check_replay(
    check: Check,
    rewritten: Sequence[Rewritten],
    observed: Sequence[Observation],
    streams: Sequence[str],
    exact: bool,
) -> None:
    """Replay one trajectory's recorded decisions and compare outputs and held values with what was observed.

    `streams` names the stream of each observation. Where `exact` is not asked for, a tensor that differs may be at most
    SLACK times as far from the float64 replay as the interpreter's own.
    """
    kept: dict[Key, Tensor] = {}
    kept64: dict[Key, Tensor] = {}
    for observation, stream in zip(observed, streams, strict=True):
        graph = rewritten[observation.graph]
        replay = _replay(Replay, check, graph, observation, stream, kept)
        if replay is None:
            return
        wide = None if exact else _replay(Replay64, Check(), graph, observation, stream, kept64)
        _compare(check, graph, observation, replay, wide)


def _replay(
    kind: type[Replay], check: Check, graph: Rewritten, observation: Observation, stream: str, kept: dict[Key, Tensor]
) -> dict[str, Tensor] | None:
    """Run one observation again; outputs as ``output i`` and the values of sites, by name. None: it cannot be run."""
    record = observation.record
    computed: list[str] = []
    reused: list[str] = []
    for site, reuse, reason in zip(graph.guarded.sites, record.row, record.reasons, strict=False):  # less the hoisted
        if reason is not Reason.COVERED:
            (reused if reuse else computed).extend(site.values)
    keys = {name: (stream, observation.position, name) for name in (*computed, *reused)}
    for name in reused:
        if keys[name] not in kept:
            check.fail(Difference(name, record.step, "replay: reused, and never computed in this trajectory"))
            return None
    run = kind(graph.captured.gm, {name: kept[keys[name]] for name in reused}, frozenset(computed))
    with torch._C._DisableAutocast():  # the captured graph has its casts already
        outputs = run.run(*observation.args)
    for name in computed:
        kept[keys[name]] = run.values[name]
    values = {name: kept[key] for name, key in keys.items()}
    return {**values, **{f"output {i}": out for i, out in enumerate(outputs) if isinstance(out, Tensor)}}


def _compare(
    check: Check,
    graph: Rewritten,
    observation: Observation,
    expected: dict[str, Tensor],
    wide: dict[str, Tensor] | None,
) -> None:
    found = _found(graph.guarded.sites, observation)
    for name, theirs in expected.items():
        ours = found[name]
        if equal(ours, theirs):
            continue
        where = Difference(name, observation.record.step, "replay")
        if wide is not None and rms([ours], [wide[name]]) <= SLACK * rms([theirs], [wide[name]]):
            check.exact = False
            check.max_abs_error = max(check.max_abs_error, max_abs_error(ours, theirs))
            check.first_difference = check.first_difference or where
        else:
            check.fail(where, max_abs_error(ours, theirs))


def _found(sites: Sequence[Site], observation: Observation) -> dict[str, Tensor]:
    """What the rewritten model returned and held, by the same names."""
    found = {f"output {i}": out for i, out in enumerate(observation.outputs) if isinstance(out, Tensor)}
    for site, values in zip(sites, observation.held, strict=False):
        found.update(zip(site.values, values or (), strict=False))
    return found
