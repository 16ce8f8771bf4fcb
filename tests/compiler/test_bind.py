"""Binding policies to models: their sites, measurements and number of segments; and every policy verified."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sympy import Eq, Mod
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite import Policy, Reuse, ReuseKV, Rule, Where, verify
from dit_rewrite.errors import LayersOutside, LoweringReason, NeedsSegments, OverlappingSpans, RefusalReason, TwoStores
from dit_rewrite.guards import drift, entropy, similarity, step
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA, FirstBlockCache
from tests.helpers import tiny
from tests.helpers.streams import SHAPES, Plain, single
from tests.helpers.tiny import calls, outputs, rewritten, row, same
from tests.helpers.tracing import Toy, tokens


class Denoiser(nn.Module):
    """A toy with a denoiser's input names; `changes` is how much of the latent a step changes."""

    def __init__(self, toy: Toy, inputs: int) -> None:
        super().__init__()
        self.toy, self.inputs = toy, inputs

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        x = hidden_states + 0 * timestep
        return self.toy(x, condition) if self.inputs == 2 else self.toy(x)


def denoiser(name: str) -> Denoiser:
    build, shapes = SHAPES[name]
    return Denoiser(build(), len(shapes)).eval().requires_grad_(False)


def steps(name: str, count: int, change: float = 0.02) -> list[dict[str, Any]]:
    """A trajectory of a toy: every step changes the latent a little."""
    shapes = SHAPES[name][1]
    start, towards = tokens(0, *shapes[0]), tokens(5, *shapes[0])
    condition = tokens(1, *shapes[1]) if len(shapes) > 1 else None
    return [
        {"hidden_states": start + change * k * towards, "timestep": torch.tensor(1 - k / count), "condition": condition}
        for k in range(count)
    ]


def strategies(model: Any, last: int) -> list[dict[str, str]]:
    return [decision.strategies for decision in model.stats().decisions[-last:]]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (Policy((Rule(step > 0, where=Where(span="stack", layers=(0, 3))),)), LayersOutside),
        (Policy((Rule(step > 0, where=Where(span="block", layers=(2, None))),)), LayersOutside),
        (
            Policy((Rule(step > 0), Rule(step > 2, Reuse("int8")))),
            TwoStores,
        ),
    ],
    ids=["stack", "blocks", "stores"],
)
def test_what_does_not_fit_the_model(policy: Policy, error: type[Exception]) -> None:
    """It raises an error at the first call, instead of a policy that does nothing."""
    compiled = rewritten(tiny.build(), policy)
    with pytest.raises(error):
        outputs(compiled, calls(1))


def test_spans_that_overlap() -> None:
    places = [Where(span="stack", layers=layers) for layers in ((0, 2), (1, 3))]
    compiled = rewritten(tiny.build(3), Policy(tuple(Rule(step > 0, where=where) for where in places)))
    with pytest.raises(OverlappingSpans, match="blocks 0 to 1 and 1 to 2 overlap"):
        outputs(compiled, calls(1))


def test_what_must_be_cut_cannot_be_variants() -> None:
    """A graph in one segment cannot use a measurement of the same call; with a lag of one call it can."""
    compiled = rewritten(tiny.build(), FirstBlockCache(0.1), lowering="variants")
    with pytest.raises(NeedsSegments, match=r"lowering='segments' or 'auto', or give the policy lag=1"):
        outputs(compiled, calls(1))
    late = rewritten(tiny.build(), FirstBlockCache(0.1, lag=1), lowering="variants")
    outputs(late, calls(4))
    (graph,) = late.explain().rewritten
    assert (graph.partition.segments.count, graph.partition.why) == (1, LoweringReason.ASKED)


@pytest.mark.parametrize(
    ("policy", "why", "segments"),
    [
        (FORA(3), LoweringReason.FEW_ROWS, 1),
        (FirstBlockCache(0.1), LoweringReason.MEASURES_NOW, 3),
        (FirstBlockCache(0.1, lag=1), LoweringReason.FEW_ROWS, 1),
        (
            Policy((Rule(entropy < 1),)),
            LoweringReason.FEW_ROWS,
            1,
        ),  # the slot holds the last computed value: nothing waits
    ],
    ids=["by steps", "now", "late", "entropy"],
)
def test_why_it_is_laid_out_so(policy: Policy, why: LoweringReason, segments: int) -> None:
    compiled = rewritten(tiny.build(), policy)
    outputs(compiled, calls(3))
    (graph,) = compiled.explain().rewritten
    assert (graph.partition.why, graph.partition.segments.count) == (why, segments)
    assert str(why) in str(compiled.explain())


def test_what_is_refused_is_reported() -> None:
    """Spans without a counterpart, attention without an op, probes inside the site that they would decide."""
    compiled = dit_rewrite.compile(
        denoiser("post-norm"), Policy((Rule(step > 0, where=Where(span="block")),)), backend="aot_eager"
    )
    outputs(compiled, steps("post-norm", 2))
    reasons = [refusal.reason for refusal in compiled.explain().refused]
    assert reasons.count(RefusalReason.OTHER_STACK) == 1
    compiled = dit_rewrite.compile(
        denoiser("single"), Policy((Rule(similarity("first_block") < 1),)), backend="aot_eager"
    )
    outputs(compiled, steps("single", 2))
    refused = [refusal.path for refusal in compiled.explain().refused if refusal.reason is RefusalReason.PROBE_WITHIN]
    assert refused == ["toy.blocks.0.attn", "toy.blocks.0.ff"]


# --- first-block caching ----------------------------------------------------------------------------------------------


@torch.no_grad()
def first_block_by_hand(model: Denoiser, inputs: list[dict[str, Any]], threshold: float) -> tuple[list[Tensor], str]:
    """ParaAttention's rule, written out: run the first block; where its residual has changed little since the last step
    that ran all blocks, add the change that the other blocks made then."""
    toy, results, did = model.toy, [], ""
    residual: Tensor | None = None
    change = torch.zeros(1)
    for arguments in inputs:
        x = toy.enter(arguments["hidden_states"])
        signal = arguments["condition"]
        first = toy.blocks[0](x, signal)
        now = first - x
        similar = residual is not None and float((now - residual).abs().sum() / residual.abs().sum()) <= threshold
        if similar:
            last = first + change
        else:
            last = first
            for block in toy.blocks[1:]:
                last = block(last, signal)
            residual, change = now, last - first
        did += "R" if similar else "C"
        results.append(toy.head(toy.norm(last)))
    return results, did


@pytest.mark.parametrize(("threshold", "some"), [(0.0, False), (0.03, True), (10.0, True)])
def test_first_block_cache(threshold: float, some: bool) -> None:
    """The same decisions at every step, and the same results."""
    model, inputs = denoiser("single"), steps("single", 12, 0.01)
    expected, did = first_block_by_hand(model, inputs, threshold)
    assert ("R" in did) is some
    compiled = dit_rewrite.compile(twin(model), FirstBlockCache(threshold), backend="aot_eager")
    for _ in range(2):
        with compiled.trajectory(12):
            found = outputs(compiled, inputs)
        assert row(compiled, 12) == did
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert compiled.stats().late_variants == 0


def test_what_a_reused_stack_costs() -> None:
    """One span, whose slot is one stream; the segments inside it do not run."""
    compiled = rewritten(tiny.build(4), FirstBlockCache(10.0))
    outputs(compiled, calls(3))
    assert row(compiled, 3) == "CRR"
    (graph,) = compiled.explain().rewritten
    assert [site.span for site in graph.partition.sites] == [(1, 4)]
    inside = [graph.variants[k, (True,)] for k in (1, 2)]
    assert all(not (variant.outputs or variant.fresh) for variant in inside)


# --- every policy is verified -----------------------------------------------------------------------------------------

POLICIES = {
    "stack": Policy((Rule(Mod(step, 3) > 0, where=Where(span="stack")),)),
    "blocks, int8": Policy((Rule(Mod(step, 2) > 0, Reuse("int8"), Where(span="block")),)),
    "keys, fp8": Policy((Rule(Mod(step, 2) > 0, ReuseKV("fp8")),)),
    "entropy": Policy((Rule((entropy < 1.5) & (Mod(step, 2) > 0)),)),  # ln 4 is the maximum
    "own stream": Policy((Rule(similarity("self") < 0.03),)),
    "drift": Policy((Rule(drift("modulated_input") < 0.05, where=Where(span="stack")),)),
    "late": Policy((Rule(drift("modulated_input") < 0.05, where=Where(span="stack")),), lag=1),
    "latent": Policy((Rule(drift("latent") < 0.2, where=Where(span="stack")),)),
    "output": Policy((Rule((similarity("output") < 0.2) & (Mod(step, 2) > 0)),)),
    "first block": Policy((Rule(similarity("first_block") < 0.03, where=Where(span="block")),)),
    "stack, else branches": Policy(
        (Rule(Eq(Mod(step, 4), 3), where=Where(span="stack")), Rule(Mod(step, 2) > 0, where=Where(("mlp",))))
    ),
    "keys, else branches": Policy((Rule(Eq(Mod(step, 3), 1), ReuseKV()), Rule(Eq(Mod(step, 3), 2), Reuse()))),
}


# a graph is cut by default if it measures its own call, and is not if it measures nothing
CASES = [
    (name, "segments" if name in ("blocks, int8", "keys, else branches", "late", "output") else "auto")
    for name in POLICIES
]


@pytest.mark.parametrize(("name", "lowering"), CASES)
def test_verified(name: str, lowering: str) -> None:
    """Reuse 0 and the replay are exact for every kind of rule, and something is reused."""
    torch.manual_seed(0)  # how much the blocks change decides what is reused
    model = Denoiser(single(2), 2).eval().requires_grad_(False)
    found = verify(model, steps("single", 6), policy=POLICIES[name], backend="aot_eager", lowering=lowering)
    assert found.exact
    assert 0 < found.reused < found.decisions


@torch.no_grad()
@pytest.mark.parametrize("guard", [drift("latent") < 0.2, similarity("latent") < 0.2, similarity("output") < 0.5])
@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_known_before_the_call_needs_no_segments(guard: Any, lag: int) -> None:
    """The latent, and the outputs of earlier calls: one straight graph for each row, and it is verified."""
    model = Denoiser(single(2), 2).eval().requires_grad_(False)
    policy = Policy((Rule(guard, where=Where(span="stack")),), lag=lag)
    found = verify(model, steps("single", 6), policy=policy, backend="aot_eager", lowering="variants")
    assert found.exact
    assert 0 < found.reused < found.decisions


@torch.no_grad()
def test_a_latent_that_stands_still() -> None:
    """Measured by hand: the change of the latent between calls, added up until a call computes."""
    compiled = rewritten(tiny.build(), Policy((Rule(drift("latent") < 0.5),)), lowering="variants")
    inputs = [{**calls(1)[0], "timestep": call["timestep"]} for call in calls(6)]
    latent = inputs[0]["hidden_states"]
    for k, call in enumerate(inputs):
        call["hidden_states"] = latent * (1 + 0.2 * k)
    with compiled.trajectory(6):
        outputs(compiled, inputs)
    changes = [0.2 / (1 + 0.2 * k) for k in range(5)]  # 0.2, 0.167, 0.143, 0.125, 0.111
    assert changes[0] + changes[1] < 0.5 < sum(changes[:3])
    assert row(compiled, 6) == "CRRCRR"
    read = [decision.measured for decision in compiled.stats().decisions[-6:]]
    expected = [changes[0], sum(changes[:2]), sum(changes[:3]), changes[3], sum(changes[3:5])]
    assert read[0] == {}, "nothing is known at the first step"
    for numbers, value in zip(read[1:], expected, strict=True):
        assert set(numbers) == set(compiled.stats().decisions[-1].strategies)
        assert all(found == {"drift(latent)": pytest.approx(value, rel=1e-4)} for found in numbers.values())


@pytest.mark.parametrize("probe", ["first_block", "modulated_input"])
def test_a_site_before_its_probe(probe: str) -> None:
    """A site that runs before the probe is measured is refused, as is one that the probe is computed from.

    The image's MLP of the first joint block runs before the text's stream is updated, which does not depend on it.
    """
    policy = Policy((Rule(similarity(probe) < 0.5, where=Where(("mlp",))),))
    found = verify(denoiser("joint"), steps("joint", 4), policy=policy, backend="aot_eager")
    assert found.exact, str(found)


def test_a_site_before_the_probe_of_the_span_around_it() -> None:
    """The same where a span is measured and computes: the MLP inside it runs before the measurement."""
    stack = Rule(similarity("first_block") < 1e-4, where=Where(span="stack"))
    inside = Rule(Eq(Mod(step, 2), 1), where=Where(("mlp",)))
    found = verify(denoiser("joint"), steps("joint", 4), policy=Policy((stack, inside)), backend="aot_eager")
    assert found.exact, str(found)


@torch.no_grad()
@pytest.mark.parametrize(("name", "probe"), [("joint", "first_block"), ("single", "modulated_input")])
def test_a_measured_stack_beside_rules_for_what_lies_in_it(name: str, probe: str) -> None:
    """A rule for the branches inside does not stop the stack from being measured and reused."""
    stack = Rule(similarity(probe) < 10, where=Where(span="stack"))
    inside = Rule(Eq(Mod(step, 2), 1), where=Where(("mlp",)))
    for rules in ((stack,), (stack, inside)):
        compiled = dit_rewrite.compile(denoiser(name), Policy(rules), backend="aot_eager")
        with compiled.trajectory(4):
            for arguments in steps(name, 4):
                compiled(**arguments)
        (span,) = [site.name for site in compiled.explain().rewritten[0].partition.sites if site.span is not None]
        assert [decision[span] for decision in strategies(compiled, 4)] == ["compute", "reuse", "reuse", "reuse"]


# --- streams ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rules_of_a_named_stream() -> None:
    """A rule for "uncond" reuses in that stream only; both streams have their own slots, and nothing is compiled
    late."""
    model = tiny.build()
    compiled = rewritten(model, Policy((Rule(step > 0, where=Where(streams=("uncond",))),)))
    streams = {"cond": calls(4, seed=0), "uncond": calls(4, seed=1)}
    rows = {name: "" for name in streams}
    with compiled.trajectory(4):
        for k in range(4):
            for name, inputs in streams.items():
                with compiled.cache_context(name):
                    found = compiled(**inputs[k])
                rows[name] += row(compiled, 1)
                if name == "cond" or k == 0:
                    assert torch.equal(found, model(**inputs[k]))
    assert rows == {"cond": "CCCC", "uncond": "CRRR"}
    assert compiled.stats().late_variants == 0


# --- tensors that the caller changes ----------------------------------------------------------------------------------


class Flattened(nn.Module):
    """The stream is a view of the latent, with the same shape or another memory order."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Plain(), Plain()])
        self.transposed = transposed

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states.transpose(1, 2) if self.transposed else hidden_states.flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize(
    ("probe", "transposed", "lag"),
    [("self", False, 0), ("self", True, 0), ("self", True, 1), ("modulated_input", False, 0), ("first_block", True, 1)],
)
def test_a_latent_that_is_changed_in_place(probe: str, transposed: bool, lag: int) -> None:
    """Every step moves the latent in place: no probe measures a change of zero."""
    model = Flattened(transposed).eval().requires_grad_(False)
    policy = Policy((Rule(similarity(probe) < 0.05, where=Where(layers=(1, None))),), lag=lag)
    latent = tokens(0, 2, 8, 6) if transposed else tokens(0, 2, 3, 2, 8)
    compiled = dit_rewrite.compile(twin(model), policy, backend="aot_eager")
    with compiled.trajectory(5):
        for k in range(5):
            expected = model(latent, torch.tensor(1 - k / 5))
            assert torch.equal(compiled(latent, torch.tensor(1 - k / 5)), expected)
            latent.add_(tokens(7 + k, *latent.shape), alpha=0.3)
    assert all("reuse" not in decision.values() for decision in strategies(compiled, 5))


@torch.no_grad()
def test_nothing_is_measured_before_a_new_trajectory() -> None:
    """A first step has nothing to compare with, even where the last trajectory ended with the same latent."""
    compiled = rewritten(tiny.build(), FirstBlockCache(10.0))
    inputs = calls(3)
    for _ in range(2):
        with compiled.trajectory(3):
            outputs(compiled, inputs)
        assert row(compiled, 3) == "CRR"


@torch.no_grad()
def test_not_a_number_is_no_similarity() -> None:
    """A latent with NaN computes at every step."""
    model = tiny.build()
    compiled = rewritten(model, FirstBlockCache(10.0))
    inputs = calls(4)
    inputs[1]["hidden_states"][0, 0, 0] = torch.nan
    with compiled.trajectory(4):
        found = outputs(compiled, inputs)
    assert row(compiled, 4) == "CCCR", "NaN is not similar to anything"
    assert torch.allclose(found[1], model(**inputs[1]), equal_nan=True)
    assert same(found[2:3], [model(**inputs[2])])


def test_shared_code_is_compiled_once() -> None:
    """Eight blocks in segments share as many compiled functions as four blocks have."""
    counts = []
    for layers in (4, 8):
        compiled = rewritten(tiny.build(layers), FORA(3), lowering="segments")
        outputs(compiled, calls(4))
        counts.append((len(compiled.explain().rewritten[0].compiled), compiled.stats().variants))
    assert counts[0] == counts[1]
