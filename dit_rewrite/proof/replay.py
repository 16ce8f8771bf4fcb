"""Replay recorded decisions with an interpreter of the captured graph, an oracle that is independent of the rewrite.

It keeps the values of sites in a dictionary, by the names of their nodes, without variants or slots. Only the codecs of
attention strategies (dit_rewrite/compiler/attention_codecs.py) are shared with the rewrite.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dit_rewrite import torch_compat
from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.compiler.slot_formats import SlotFormat
from dit_rewrite.errors import DecisionReason
from dit_rewrite.passes.analysis.site import Part, Site
from dit_rewrite.passes.rewrite.codec import Codec, DeltaCodec, ValueCodec
from dit_rewrite.passes.rewrite.guarded_graph import Guidance
from dit_rewrite.passes.rewrite.tiles import TileCodec
from dit_rewrite.policy.strategies import GuidanceDelta, ShareGuidance
from dit_rewrite.proof.compare import Check, Difference, equal, max_abs_error, rms
from dit_rewrite.proof.interpreter import Instead, Read, Replay, Replay64, twice
from dit_rewrite.proof.kept_values import Kept, Key, encoded, other_half, weighted, with_kept_tiles
from dit_rewrite.runtime.session import Observation

SLACK = 2.0  # lowered code may have this many times the interpreter's rounding error


def check_replay(
    check: Check,
    rewritten: Sequence[Rewritten],
    observed: Sequence[Observation],
    streams: Sequence[str],
    exact: bool,
) -> None:
    """Replay one trajectory's recorded decisions, and compare outputs and stored values with the observed ones.

    `streams` has the stream of each observation. If `exact` is False, a tensor that differs may be at most SLACK times
    as far from the float64 replay as the interpreter's tensor, or as is usual for the interpreter's tensors in the same
    call, relative to their sizes. This also applies if half of a batch or some tokens are computed, or if a step
    table is read, because a matrix product of fewer or of more rows may be rounded differently.
    """
    kept: Kept = {}
    kept64: Kept = {}
    for observation, stream in zip(observed, streams, strict=True):
        graph = rewritten[observation.graph]
        replay = _replay(Replay, check, graph, observation, stream, kept)
        if replay is None:
            return
        formats = graph.bound.formats.values()
        partial = any(guidance is not None or isinstance(codec, TileCodec) for codec, guidance in formats)
        rounds = graph.has_table or partial
        wide = None if exact and not rounds else _replay(Replay64, Check(), graph, observation, stream, kept64)
        _compare(check, graph, observation, replay, wide)


def kept_as_seen(observation: Observation, static: frozenset[int]) -> Observation:
    """Return the observation with copies of its graph's inputs (except weights) and outputs.

    After a graph break the model may change these tensors in place, and the replay needs the original values.
    """
    args = (value if i in static else _copied(value) for i, value in enumerate(observation.args))
    return replace(observation, args=tuple(args), outputs=tuple(map(_copied, observation.outputs)))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@dataclass
class _Step:
    """The plan for replaying one observation: which values are replaced, which are stored, and which are compared."""

    instead: dict[str, Instead] = field(default_factory=dict)
    shared: dict[str, Guidance] = field(default_factory=dict)
    after: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    lent: dict[Key, Key] = field(default_factory=dict)  # values that are differences -> the other stream's value
    computed: list[tuple[Key, Codec, tuple[str, ...]]] = field(default_factory=list)
    compared: list[Key] = field(default_factory=list)
    missing: str | None = None
    read: set[str] = field(default_factory=set)

    @property
    def keep(self) -> set[str]:
        """The nodes whose tensors are needed."""
        return {*self.read, *(name for key, _, read in self.computed for name in (key[-1], *read))}

    def add(
        self,
        site: Site,
        slot_format: SlotFormat,
        reuse: bool,
        where: tuple[str, int],
        kept: Kept,
        weights: tuple[float, ...] | None,
        differs: str | None = None,
    ) -> None:
        """Add a site with its own decision. With `differs`, the stored value is the difference from that stream."""
        codec, guidance = slot_format
        if guidance is not None:
            self.shared.update(dict.fromkeys(site.closure, guidance) if reuse else {})
        if isinstance(codec, DeltaCodec):
            self._add_delta(site, codec, reuse, where, kept, weights)
            return
        if isinstance(codec, TileCodec):
            self._add_tiles(site, codec, reuse, where, kept)
        if guidance is not None or isinstance(codec, TileCodec):
            return
        if site.part is Part.CORE_STATE and reuse or site.part is Part.CORE and not reuse:
            return  # a core that computes has no slot; its state is stored by the other part
        place = site.name if site.part is not Part.CORE else f"{site.place}.{Part.CORE_STATE}"
        for value, base in itertools.zip_longest(site.values, site.bases):
            key = (*where, place, value)
            read = (base,) if base else site.inputs
            self.read.update(read)
            if isinstance(codec, ValueCodec):
                self.compared.append(key)
            lender = None if differs is None else (differs, *key[1:])
            if lender is not None:
                self.lent[key] = lender
            if not reuse:
                self.computed.append((key, codec, read))
            elif key not in kept or (lender is not None and lender not in kept):
                self.missing = value
            else:
                lent = () if lender is None else kept[lender][:1]
                self.instead[value] = _from_kept((*lent, *kept[key]), codec, read, weights)

    def _add_delta(
        self,
        site: Site,
        codec: DeltaCodec,
        reuse: bool,
        where: tuple[str, int],
        kept: Kept,
        weights: tuple[float, ...] | None,
    ) -> None:
        """Add a site of which one half of the batch is computed; the other half is that plus the kept difference."""
        for value in site.values:
            key = (*where, site.name, value)
            self.compared.append(key)
            if not reuse:
                self.computed.append((key, codec, ()))
            elif key not in kept:
                self.missing = value
            else:
                self.after[value] = other_half(codec.half, kept[key], weights)

    def _add_tiles(self, site: Site, codec: TileCodec, reuse: bool, where: tuple[str, int], kept: Kept) -> None:
        """Add a site of which some tiles are computed; here all are, and the others are replaced by the kept ones."""
        (value,) = site.values
        key = (*where, site.name, value)
        if not reuse:
            self.computed.append((key, codec, ()))
        elif key not in kept:
            self.missing = value
        else:
            self.after[value] = with_kept_tiles(codec, kept, key)


def _from_kept(
    kept: tuple[Tensor, ...], codec: Codec, read: tuple[str, ...], weights: tuple[float, ...] | None
) -> Instead:
    def make(seen: Read, guidance: Guidance | None) -> Tensor:
        tensors = kept if guidance is None else [twice(tensor, guidance) for tensor in kept]
        now = seen(read)
        if isinstance(codec, ValueCodec):
            value = tensors[0] if weights is None else weighted(tensors, weights)
            return now[0] + value if now else value
        return codec.decode(tensors, now, now[0].dtype)

    return make


def _replay(
    kind: type[Replay], check: Check, graph: Rewritten, observation: Observation, stream: str, kept: Kept
) -> dict[str, Tensor] | None:
    """Replay one observation. Returns the outputs as ``output i`` and the values of sites by name, or None if a reused
    value was never computed."""
    record, step = observation.record, _Step()
    depths: dict[tuple[str, str], int] = {}  # by site and value
    weights = record.weights or (None,) * len(record.row)
    for i, reuse, reason, each in zip(graph.reached, record.row, record.reasons, weights, strict=True):
        site = graph.found.sites[i]
        depths.update({(site.name, value): graph.rules[i].depth for value in site.values})
        if reason not in (DecisionReason.COVERED, DecisionReason.VERIFIED):
            shared = graph.rules[i].slot_format
            lender = shared.stream if isinstance(shared, ShareGuidance) and reuse else None
            where = (lender or stream, observation.position)
            other = shared.stream if isinstance(shared, GuidanceDelta) and shared.stream != stream else None
            step.add(graph.found.sites[i], graph.bound.formats[i], reuse, where, kept, each, other)
    if step.missing is not None:
        check.fail(Difference(step.missing, record.step, "replay: reused, and never computed in this trajectory"))
        return None
    run = kind(graph.bound.gm, step.instead, step.keep, step.shared, step.after)
    with torch_compat.no_autocast():  # the captured graph has its casts already
        outputs = run.run(*observation.args)
    for key, codec, read in step.computed:
        older = kept.get(key, ())
        value = run.values[key[-1]]
        if key in step.lent:
            if step.lent[key] not in kept:
                continue  # nothing to differ from yet
            value = value - kept[step.lent[key]][0]
        kept[key] = encoded(value, codec, run.seen(read, key[-1]), older, depths[key[-2:]])
    values = {_name(key): kept[key][0] for key in step.compared if key in kept}
    return {**values, **{f"output {i}": out for i, out in enumerate(outputs) if isinstance(out, Tensor)}}


def _name(key: Key) -> str:
    return f"{key[-2]}: {key[-1]}"


def _compare(
    check: Check,
    graph: Rewritten,
    observation: Observation,
    expected: dict[str, Tensor],
    wide: dict[str, Tensor] | None,
) -> None:
    found = _found(graph, observation)
    ours = {name: found[name].to(theirs.dtype) for name, theirs in expected.items()}
    differing = [name for name, theirs in expected.items() if not equal(ours[name], theirs)]
    usual = _usual_rounding(expected, wide) if differing and wide is not None else 0.0
    for name in differing:
        theirs, where = expected[name], Difference(name, observation.record.step, "replay")
        error = max_abs_error(ours[name], theirs)
        if wide is not None and rms([ours[name]], [wide[name]]) <= _allowed(theirs, wide[name], usual):
            check.exact = False
            check.max_abs_error = max(check.max_abs_error, error)
            check.first_difference = check.first_difference or where
        else:
            check.fail(where, error)


def _allowed(theirs: Tensor, wide: Tensor, usual: float) -> float:
    """Return the allowed RMS distance of lowered code from float64."""
    return SLACK * max(rms([theirs], [wide]), usual * _size(wide))


def _usual_rounding(found: Mapping[str, Tensor], wide: Mapping[str, Tensor]) -> float:
    """Return the median over the tensors of one call of the RMS distance from float64, relative to the tensor's RMS.

    The rounding error of a tensor with few elements may be close to 0 by chance, so it is no measure on its own; for
    example, the gate of an expert that was chosen alone is a number divided by itself. The median excludes such cases,
    and also those where the float64 replay takes another branch.
    """
    pairs = [(rms([tensor], [wide[name]]), _size(wide[name])) for name, tensor in found.items()]
    relative = [error / size for error, size in pairs if math.isfinite(error) and 0 < size < math.inf]
    return statistics.median(relative) if relative else 0.0


def _size(tensor: Tensor) -> float:
    return rms([tensor], [torch.zeros_like(tensor)])


def _found(graph: Rewritten, observation: Observation) -> dict[str, Tensor]:
    """Return the outputs and stored values of the rewritten model, by the same names."""
    found = {f"output {i}": out for i, out in enumerate(observation.outputs) if isinstance(out, Tensor)}
    for i, slot in zip(graph.reached, observation.slots, strict=True):
        site, (codec, _) = graph.found.sites[i], graph.bound.formats[i]
        if not isinstance(codec, ValueCodec):
            continue
        rest = list(slot or ())
        for name in site.values if slot is not None else ():
            value = rest.pop(0)
            if codec.format in ("int8", "fp8") and value.ndim >= 2:
                value = value.float() * rest.pop(0)
            found[f"{site.name}: {name}"] = value
    return found
