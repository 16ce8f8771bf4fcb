"""CachedAttention on models: thresholds, certificates and padding."""

from __future__ import annotations

import pytest
import torch
from sympy import Eq, Or

from dit_rewrite import BlockwiseReuse, Policy, Rule, Where
from dit_rewrite.guards import step
from dit_rewrite.kernels.blockwise_attention.state import State
from dit_rewrite.policies import CachedAttention
from dit_rewrite.runtime.session import Observation
from tests.helpers import tiny
from tests.helpers.attention import TOLERANCE, Small, apart, ops_of, plain, run, small_calls
from tests.helpers.models import MODELS, output
from tests.references.ditfastattn import INF
from tests.references.fora import ModuleCache

slow = pytest.mark.slow


def test_a_state_is_filled_once_and_then_changed_in_place() -> None:
    policy = Policy((Rule(step > 0, BlockwiseReuse(0.05, 4)),))
    fill, go_on = {("blockwise_fill", 2): 1}, {("blockwise_attention", 2): 1}
    assert ops_of(Small(), small_calls(4), policy) == [fill, go_on, go_on, go_on]
    again = Policy((Rule(Or(Eq(step, 1), Eq(step, 4)), BlockwiseReuse(0.05, 4)),))
    assert ops_of(Small(), small_calls(6), again) == [fill, go_on, {}, fill, go_on, {}]


def counters(observed: Observation) -> list[list[int]]:
    """For each stored state: the pairs of tile and block recomputed since it was filled, and the pairs looked at."""
    states = (held for held in observed.slots if held is not None and len(held) == len(State._fields) - 3)
    return [held[State._fields.index("counters")][:2].tolist() for held in states]


@pytest.mark.parametrize("lowering", ["variants", "segments"])
@pytest.mark.parametrize("threshold", [-INF, 0.0, 3.0, INF])
def test_thresholds(threshold: float, lowering: str) -> None:
    """-inf and 0 both give plain attention, but 0 reuses unchanged pairs; inf reuses everything from the first step."""
    model, inputs = Small(), small_calls(4)
    inputs[2] = inputs[1]  # nothing changed
    compiled = tiny.rewritten(model, Policy((Rule(step > 0, BlockwiseReuse(threshold, 4)),)), lowering=lowering)
    observed: list[Observation] = []
    compiled._backend.session.observer = observed.append
    seen, kept = [], []
    with compiled.trajectory(4):
        found = []
        for i, arguments in enumerate(inputs):
            with compiled.cache_context("main", step_index=i):  # or equal inputs would count as one step
                found += tiny.outputs(compiled, [arguments])
            seen += counters(observed[-1])
            kept.append(list(compiled.stats().kept_blocks.values()))
    pairs = 2 * 2 * 1 * 2  # batch, heads, tiles of queries, blocks of keys
    assert [count for _, count in seen] == [0, pairs, 2 * pairs, 3 * pairs]
    recomputed = [count for count, _ in seen]
    assert kept == [[], *([(all - again, all)] for again, all in seen[1:])]
    computed = plain(model, inputs)
    if threshold == INF:
        with torch.no_grad(), ModuleCache([model.out]) as cache:
            for cache.reuse, arguments, out in zip((False, True, True, True), inputs, found, strict=True):
                assert apart([out], [model(**arguments)])[0] < TOLERANCE
        assert recomputed == [0, 0, 0, 0] and max(apart(found, computed)) > 0.05
    elif threshold > 0:
        assert 0 < recomputed[1] < pairs and recomputed[2] == recomputed[1]
        assert 0.01 < max(apart(found, computed)) < 0.1
    else:
        assert recomputed == [0, pairs, 2 * pairs, 3 * pairs] if threshold < 0 else [0, pairs, pairs, 2 * pairs]
        assert max(apart(found, computed)) < TOLERANCE


def test_certificates() -> None:
    """The only attention of the model is off by no more than its certificate at each reusing step.

    The layers behind it are linear, so that the error of the output has a bound in terms of the attention's.
    """
    model, inputs = Small(), small_calls(4)
    gain = (model.head.weight @ model.out.weight).abs().sum(1).max().item()
    greatest = []
    for threshold in (0.0, 3.0, INF):
        compiled = tiny.rewritten(model, CachedAttention(threshold, 4, kinds=("self",), certify=True))
        with compiled.trajectory(4):
            found = tiny.outputs(compiled, inputs)
        errors = [(a - b).abs().max().item() for a, b in zip(found, plain(model, inputs), strict=True)]
        certificates = compiled.stats().certificates
        assert [certificate.step for certificate in certificates] == [1, 2, 3]
        for error, certificate in zip(errors[1:], certificates, strict=True):
            assert error <= gain * certificate.bound + 1e-6
        greatest.append((max(errors), max(certificate.bound for certificate in certificates)))
    assert greatest[0][1] < 1e-3 < greatest[1][1] < greatest[2][1] and greatest[1][0] > 1e-3


def test_no_certificates_unless_asked() -> None:
    compiled = tiny.rewritten(Small(), CachedAttention(INF, 4, kinds=("self",)))
    with compiled.trajectory(3):
        tiny.outputs(compiled, small_calls(3))
    assert compiled.stats().certificates == [] and compiled.stats().kept_blocks


@pytest.mark.parametrize("padding", [True, pytest.param(False, marks=slow)], ids=["padded", "not padded"])
def test_cross_attention_with_a_padding_mask(padding: bool) -> None:
    """PixArt's text: the first block reuses the result of the first step, the others compute; padding is ignored."""
    case, steps = MODELS["pixart_alpha"], 3
    model, inputs = case.build(), case.inputs(steps)
    mask = inputs[0]["encoder_attention_mask"]
    assert mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    padded = {"encoder_attention_mask": mask if padding else torch.ones_like(mask)}
    inputs = [{**arguments, **padded} for arguments in inputs]
    thresholds = {"*.0.attn2": INF, "*.[12].attn2": -INF}
    rules = (Rule(step > 0, BlockwiseReuse(t, 3, "paper"), Where(names=names)) for names, t in thresholds.items())
    policy = Policy(tuple(rules))
    found = run(model, inputs, policy, "variants")
    with torch.no_grad(), ModuleCache([model.transformer_blocks[0].attn2]) as cache:  # type: ignore[union-attr, index]
        expected = []
        for cache.reuse, arguments in zip((False, True, True), inputs, strict=True):
            expected.append(output(model(**arguments)))
    assert max(apart(found, expected)) < TOLERANCE
    assert min(apart(found, plain(model, inputs))[1:]) > 0.01
    text = inputs[0]["encoder_hidden_states"].clone()
    text[1, 4:] = 7.0
    other = run(model, [{**arguments, "encoder_hidden_states": text} for arguments in inputs], policy, "variants")
    assert (max(apart(other, found)) < TOLERANCE) is padding
