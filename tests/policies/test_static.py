"""Policies that depend on the step only, beside their sources' loops written out."""

from __future__ import annotations

from typing import Any

import pytest

from dit_rewrite.errors import BadParameter
from dit_rewrite.policies import (
    DPCache,
    FoCa,
    HiCache,
    MeanCache,
    PyramidAttentionBroadcast,
    Spectrum,
    StepMask,
    TaylorSeer,
    TGate,
    parse,
)
from dit_rewrite.policies.published import MEANCACHE
from dit_rewrite.policy.bases import BDF, Chebyshev, Hermite
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.strategies import Forecast, Reuse
from dit_rewrite.policy.where import Where
from tests.helpers import tiny
from tests.helpers.models import MODELS
from tests.helpers.runs import by_site, decided, the_row

STEPS = 50


def at_intervals(interval: int, first: int, steps: int = STEPS) -> str:
    """TaylorSeer's `cal_type`: a counter of forecasts since the last full step."""
    did, counter = "", 0
    for step in range(steps):
        if step < first or counter == interval - 1:
            did, counter = did + "C", 0
        else:
            did, counter = did + "R", counter + 1
    return did


@pytest.mark.parametrize(
    ("policy", "interval", "first", "computed"),
    [
        *[(TaylorSeer(n), n, 1, count) for n, count in ((2, 25), (3, 17), (4, 13), (5, 10))],
        *[(TaylorSeer(n, order=2), n, 2, count) for n, count in ((2, 26), (3, 18), (4, 14), (5, 11))],
        (TaylorSeer(6, warmup=3, span="output"), 6, 3, 10),
        (HiCache(5), 5, 3, 12),
        (HiCache(7, warmup=1, span="stack"), 7, 1, 8),
        (FoCa(4), 4, 2, 14),
    ],
    ids=str,
)
def test_at_intervals(policy: Policy, interval: int, first: int, computed: int) -> None:
    found = the_row(decided(policy, STEPS))
    assert found == at_intervals(interval, first)
    assert found.count("C") == computed


def test_an_interval_of_one_computes_everything() -> None:
    assert not any(rule.when for rule in TaylorSeer(1).rules)


@pytest.mark.parametrize(
    ("policy", "do"),
    [
        (TaylorSeer(3, 2, store="bf16"), Forecast(2, "taylorseer", store="bf16")),
        (TaylorSeer(3, basis="taylor"), Forecast(1, "taylor")),
        (HiCache(3, scale=0.7), Forecast(2, Hermite(0.7))),
        (FoCa(3, variant="cache-dit"), Forecast(1, BDF("cache-dit"))),
        (Spectrum(), Forecast(4, Chebyshev(0.1, 0.5, domain=(0, 50)), 14)),
        (Spectrum(history=6, steps=20, blend=1.0), Forecast(4, Chebyshev(0.1, 1.0, domain=(0, 20)), 6)),
        (StepMask("10", order=2), Forecast(2, "taylor")),
        (StepMask("10", store="int8"), Reuse("int8")),
        (MeanCache("qwen-image-10"), Reuse()),
        (DPCache((0, 1, 2, 8)), Forecast(2, "taylorseer")),
    ],
    ids=str,
)
def test_what_is_done(policy: Policy, do: Any) -> None:
    (rule,) = policy.rules
    assert rule.do == do


def test_where() -> None:
    assert [rule.where for rule in TaylorSeer(3, kinds=("mlp",)).rules] == [Where(("mlp",))]
    assert [rule.where for rule in Spectrum().rules] == [rule.where for rule in DPCache((0,)).rules]
    assert [rule.where for rule in DPCache((0,)).rules] == [Where(span="stack")]
    assert [rule.where.span for rule in (*MeanCache((0,)).rules, *StepMask("1").rules)] == ["output", "output"]
    assert [rule.where for rule in StepMask("1", span=None, kinds=("mlp",)).rules] == [Where(("mlp",))]


# --- step tables ------------------------------------------------------------------------------------------------------


def spectrum(window: float, growth: float, warmup: int, steps: int) -> str:
    """The counters of its own forward."""
    did, cached, ws = "", 0, window
    for i in range(steps):
        actual = True
        if i >= warmup:
            actual = (cached + 1) % int(ws) == 0
            if actual:
                ws = round(ws + growth, 3)
        cached = 0 if actual else cached + 1
        did += "C" if actual else "R"
    return did


@pytest.mark.parametrize(("window", "growth", "warmup", "steps"), [(2, 0.75, 5, 50), (3, 0, 1, 20), (2.5, 3, 6, 30)])
def test_spectrum(window: float, growth: float, warmup: int, steps: int) -> None:
    found = the_row(decided(Spectrum(window, growth, warmup=warmup, steps=steps), steps))
    assert found == spectrum(window, growth, warmup, steps)


def test_spectrum_as_the_source_runs_it() -> None:
    computed = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]
    assert the_row(decided(Spectrum(), STEPS)) == "".join("RC"[i in computed] for i in range(STEPS))


MASK = "1110100100"


@pytest.mark.parametrize(
    "policy",
    [
        StepMask(MASK),
        StepMask([int(sign) for sign in MASK]),
        StepMask([sign == "1" for sign in MASK], order=1),
        StepMask(computed=(0, 1, 2, 4, 7), num_steps=10),
        MeanCache((0, 1, 2, 4, 7), 10),
        DPCache((0, 1, 2, 4, 7), 10),
        parse(f"step_mask:mask={MASK}"),
        parse("step_mask:computed=(0, 1, 2, 4, 7),num_steps=10"),
    ],
)
def test_a_mask(policy: Policy) -> None:
    """After its end everything computes, since no table says otherwise."""
    assert the_row(decided(policy, 12)) == "CCCRCRRCRRCC"


def test_the_published_plans() -> None:
    """Each has as many of 50 steps as its name says, the first and the last among them."""
    for name, computed in MEANCACHE.items():
        assert (len(computed), computed[0], computed[-1]) == (int(name.rpartition("-")[2]), 0, 49)
        (rule,) = MeanCache(name).rules
        assert rule.when == StepMask(computed=computed, num_steps=50).rules[0].when
    assert the_row(decided(MeanCache("z-image-13"), STEPS)).count("C") == 13


# --- attention --------------------------------------------------------------------------------------------------------


def broadcast(interval: int | None, low: float, high: float, steps: int) -> str:
    """diffusers' hook with the module's own counter, at timesteps 1000, …, 0."""
    did, cached = "", False
    for i in range(steps):  # the iteration too
        t = 1000 * (1 - i / (steps - 1))
        skip = interval is not None and cached and i != 0 and low < t < high and i % interval != 0
        did += "R" if skip else "C"
        cached = True
    return did


def crossed() -> tuple[Any, list[dict[str, Any]]]:
    """A toy STDiT, whose blocks have attention over space, over time and to the text, and calls of it."""
    case = MODELS["stdit"]
    return case.build(), case.calls(21)


@pytest.mark.parametrize(("spatial", "temporal", "cross"), [(2, 4, 6), (2, 3, None), (None, None, 2), (3, None, None)])
def test_pyramid_attention_broadcast(spatial: int | None, temporal: int | None, cross: int | None) -> None:
    model, inputs = crossed()
    compiled = tiny.rewritten(model, PyramidAttentionBroadcast(spatial, temporal, cross, (0.2, 0.9)))
    with compiled.trajectory(21):
        tiny.outputs(compiled, inputs)
    found = by_site([decision.strategies for decision in compiled.stats().decisions])
    intervals = {"attn": spatial, "attn_temp": temporal, "cross_attn": cross}
    expected = {name: broadcast(n, 100, 800, 21) for name, n in intervals.items() if n is not None}
    assert found == {name: expected[name.rpartition(".")[2]] for name in found}
    assert {name.rpartition(".")[2] for name in found} == set(expected)


def gate(gate_step: int, interval: int, warmup: int, late: int, steps: int) -> tuple[str, str]:
    """T-GATE's self- and cross-attention."""
    own, cross = "", ""
    for i in range(steps):
        if i < gate_step - 1:
            cross += "C"
            own += "C" if i <= warmup or i % interval == 0 else "R"
        elif i == gate_step - 1:
            own, cross = own + "C", cross + "C"
        else:
            cross += "R"
            own += "C" if i % late == 0 else "R"
    return own, cross


@pytest.mark.parametrize("given", [(10, 5, 2, 1), (6, 2, 0, 3), (1, 5, 2, 2)])
def test_tgate(given: tuple[int, int, int, int]) -> None:
    model, inputs = crossed()
    compiled = tiny.rewritten(model, TGate(*given))
    tiny.outputs(compiled, inputs)
    found = by_site([decision.strategies for decision in compiled.stats().decisions])
    own, cross = gate(*given, 21)
    assert found == {name: cross if "cross" in name else own for name in found}
    assert any("cross" in name for name in found)


# --- out of range -----------------------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any]]] = [
    *[(build, {"interval": n}) for build in (TaylorSeer, HiCache, FoCa) for n in (0, -1, 2.0, True, None, "3")],
    *[(build, {"interval": 3, "warmup": n}) for build in (TaylorSeer, HiCache, FoCa) for n in (0, -1, 2.0, True, "3")],
    *[(build, {"interval": 3, "order": n}) for build in (TaylorSeer, HiCache) for n in (-1, 9, 1.0, True, None)],
    *[(build, {"interval": 3, "span": n}) for build in (TaylorSeer, HiCache, FoCa) for n in ("blocks", 1)],
    *[(build, {"interval": 3, "store": n}) for build in (TaylorSeer, HiCache, FoCa) for n in ("fp4", 1)],
    (TaylorSeer, {"interval": 3, "basis": "fourier"}),
    *[(HiCache, {"interval": 3, "scale": n}) for n in (0, 1.1, float("nan"), None)],
    (FoCa, {"interval": 3, "variant": "other"}),
    *[(Spectrum, {"window": n}) for n in (0.9, float("inf"), float("nan"), None, True)],
    *[(Spectrum, {"growth": n}) for n in (-0.1, float("inf"), None)],
    *[(Spectrum, {"degree": n}) for n in (0, 9, 1.5)],
    *[(Spectrum, {"ridge": n}) for n in (0, -1, None)],
    *[(Spectrum, {"blend": n}) for n in (-0.1, 1.1, None)],
    *[(Spectrum, {"warmup": n}) for n in (0, 1.0)],
    *[(Spectrum, {"steps": n}) for n in (0, 5000, 50.0)],
    *[(Spectrum, {"history": n}) for n in (0, 65)],
    (Spectrum, {"span": "block"}),
    *[(StepMask, {"mask": n}) for n in (None, "", "0", "012", (1, 2), (0, 1), 1, [], b"11", "1" * 5000, (1, None))],
    (StepMask, {"mask": "11", "computed": (0, 1)}),
    (StepMask, {"mask": "11", "num_steps": 2}),
    *[(StepMask, {"computed": n}) for n in ((), (1, 2), (0, 0), (0, 2, 1), (0, 1.0), "01", 3, (0, 5000))],
    (StepMask, {"computed": (0, 4), "num_steps": 4}),
    *[(StepMask, {"mask": "10", "order": n}) for n in (-1, 9, True)],
    *[(MeanCache, {"plan": n}) for n in ("flux", (0, 50), (), None)],
    *[(DPCache, {"plan": n}) for n in ("flux", (2, 3), None)],
    *[(PyramidAttentionBroadcast, {name: n}) for name in ("spatial", "temporal", "cross") for n in (0, 1.0, True)],
    *[(PyramidAttentionBroadcast, {"window": n}) for n in ((0.5, 0.5), (0.9, 0.2), (0, 1.1), (-1, 1), (0.5,), 3, "01")],
    (PyramidAttentionBroadcast, {"temporal_names": 3}),
    *[(TGate, {name: n}) for name in ("gate_step", "self_interval", "late_interval") for n in (0, 1.0, True, None)],
    *[(TGate, {"warmup": n}) for n in (-1, 1.0)],
]


@pytest.mark.parametrize(("build", "given"), BAD, ids=lambda value: getattr(value, "__name__", str(value)[:40]))
def test_out_of_range(build: Any, given: dict[str, Any]) -> None:
    """Refused by the name of the parameter, or by that of the parameter that it is made from."""
    names = {"computed": "computed|mask", "temporal_names": "names", "span": "span|minus"}
    with pytest.raises(BadParameter, match="|".join(f"{names.get(name, name)}=" for name in given) + "|mask="):
        build(**given)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("taylorseer:interval=3,order=2,kinds=self+mlp", TaylorSeer(3, 2, kinds=("self", "mlp"))),
        ("hicache:interval=5,scale=0.7,span=stack", HiCache(5, scale=0.7, span="stack")),
        ("foca:interval=4,variant=cache-dit", FoCa(4, variant="cache-dit")),
        ("spectrum:window=3,growth=0", Spectrum(3, 0)),
        ("step_mask:mask=[1,0,1],span=None", StepMask("101", span=None)),
        ("meancache:plan=qwen-image-17", MeanCache("qwen-image-17")),
        ("dpcache:plan=(0,1,2,8,9),num_steps=10,order=1", DPCache((0, 1, 2, 8, 9), 10, 1)),
        (
            "pyramid_attention_broadcast:window=(0.1,0.85)",
            PyramidAttentionBroadcast(window=(0.1, 0.85)),
        ),
        ("tgate:gate_step=8", TGate(8)),
    ],
)
def test_as_text(text: str, policy: Policy) -> None:
    assert parse(text) == policy
