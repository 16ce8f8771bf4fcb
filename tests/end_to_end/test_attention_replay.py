"""Strategies inside attention on every model: which sites they reach, and whether `verify` replays them exactly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dit_rewrite import BlockwiseReuse, Policy, Rule, Where, WindowResidual
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.errors import DecisionReason, RefusalReason
from dit_rewrite.guards import step
from dit_rewrite.module import attach, twin
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.proof.compare import Check
from dit_rewrite.proof.replay import check_replay
from dit_rewrite.runtime.session import Observation
from tests.helpers.attention import ATTENTION, QUARTER, scheduled
from tests.helpers.models import MODELS, Case

slow = pytest.mark.slow

CROSS = RefusalReason.OTHER_TOKENS


@dataclass(frozen=True)
class Figures:
    """Counts for one model, made by hand: attentions, attentions with one core over one sequence, refusals by
    policy."""

    attentions: int
    windowed: int
    refused: Mapping[RefusalReason, int]
    refused_inside: Mapping[RefusalReason, int]
    marks: tuple[Any, ...] = (slow,)


FIGURES = {
    "dit": Figures(3, 3, {}, {}),
    "pixart_alpha": Figures(6, 3, {CROSS: 3}, {CROSS: 1}, ()),
    "pixart_sigma": Figures(6, 3, {CROSS: 3}, {CROSS: 1}),
    "sd3": Figures(3, 3, {}, {}),
    "flux": Figures(4, 4, {}, {}),
    "cogvideox": Figures(3, 3, {}, {}),
    "latte": Figures(6, 4, {CROSS: 2}, {CROSS: 1}),
    "wan": Figures(4, 2, {CROSS: 2}, {CROSS: 1}),
    "stdit": Figures(6, 4, {CROSS: 2}, {CROSS: 1}),
    # Behind a graph break the mask of a block is an input, and nothing proves that it equals the mask of the last call.
    "omnigen": Figures(3, 3, {}, {RefusalReason.MOVING_MASK: 2}),
    # A joint attention has one core per sample, because the mask keeps a different number of text tokens in each. No
    # core stands for the whole attention, and the tokens of a sample are selected out of the batch.
    "mochi": Figures(3, 0, {RefusalReason.NO_CORE: 3, RefusalReason.MIXES_SAMPLES: 3}, {RefusalReason.NO_CORE: 3}),
}
assert FIGURES.keys() == MODELS.keys()


def cases(**more: Any) -> list[Any]:
    """The models as parameters; `more` maps a model's name to its marks."""
    return [
        pytest.param(MODELS[name], figures, id=name, marks=[*figures.marks, *more.get(name, ())])
        for name, figures in FIGURES.items()
    ]


def replayed(case: Case, policy: Policy, lowering: str, steps: int, exact: bool) -> tuple[list[Rewritten], Check]:
    """Run one trajectory in which every site must do each strategy that it can do, and replay it."""
    model = case.build()
    backend = Backend(model, policy, Lowering.of("aot_eager", partition=lowering))
    compiled, observed = attach(twin(model), backend), list[Observation]()
    backend.session.observer = observed.append
    with torch.no_grad(), compiled.trajectory(steps):
        for arguments in case.inputs(steps):
            compiled(**arguments)
    check = Check()
    check_replay(check, backend.rewritten, observed, ["main"] * len(observed), exact)
    reused = {(o.graph, i) for o in observed for i, why in enumerate(o.record.reasons) if why is DecisionReason.RULE}
    reached = [(g, r.found.sites[i]) for g, r in enumerate(backend.rewritten) for i in r.reached]
    indices = [(g, k) for g, r in enumerate(backend.rewritten) for k in range(len(r.reached))]
    asked = {where for where, (_, site) in zip(indices, reached, strict=True) if site.part is not Part.CORE_STATE}
    assert asked <= reused
    return backend.rewritten, check


def parts(graphs: Sequence[Rewritten]) -> dict[Part, int]:
    """How many parts of each kind are guarded."""
    return dict(Counter(graph.found.sites[i].part for graph in graphs for i in graph.reached))


def refusals(graphs: Sequence[Rewritten]) -> dict[RefusalReason, int]:
    """How many attentions were refused, by reason."""
    places = re.compile(r".*(attn|core|guidance)[^/]*")
    named = (r for graph in graphs for r in graph.found.refused if places.fullmatch(r.path))
    return dict(Counter(refusal.reason for refusal in named))


@pytest.mark.parametrize(("case", "figures"), cases())
def test_all_of_ditfastattn_is_replayed(case: Case, figures: Figures) -> None:
    """Half a batch may round differently, so outputs must be as close to float64 as the interpreter's outputs are."""
    graphs, check = replayed(case, scheduled("FAXSW", QUARTER, 1), "variants", 5, exact=False)
    cores = {Part.CORE: figures.windowed, Part.CORE_STATE: figures.windowed} if figures.windowed else {}
    shared = {} if RefusalReason.MIXES_SAMPLES in figures.refused else {Part.CFG_SHARED: figures.attentions}
    assert parts(graphs) == {Part.BRANCH: figures.attentions, **cores, **shared}
    assert refusals(graphs) == figures.refused
    assert check.within, check.first_difference


def inside(threshold: float) -> Policy:
    """From the second step on: a window in the first block, blockwise reuse over 4 keys at a time in the others."""
    window, changed = WindowResidual(0.25), BlockwiseReuse(threshold, 4)
    places = {"*.0": window, "*.0.*": window, "*.[1-9]": changed, "*.[1-9].*": changed}
    return Policy(tuple(Rule(step > 0, do, Where(ATTENTION, names=names)) for names, do in places.items()))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_blocks_of_the_condition_are_replayed(name: str) -> None:
    """Some of them kept, bit for bit; the text comes behind the image in SD3, and before it in FLUX."""
    do = BlockwiseReuse(3.0, 3, certify=True, keys="condition")
    _, check = replayed(MODELS[name], Policy((Rule(step > 0, do, Where(ATTENTION)),)), "variants", 3, exact=True)
    assert check.exact, check.first_difference


@pytest.mark.filterwarnings("ignore:.*reaches no site of Mochi")
@pytest.mark.parametrize(("case", "figures"), cases())
def test_what_is_inside_attention_is_replayed(case: Case, figures: Figures) -> None:
    """Windows and blockwise reuse, bit for bit."""
    graphs, check = replayed(case, inside(0.05), "segments", 3, exact=True)
    count = figures.attentions - sum(figures.refused_inside.values())
    assert parts(graphs) == ({Part.CORE: count, Part.CORE_STATE: count} if count else {})
    assert refusals(graphs) == figures.refused_inside
    assert check.exact, check.first_difference
