"""Choose the sites whose values fit into a memory budget: those that save most time per byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dit_rewrite import torch_compat
from dit_rewrite.compiler import foresee
from dit_rewrite.compiler.bind import Bound
from dit_rewrite.compiler.foresee import Foreseen
from dit_rewrite.compiler.request import Request
from dit_rewrite.compiler.roofline import Roofline
from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.passes.analysis.work import kernels
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.passes.rewrite.guarded_graph import Guarded, GuardedGraph
from dit_rewrite.passes.rewrite.hoist import Hoisted
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from dit_rewrite.passes.rewrite.tiles import TileCodec


@dataclass(frozen=True)
class Candidate:
    """Guarded sites that are kept or left out together: one, or an attention core with its state.

    ``seconds`` is the time that they save over a trajectory, ``bytes`` the size of their slots in one stream.
    """

    sites: tuple[int, ...]
    seconds: float
    bytes: int


def run(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    """The pass: if the slots of all streams exceed the budget, guard only the chosen sites."""
    guarded, request = ctx[GuardedGraph], ctx[Request]
    hoisted = ctx.get(Hoisted)
    free = request.memory_budget // request.streams - (0 if hoisted is None else hoisted.bytes)
    if not guarded.sites or sum(_slot_bytes(guarded)) <= free:
        return gm
    bound = ctx[Bound]
    left_out = not_chosen(list(_candidates(guarded, ctx[Foreseen].rows, [_saved(each) for each in bound.labels])), free)
    ctx.put(bound.without([bound.reached[i] for i in left_out]))
    fitting: GuardedGraph = insert_guards(guarded.source, ctx[Bound].found.sites, ctx[Bound].labels)
    ctx.put(fitting)
    ctx.put(foresee.run(fitting.gm, ctx))
    return fitting.gm


def not_chosen(candidates: Sequence[Candidate], free: int) -> list[int]:
    """Return the sites that do not fit into `free` bytes. Those that save most time per byte are chosen first."""
    left_out: list[int] = []
    for each in sorted(candidates, key=lambda c: -c.seconds / max(c.bytes, 1)):
        if each.bytes <= max(free, 0):
            free -= each.bytes
        else:
            left_out += each.sites
    return sorted(left_out)


def _slot_bytes(guarded: GuardedGraph) -> list[int]:
    return [sum(map(cost.stored_bytes, slot)) for slot in guarded.slot_tensors]


def _saved(label: Guarded) -> float:
    """Return the share of a site that a reusing step does not compute."""
    return label.codec.saved if isinstance(label.codec, TileCodec) else 1.0


def _candidates(guarded: GuardedGraph, rows: Sequence[DecisionRow], saved: Sequence[float]) -> Iterator[Candidate]:
    """Yield the guarded sites with the time that each saves in the foreseen steps; `saved` are shares of their work."""
    nodes = {node.name: node for node in guarded.source.graph.nodes}
    work = {node.name: work for node, work in kernels(guarded.source.graph)}
    roofline = _roofline(next(nodes[value] for site in guarded.sites for value in site.values))
    sizes = _slot_bytes(guarded)
    for i, site in enumerate(guarded.sites):
        if site.part is Part.CORE_STATE:
            continue
        together = [i, *(j for j, p in enumerate(guarded.parents) if p == i and _is_state(guarded, j))]
        seconds = saved[i] * roofline.total(work[name] for name in site.skipped if name in work)
        steps = sum(row[i] and not _covered(row, i, guarded.parents) for row in rows)
        yield Candidate(tuple(together), steps * seconds, sum(sizes[j] for j in together))


def _is_state(guarded: GuardedGraph, index: int) -> bool:
    return guarded.sites[index].part is Part.CORE_STATE


def _covered(row: DecisionRow, index: int, parents: Sequence[int | None]) -> bool:
    """Return whether an enclosing site is reused, so that the site saves nothing itself."""
    around = parents[index]
    return around is not None and row[around]


def _roofline(value: fx.Node) -> Roofline:
    """Return the roofline for the device and the dtype of a value. Fake tensors would measure nothing."""
    tensor = value.meta["val"]
    assert isinstance(tensor, Tensor)
    with torch_compat.unset_fake_temporarily():
        return Roofline.of(tensor.device, tensor.dtype if tensor.is_floating_point() else torch.float32)
