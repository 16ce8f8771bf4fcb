"""Policies end to end: their sites, the first rule that applies, the steps that reuse, and the memory."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sympy
import torch
from sympy import Eq, Mod, Ne
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite import Compute, Policy, Rule, Where
from dit_rewrite.errors import DecisionReason, LoweringReason
from dit_rewrite.guards import age, layer, num_layers, num_steps, step, streak
from dit_rewrite.passes.analysis.sites import Kind, Part, Site
from dit_rewrite.policies import FORA, Never
from tests.helpers import tiny
from tests.helpers.tiny import calls, outputs, rewritten, row, same
from tests.references.fora import ModuleCache

VALUE_BYTES = 2 * 8 * tiny.WIDTH * 4  # a value is as large as the stream: 2 samples, 8 tokens, float32


def rules(*given: Any, name: str = "test") -> Policy:
    """A policy of rules; a guard alone stands for a rule that reuses at all sites."""
    return Policy(tuple(rule if isinstance(rule, Rule) else Rule(rule) for rule in given), name)


def sites_of(compiled: dit_rewrite.RewrittenModule) -> list[str]:
    """The guarded sites, by name."""
    return list(compiled.stats().decisions[-1].strategies)


def test_never_is_the_plain_model() -> None:
    model = tiny.build()
    compiled = rewritten(model, Never())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(outputs(compiled, calls(4)), outputs(model, calls(4)))
    stats = compiled.stats()
    assert (stats.variants, stats.computed, stats.reused, stats.cache_bytes) == (1, 0, 0, 0)
    assert stats.recomputed_fraction == 1.0
    assert not any(place.reachable for place in compiled.explain().sites)
    assert len(compiled.explain().sites) == tiny.SITES


def test_a_policy_that_reaches_nothing_warns_once() -> None:
    model = tiny.build()
    compiled = rewritten(model, FORA(3, kinds=("cross",)))
    with pytest.warns(UserWarning, match="reaches no site of TinyDiT"):
        outputs(compiled, calls(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(outputs(compiled, calls(4)), outputs(model, calls(4)))


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        (("self",), ["blocks.0.attn", "blocks.1.attn"]),
        (("attention",), ["blocks.0.attn", "blocks.1.attn"]),
        (("mlp",), ["blocks.0.mlp", "blocks.1.mlp"]),
        (("mlp", "cross"), ["blocks.0.mlp", "blocks.1.mlp"]),
        (("self", "mlp"), ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]),
    ],
)
def test_rules_by_kind(kinds: tuple[str, ...], names: list[str]) -> None:
    compiled = rewritten(tiny.build(), FORA(3, kinds=kinds))
    outputs(compiled, calls(3))
    assert sites_of(compiled) == names
    assert compiled.stats().cache_bytes == len(names) * VALUE_BYTES


@pytest.mark.parametrize(
    ("kinds", "selected"),
    [
        (("attention",), "self cross joint"),
        (("mlp",), "mlp"),
        (("attention", "mlp"), "self cross joint parallel mlp"),
        (("self", "mlp"), "self parallel mlp"),
        (("parallel",), "parallel"),
        ((), ""),
    ],
)
def test_what_kinds_select(kinds: tuple[str, ...], selected: str) -> None:
    """A parallel site is an attention and an MLP at once."""
    sites = [SimpleNamespace(kind=kind, part=Part.BRANCH) for kind in Kind]
    found = [site.kind.value for site in sites if Where(kinds).selects(cast("Site", site))]
    assert found == selected.split()


COMPUTE_AT_1 = Rule(Eq(step, 1), do=Compute())


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (rules(COMPUTE_AT_1, sympy.true), "CCRRR"),
        (rules(sympy.true, COMPUTE_AT_1), "CRRRR"),
        (rules(Eq(step, 1), COMPUTE_AT_1, Eq(step, 2)), "CRRCC"),
        (rules(age <= 2), "CRRCR"),
        (rules(streak < 1), "CRCRC"),
        (rules((age <= 3) & (streak < 2)), "CRRCR"),
        (rules(step >= num_steps - 2), "CCCRR"),
        (rules(1 / (step - 2) > 0), "CCCRR"),
    ],
    ids=["compute first", "compute last", "two steps", "age", "streak", "both", "the last two", "by zero"],
)
def test_rules_in_order_and_guards_by_symbol(policy: Policy, expected: str) -> None:
    compiled = rewritten(tiny.build(), policy)
    for _ in range(2):
        with compiled.trajectory(5):
            outputs(compiled, calls(5))
        assert row(compiled, 5) == expected
    assert (compiled.stats().late_variants, compiled.stats().recompiles) == (0, 0)


def test_a_site_whose_first_rule_always_computes_is_not_guarded() -> None:
    compiled = rewritten(tiny.build(), rules(Rule(sympy.true, do=Compute(), where=Where(("self",))), step > 0))
    outputs(compiled, calls(2))
    assert sites_of(compiled) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert row(compiled, 2) == "CR"


@pytest.mark.parametrize("guard", [layer < 1, Eq(layer, 0), layer < num_layers - 1], ids=str)
def test_a_guard_by_layer_costs_nothing_elsewhere(guard: Any) -> None:
    model = tiny.build()
    compiled = rewritten(model, rules(guard & Ne(Mod(step, 3), 0)))
    inputs = calls(7)
    found = outputs(compiled, inputs)
    assert sites_of(compiled) == ["blocks.0.attn", "blocks.0.mlp"]
    assert compiled.stats().cache_bytes == 2 * VALUE_BYTES
    assert [place.guard for place in compiled.explain().sites] == 2 * ["step mod 3 ≠ 0"] + 2 * [""]
    first = model.blocks[0]
    assert same(found, scheduled(model, inputs, {first.attn: 3, first.mlp: 3}))


def scheduled(model: nn.Module, inputs: list[dict[str, Any]], intervals: dict[nn.Module, int]) -> list[Tensor]:
    """The outputs of a model in which each module computes at its own interval of steps."""
    results = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        caches = {stack.enter_context(ModuleCache([module])): interval for module, interval in intervals.items()}
        for now, arguments in enumerate(inputs):
            for cache, interval in caches.items():
                cache.reuse = now % interval != 0
            results.append(model(**arguments))
    return results


def test_many_rows() -> None:
    """Each site has its own interval: in 16 steps there are 10 different rows.

    As variants, 8 rows are foreseen and 2 compile late; a higher limit foresees more. Two segments need only the 4 rows
    of their own 2 sites, so that none is late; this lowering is the default here.
    """
    model, inputs = tiny.build(), calls(16)
    first, second = model.blocks
    intervals = {first.attn: 2, first.mlp: 3, second.attn: 4, second.mlp: 5}
    policy = rules(
        Rule(Ne(Mod(step, 2 + 2 * layer), 0), where=Where(("self",))),
        Rule(Ne(Mod(step, 3 + 2 * layer), 0), where=Where(("mlp",))),
    )
    rows = {tuple(now % interval != 0 for interval in intervals.values()) for now in range(16)}
    assert len(rows) == 10
    expected = scheduled(model, inputs, intervals)
    for options, late, why in [
        ({"lowering": "variants"}, 2, LoweringReason.ASKED),
        ({"lowering": "variants", "max_variants": 10}, 0, LoweringReason.ASKED),
        ({"max_variants": 10}, 0, LoweringReason.FEW_ROWS),
        ({}, 0, LoweringReason.MANY_ROWS),
        ({"lowering": "segments"}, 0, LoweringReason.ASKED),
    ]:
        compiled = rewritten(model, policy, **options)
        for _ in range(2):
            with compiled.trajectory(16):
                assert same(outputs(compiled, inputs), expected)
            stats = compiled.stats()
            assert stats.late_variants == late
            assert (stats.recompiles, dict(stats.misses)) == (0, {})
            (graph,) = compiled.explain().rewritten
            assert graph.partition.why is why
            if graph.partition.segments.count == 1:
                assert stats.variants == 10
            else:
                assert {len(row) for _, row in graph.variants} <= {0, 2}


def test_guards_see_no_total_while_watched() -> None:
    compiled = rewritten(tiny.build(), FORA(3, anchor="paper"))
    outputs(compiled, calls(4))
    assert row(compiled, 4) == "CCCC"
    assert {reason for d in compiled.stats().decisions for reason in d.reasons.values()} == {
        DecisionReason.TOTAL_UNKNOWN
    }
    with compiled.trajectory(4):
        outputs(compiled, calls(4))
    assert row(compiled, 4) == "CRRC"


def test_a_trajectory_of_any_length_is_foreseen_in_no_time() -> None:
    """The plan is foreseen for a thousand steps at most, however long the trajectory is."""
    model = tiny.rewritten(tiny.build(), FORA(3))
    with model.trajectory(num_steps=1 << 40):
        tiny.outputs(model, tiny.calls(2))
    assert model.stats().variants == 2
