"""Rules, strategies and policies as values; test_decisions_any.py has the decision machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy

from dit_rewrite.errors import (
    BadParameter,
    DecisionReason,
    NotBoolean,
    OverlappingSpans,
    TwoStores,
    UnknownSymbol,
)
from dit_rewrite.guards import age, drift, entropy, num_steps, sigma, similarity, step, streak
from dit_rewrite.passes.analysis.site import Kind, Part, Site
from dit_rewrite.passes.guards import symbols
from dit_rewrite.policies import DQAR, FirstBlockCache
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import (
    BlockwiseReuse,
    Compute,
    Reuse,
    ReuseKV,
    ReuseTiles,
    ShareGuidance,
    Strategy,
    WindowResidual,
)
from dit_rewrite.policy.where import Where
from dit_rewrite.runtime.decide import Choice
from dit_rewrite.runtime.history import Moment

SPAN = Where(span="stack")


def site(part: Part = Part.BRANCH, kind: Kind = Kind.SELF, **more: Any) -> Site:
    return Site("blocks.0.attn", kind, ("value",), ("stream",), "blocks.0", 0, part=part, **more)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Reuse, ReuseKV])
def test_stores(strategy: Callable[..., Strategy]) -> None:
    """The stores that a slot accepts, and those that are refused."""
    assert [strategy(store) for store in (None, "bf16", "fp8", "int8")] == [
        strategy(store=store) for store in (None, "bf16", "fp8", "int8")
    ]
    assert strategy() == strategy(None) != strategy("int8")
    for store in ("int4", "", "INT8", 8, True, False, 0):
        with pytest.raises(BadParameter, match=rf"store={store!r} is out of range.*one of bf16, int8, fp8"):
            strategy(store)


@pytest.mark.parametrize("do", ["reuse", Reuse, None, 3, True, (Reuse(), 3), (Reuse(), Reuse("int8")), [Reuse()]])
def test_what_is_no_strategy(do: Any) -> None:
    with pytest.raises(BadParameter, match=r"Rule: do=.*a strategy of dit_rewrite.strategy"):
        Rule(step > 2, do)


def test_keys_of_a_span() -> None:
    """A span is not an attention, whether it is a block or a stack."""
    for span in ("block", "stack"):
        for do in (ReuseKV(), ReuseTiles(), WindowResidual(), ShareGuidance("first"), BlockwiseReuse(0.1)):
            with pytest.raises(BadParameter, match="other strategies need attention"):
                Rule(step > 2, do, Where(span=span))  # type: ignore[arg-type]
        assert Rule(step > 2, Reuse(), Where(span=span)).parts == {Part.SPAN}  # type: ignore[arg-type]


def test_parts() -> None:
    """The part that each strategy replaces; strategies for different parts can be combined."""
    core = {Part.CORE, Part.CORE_STATE}
    both = (WindowResidual(), ShareGuidance("second"))
    strategies = (Reuse(), ReuseKV(), Compute(), WindowResidual(), BlockwiseReuse(0.1), ShareGuidance("first"), both)
    assert Rule(step > 2, ReuseTiles()).parts == {Part.TILES}
    found = [Rule(step > 2, do).parts for do in strategies]
    assert found == [{Part.BRANCH}, {Part.KV}, set(), core, core, {Part.CFG_SHARED}, {*core, Part.CFG_SHARED}]
    assert Rule(step > 2, both).strategy(Part.CFG_SHARED) == ShareGuidance("second")
    assert Rule(step > 2, both).strategy(Part.BRANCH) == Compute()


@pytest.mark.parametrize(
    "build",
    [
        lambda: WindowResidual(-1),
        lambda: WindowResidual(1.0),
        lambda: WindowResidual((2, 0.5, 1.5)),
        lambda: WindowResidual(True),
        lambda: WindowResidual(2, grid=(2, 2, 2, 2)),
        lambda: ShareGuidance(""),
        lambda: ShareGuidance(1),  # type: ignore[arg-type]
        lambda: BlockwiseReuse(math.nan),
        lambda: BlockwiseReuse(0.1, block=0),
        lambda: BlockwiseReuse(0.1, bound="tight"),  # type: ignore[arg-type]
        lambda: BlockwiseReuse(0.1, certify=1),  # type: ignore[arg-type]
        lambda: BlockwiseReuse(0.1, keys="image"),  # type: ignore[arg-type]
        lambda: ReuseTiles(0),
        lambda: ReuseTiles(1.5),
        lambda: ReuseTiles(tile=0),
        lambda: ReuseTiles(order="random"),  # type: ignore[arg-type]
    ],
)
def test_strategies_out_of_range(build: Callable[[], Strategy]) -> None:
    with pytest.raises(BadParameter, match="is out of range"):
        build()


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "3", True, math.inf])
def test_max_streak_out_of_range(value: Any) -> None:
    with pytest.raises(BadParameter, match=rf"Rule: max_streak={value!r} is out of range. Give .* whole number >= 1"):
        Rule(step > 2, max_streak=value)


@pytest.mark.parametrize("name", ["warmup", "cooldown"])
@pytest.mark.parametrize("value", [-1, 1.0, "3", True, None])
def test_warmup_and_cooldown_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(BadParameter, match=rf"Policy: {name}={value!r} is out of range. Give .* whole number >= 0"):
        Policy((Rule(step > 2),), **{name: value})


@pytest.mark.parametrize("lag", [2, -1, 0.5, 1.0, None, "1"])
def test_lag_out_of_range(lag: Any) -> None:
    with pytest.raises(BadParameter, match="Policy: lag="):
        Policy((), lag=lag)


def test_short_forms() -> None:
    """max_streak, warmup and cooldown become part of the guards; Compute keeps its own."""
    assert Rule(step > 2, max_streak=3).when == (step > 2) & (streak < 3)
    rules = (Rule(step > 2, max_streak=3), Rule(age > 1, Compute()))
    policy = Policy(rules, warmup=4, cooldown=2)
    assert policy.rules[0].when == (step > 2) & (streak < 3) & (step >= 4) & (step < num_steps - 2)
    assert policy.rules[1].when == (age > 1)
    assert Policy(rules).rules == rules
    assert Policy((Rule(age > 1),), warmup=4).rules[0].when == (age > 1) & (step >= 4)


def test_short_forms_are_not_applied_twice() -> None:
    """A policy made of another policy's rules adds nothing to them."""
    policy = Policy((Rule(step > 2, max_streak=3),), warmup=4)
    assert Policy(policy.rules) == replace(policy, name="policy") == policy
    assert replace(policy.rules[0], do=Reuse("int8")).when == policy.rules[0].when


@pytest.mark.parametrize("statistic", [similarity, drift])
def test_probes(statistic: Any) -> None:
    """Each statistic of a probe has one symbol; other names are refused."""
    for probe in ("first_block", "modulated_input", "self", "latent"):
        assert statistic(probe) is statistic(probe)
        assert statistic(probe).name == f"{statistic.__name__}({probe})"
        assert Rule(statistic(probe) < 0.1).when.free_symbols == {statistic(probe)}
    for probe in ("first", "", None, 3):
        with pytest.raises(BadParameter, match="one of first_block, behind_first_block, modulated_input, self, latent"):
            statistic(probe)
    with pytest.raises(UnknownSymbol):
        Rule(sympy.Symbol("similarity(first_block)") < 0.1)
    with pytest.raises(NotBoolean):
        Rule(entropy)


def test_what_a_policy_mentions() -> None:
    rules = (
        Rule(similarity("self") < 0.1, where=Where(streams=("cond",))),
        Rule(sigma < 1, where=Where(streams=("x",))),
    )
    policy = Policy((*rules, Rule(step > 1)))
    assert policy.mentions == {"similarity(self)", "sigma", "step"}
    assert policy.streams == {"cond", "x"}
    assert Policy().mentions == Policy().streams == frozenset()


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        *[(FirstBlockCache, "threshold", value) for value in (-0.1, math.inf, math.nan)],
        *[(DQAR, "warmup", value) for value in (-0.1, 1, 1.5, math.nan)],
        *[(DQAR, "layer_fraction", value) for value in (0, -1, 1.1, math.nan)],
        *[(DQAR, "snr_threshold", value) for value in (-1, math.inf, math.nan)],
        *[(DQAR, "entropy_threshold", value) for value in (-1, math.inf, math.nan)],
        (DQAR, "order", "reverse"),
        (DQAR, "kinds", ("attn",)),
        (FirstBlockCache, "warmup", -1),
        (FirstBlockCache, "max_streak", 0),
        (FirstBlockCache, "lag", 2),
    ],
)
def test_parameters_of_policies_out_of_range(build: Callable[..., Policy], name: str, value: Any) -> None:
    with pytest.raises(BadParameter, match=f"{name}="):
        build(**{name: value})


def test_first_block_cache_written_out() -> None:
    """One rule, over all blocks but the first."""
    (rule,) = FirstBlockCache(0.1, warmup=2, max_streak=4).rules
    assert rule.when == (similarity("first_block") <= 0.1) & (streak < 4) & (step >= 2)
    assert (rule.do, rule.where) == (Reuse(), Where(span="stack", layers=(1, None)))


# --- spans of a policy ------------------------------------------------------------------------------------------------


def places(*where: Where) -> Policy:
    return Policy(tuple(Rule(step > 0, where=each) for each in where))


def spans_of(policy: Policy, count: int, whole: bool = True) -> dict[Where, dict[Any, Any]]:
    """The spans in a graph with this many blocks, which all form one stack."""
    return {where: dict(found) for where, found in policy.spans(count, lambda _: range(count), whole).items()}


def test_spans_of_a_policy() -> None:
    """The blocks of each place's spans."""
    stack, block, some = Where(span="stack"), Where(span="block"), Where(span="stack", layers=(1, 3))
    assert spans_of(places(stack, block, some, Where()), 3) == {
        stack: {(0, 3): {0, 1, 2}},
        block: {(0, 1): {0}, (1, 2): {1}, (2, 3): {2}},
        some: {(1, 3): {1, 2}},
    }


def test_spans_in_a_part_of_a_model() -> None:
    """The blocks have no numbers: a place without an end selects the part's blocks, a place with an end nothing."""
    stack, rest = Where(span="stack"), Where(span="stack", layers=(1, None))
    some, share = Where(span="stack", layers=(0, 1)), Where(span="stack", fraction=(0, 0.5))
    policy = places(stack, rest, some, share, Where(layers=(5, None)))
    assert {where: list(found) for where, found in spans_of(policy, 2, whole=False).items()} == {
        stack: [(0, 2)],
        rest: [(1, 2)],
    }
    assert spans_of(policy, 1, whole=False)[rest] == {}, "and no error: another part may have a second block"


def test_spans_of_a_named_stack() -> None:
    """Layers count the blocks of the stack; those of two stacks that run in turn do not overlap."""
    main, control = Where(span="stack", layers=(1, None)), Where(span="stack", stack="control")
    turns = {None: (1, 3, 5), "control": (0, 2, 4)}
    found = {where: dict(spans) for where, spans in places(main, control).spans(6, turns.__getitem__, True).items()}
    assert found == {main: {(3, 6): {3, 5}}, control: {(0, 5): {0, 2, 4}}}


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((0, 2), (1, 3), True),
        ((0, 3), (2, 4), True),
        ((0, 2), (2, 4), False),
        ((0, 4), (1, 3), False),
        ((0, 2), (0, 3), False),
    ],
)
def test_overlapping_spans(a: tuple[int, int], b: tuple[int, int], overlap: bool) -> None:
    """Two spans that overlap without nesting are an error that names both, in either order."""
    for first, second in ((a, b), (b, a)):
        policy = places(Where(span="stack", layers=first), Where(span="stack", layers=second))
        if overlap:
            said = rf"blocks {a[0]} to {a[1] - 1} and {b[0]} to {b[1] - 1} overlap"
            with pytest.raises(OverlappingSpans, match=said):
                spans_of(policy, 5)
        else:
            assert len(spans_of(policy, 5)) == 2


# --- rules of a site --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "reached"), [("linear", range(9)), ("linear_reverse", range(19, 28))])
def test_layers_that_no_step_can_reuse_are_out_of_reach(order: str, reached: range) -> None:
    """DQAR lets at most floor(0.33 * 28) = 9 layers reuse, whatever the number of steps; in a part no layer is
    excluded."""
    policy = DQAR(0.2, 0.33, None, order)
    found = [policy.for_site(site(), {"layer": i, "num_layers": 28}).reachable for i in range(28)]
    assert [i for i, reachable in enumerate(found) if reachable] == list(reached)
    assert policy.for_site(site(), {}).reachable


def test_what_reads_no_earlier_step_is_in_reach_at_the_first() -> None:
    """No slot is filled before step 0; one half of a guided batch can replace both at any step."""
    assert not Policy((Rule(step < 1),)).for_site(site(), {}).reachable
    assert Policy((Rule(step < 1, ShareGuidance("first")),)).for_site(site(Part.CFG_SHARED), {}).reachable


def test_two_stores() -> None:
    """Two rules that ask for different contents of one slot are refused, with both named; different slots may
    differ."""
    both = Policy((Rule(step > 3), Rule(step > 1, Reuse("int8"))))
    with pytest.raises(TwoStores, match=r"blocks\.0\.attn need 'int8' and None as formats"):
        both.for_site(site(), {})
    apart = Policy((Rule(step > 3, ReuseKV("fp8")), Rule(step > 1, Reuse("int8"))))
    assert apart.for_site(site(), {}).slot_format == "int8"
    assert apart.for_site(site(Part.KV), {}).slot_format == "fp8"
    hidden = Policy((Rule(sympy.true), Rule(step > 1, Reuse("int8"))))
    assert hidden.for_site(site(), {}).slot_format is None, "the second rule never applies"
    unreachable = Policy((Rule(symbols.layer > 3), Rule(step > 1, Reuse("int8"))))
    assert unreachable.for_site(site(), {"layer": 0}).slot_format == "int8"
    windows = Policy((Rule(step > 3, WindowResidual(2)), Rule(step > 1, WindowResidual(3))))
    with pytest.raises(TwoStores, match=r"WindowResidual\(window=2, .*\) and WindowResidual\(window=3"):
        windows.for_site(site(Part.CORE), {})


def test_rules_for_another_part() -> None:
    """A rule for keys and values computes the branch where it comes first; and the other way round."""
    policy = Policy((Rule(step > 3, ReuseKV()), Rule(step > 1, Reuse())))
    branch, keys = policy.for_site(site(), {}), policy.for_site(site(Part.KV), {})
    assert [rule.replaces_part for rule in branch.rules] == [False, True]
    assert [rule.replaces_part for rule in keys.rules] == [True, False]
    chosen = [tuple(rules.chooser()(Moment(s, 9), 0, 1, 0, unknown)[0] for rules in (branch, keys)) for s in (1, 2, 4)]
    assert chosen == [(False, False), (True, False), (False, True)]
    assert not Policy((Rule(step > 3, ReuseKV()),)).for_site(site(), {}).reachable
    assert not Policy((Rule(step > 3, Compute()),)).for_site(site(), {}).reachable


def test_rules_of_a_span() -> None:
    """The span already fixes the layers: they are no part of its guard, whose layer is the first block."""
    where = Where(span="stack", layers=(1, 3))
    policy = Policy((Rule(step > 0, where=where), Rule(step > 0, Reuse("int8"), Where(span="block"))))
    spans = policy.spans(4, lambda _: range(4), whole=True)
    stack = site(Part.SPAN, Kind.SPAN, span=(1, 3))
    block = site(Part.SPAN, Kind.SPAN, span=(1, 2))
    assert [rule.do for rule in policy.for_site(stack, {"layer": 1}, spans).rules] == [Reuse()]
    assert [rule.do for rule in policy.for_site(block, {"layer": 1}, spans).rules] == [Reuse("int8")]


def test_rules_of_a_stream() -> None:
    """A rule for some streams does not hide the rules after it, and applies in those streams only."""
    cond = Where(streams=("cond",))
    policy = Policy((Rule(sympy.true, Compute(), cond), Rule(sympy.true)))
    choose = policy.for_site(site(), {}).chooser()
    found = [choose(Moment(1, 9, stream=name), 0, 1, 0, unknown)[0] for name in ("cond", "uncond", None, 0)]
    assert found == [False, True, True, True]


def unknown(name: str) -> None:
    return None


def test_a_measurement_is_asked_for_where_it_matters_alone() -> None:
    """Not where another part of the guard is false, nor after a rule that applies."""
    asked: list[str] = []

    def read(name: str) -> float:
        asked.append(name)
        return 0.5

    policy = Policy((Rule((step > 2) & (similarity("self") < 1)), Rule(step > 5), Rule(drift("self") < 0.1)))
    choose = policy.for_site(site(), {}).chooser()
    assert choose(Moment(1, 9), 0, 1, 0, read) == Choice(False, DecisionReason.NO_RULE)
    assert asked == ["drift(self)"]
    assert choose(Moment(3, 9), 0, 1, 0, read) == Choice(True, DecisionReason.RULE)
    assert asked[1:] == ["similarity(self)"]


def test_what_nothing_can_prove_is_taken_away() -> None:
    """A rule whose measurement is not available does nothing; the others stay."""
    policy = Policy((Rule(entropy < 1), Rule((similarity("self") < 1) | (step > 3)), Rule(step > 1)))
    rules = policy.for_site(site(), {})
    assert len(rules.measuring({"entropy", "similarity(self)"}).rules) == 3
    assert [rule.predicate.measured for rule in rules.measuring({"entropy"}).rules] == [("entropy",), ()]
    assert rules.measuring(()).reachable
    assert not Policy((Rule(entropy < 1),)).for_site(site(), {}).measuring(()).reachable
