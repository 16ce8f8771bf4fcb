"""Replay recorded decisions by an interpreter of the captured graph: the oracle that shares nothing with the rewrite.

It keeps the values of sites in a dictionary, by their node's name, and knows nothing of guards, variants or slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from dit_rewrite.backend import Rewritten
from dit_rewrite.check import Check, Difference, equal, max_abs_error, rms
from dit_rewrite.errors import Reason
from dit_rewrite.passes.site import Site
from dit_rewrite.runtime.session import Observation

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SLACK = 2.0  # lowered code may be this much further from float64 than the interpreter's own rounding

Key = tuple[str, int, str, str]  # stream, position of the graph in its call, site, node of the value
Held = dict[Key, Tensor]


@dataclass(frozen=True)
class Taken:
    """What stands in the place of a node: a tensor, or that tensor added to what `base` is now."""

    value: Tensor
    base: str | None


class Replay(fx.Interpreter):
    """Runs a captured graph: nodes named in `reuse` give those tensors, everything else is computed.

    After `run`, ``values`` holds the tensor of every node named in `keep`.
    """

    def __init__(self, gm: fx.GraphModule, reuse: Mapping[str, Taken], keep: Collection[str]) -> None:
        super().__init__(gm)
        self.reuse, self.keep = reuse, {*keep, *(taken.base for taken in reuse.values())}
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        taken = self.reuse.get(n.name)
        if taken is None:
            result = super().run_node(n)
        else:
            result = taken.value if taken.base is None else self.values[taken.base] + taken.value
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
    kept: Held = {}
    kept64: Held = {}
    for observation, stream in zip(observed, streams, strict=True):
        graph = rewritten[observation.graph]
        replay = _replay(Replay, check, graph, observation, stream, kept)
        if replay is None:
            return
        wide = None if exact else _replay(Replay64, Check(), graph, observation, stream, kept64)
        _compare(check, graph, observation, replay, wide)


def _replay(
    kind: type[Replay], check: Check, graph: Rewritten, observation: Observation, stream: str, kept: Held
) -> dict[str, Tensor] | None:
    """Run one observation again; outputs as ``output i`` and what sites hold, by name. None: it cannot be run."""
    record = observation.record
    computed: list[tuple[Key, str | None, str | None]] = []
    reused: dict[str, Taken] = {}
    held: list[Key] = []
    for site, store, reuse, reason in zip(_sites(graph), _stores(graph), record.row, record.reasons, strict=True):
        for value, base in itertools.zip_longest(site.values, site.bases):
            key = (stream, observation.position, site.name, value)
            if reason is Reason.COVERED:
                continue
            held.append(key)
            if not reuse:
                computed.append((key, base, store))
            elif key not in kept:
                check.fail(Difference(value, record.step, "replay: reused, and never computed in this trajectory"))
                return None
            else:
                reused[value] = Taken(kept[key], base)
    run = kind(graph.placed.gm, reused, {name for key, base, _ in computed for name in (key[-1], base) if name})
    with torch._C._DisableAutocast():  # the captured graph has its casts already
        outputs = run.run(*observation.args)
    for key, base, store in computed:
        value = run.values[key[-1]]
        kept[key] = rounded(value if base is None else value - run.values[base], store)
    values = {_name(key): kept[key] for key in held}
    return {**values, **{f"output {i}": out for i, out in enumerate(outputs) if isinstance(out, Tensor)}}


def _name(key: Key) -> str:
    return f"{key[-2]}: {key[-1]}"


def _sites(graph: Rewritten) -> tuple[Site, ...]:
    return graph.layout.sites


def _stores(graph: Rewritten) -> list[str | None]:
    return [graph.rules[i].store for i in graph.reached]


def rounded(value: Tensor, store: str | None) -> Tensor:
    """A value as a slot gives it back: rounded to what `store` can hold, one scale for each token."""
    if store is None or value.ndim < 2:
        return value
    if store == "bf16":
        return value.to(torch.bfloat16).to(value.dtype)
    wide = value.double() if value.dtype is torch.float64 else value.float()
    most = {"int8": 127, "fp8": 448}[store]
    scale = wide.abs().amax(dim=-1, keepdim=True) / most
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    numbers = wide / scale
    numbers = numbers.round() if store == "int8" else numbers.clamp(-most, most).to(torch.float8_e4m3fn)
    return (numbers.to(wide.dtype) * scale).to(value.dtype)


def _compare(
    check: Check,
    graph: Rewritten,
    observation: Observation,
    expected: dict[str, Tensor],
    wide: dict[str, Tensor] | None,
) -> None:
    found = _found(graph, observation)
    for name, theirs in expected.items():
        ours = found[name].to(theirs.dtype)
        if equal(ours, theirs):
            continue
        where = Difference(name, observation.record.step, "replay")
        if wide is not None and rms([ours], [wide[name]]) <= SLACK * rms([theirs], [wide[name]]):
            check.exact = False
            check.max_abs_error = max(check.max_abs_error, max_abs_error(ours, theirs))
            check.first_difference = check.first_difference or where
        else:
            check.fail(where, max_abs_error(ours, theirs))


def _found(graph: Rewritten, observation: Observation) -> dict[str, Tensor]:
    """What the rewritten model returned and held, by the same names."""
    found = {f"output {i}": out for i, out in enumerate(observation.outputs) if isinstance(out, Tensor)}
    for site, store, held in zip(_sites(graph), _stores(graph), observation.held, strict=True):
        rest = list(held or ())
        for name in site.values if held is not None else ():
            value = rest.pop(0)
            if store in ("int8", "fp8") and value.ndim >= 2:
                value = value.float() * rest.pop(0)
            found[f"{site.name}: {name}"] = value
    return found
