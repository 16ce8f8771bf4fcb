"""Custom rules: guards on the error of a forecast, and forecasts weighted by a measurement."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from sympy import Eq, Mod, Ne
from torch import Tensor

from dit_rewrite import RewrittenModule
from dit_rewrite.errors import BadParameter, BadPolicyText, DecisionReason, MissReason, Reason, RefusalReason
from dit_rewrite.guards import advance, forecast_error, similarity, step, streak
from dit_rewrite.policy.measured_bases import Aligned
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.serialise import from_json, to_json
from dit_rewrite.policy.strategies import Forecast, GuidanceDelta, Reuse, Verify
from dit_rewrite.policy.where import Where
from dit_rewrite.runtime.history import Computed, Moment, Past
from dit_rewrite.runtime.measure import ForecastError, Number, Tracked
from tests.helpers import tiny
from tests.helpers.broken import broken_blocks
from tests.helpers.records import relative

OUTPUT = Where(span="output")


def told(policy: Policy, steps: int, **options: Any) -> tuple[RewrittenModule, list[Tensor]]:
    model = tiny.rewritten(tiny.build(), policy, **options)
    with model.trajectory(steps):
        return model, tiny.outputs(model, tiny.calls(steps))


# --- the error of a site's own forecast -------------------------------------------------------------------------------


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("store", [None, "bf16"])
def test_the_error_of_the_last_computed_step(elementwise: bool, store: Any) -> None:
    """Each computed step is compared with the forecast that its slot would have made; the first has none to compare
    with."""
    when = (streak < 1) & (forecast_error("self", elementwise=elementwise) < 1e9)
    model, _ = told(Policy((Rule(when, Forecast(1, store=store), OUTPUT),)), 7)
    decisions = model.stats().decisions
    assert [d.strategies["output"][0] for d in decisions] == list("ccfcfcf")
    assert decisions[1].reasons["output"] is DecisionReason.NOT_MEASURED

    plain = tiny.outputs(tiny.build(), tiny.calls(7))
    forecasts = {1: plain[0], 3: plain[1] + 2 * (plain[1] - plain[0]), 5: plain[3] + (plain[3] - plain[1])}

    def error(at: int) -> float:
        forecast, computed = forecasts[at], plain[at]
        if not elementwise:
            return relative(forecast, computed)
        return float(((forecast - computed).abs() / (computed.abs() + 1e-10)).mean())

    name = str(forecast_error("self", elementwise=elementwise))
    found = {d.step: d.measured["output"][name] for d in decisions if d.measured}
    tolerance = 0.05 if store else 1e-4
    expected = {2: error(1), 4: error(3), 6: error(5)}
    assert {at: found[at] for at in expected} == pytest.approx(expected, rel=tolerance)


def test_an_error_that_is_too_large_computes() -> None:
    model, outputs = told(Policy((Rule(forecast_error("self") < 1e-9, Forecast(1), OUTPUT),)), 5)
    assert model.stats().reused == 0
    assert tiny.same(outputs, tiny.outputs(tiny.build(), tiny.calls(5)))


def test_errors_end_with_their_trajectory() -> None:
    """The first steps of the next trajectory have no error to read."""
    policy = Policy((Rule(forecast_error("self") < 1e9, Forecast(1), OUTPUT),))
    model, first = told(policy, 5)
    with model.trajectory(5):
        second = tiny.outputs(model, tiny.calls(5))
    assert tiny.same(first, second)


# --- where there is no such error -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([Rule(forecast_error() < 1e9, Forecast(1))], RefusalReason.NOT_VERIFIED),
        ([Rule(forecast_error("self") < 1e9, Reuse())], RefusalReason.NO_FORECAST),
        ([Rule(forecast_error("self") < 1e9, Forecast(1, store="int8"))], RefusalReason.NO_FORECAST),
    ],
    ids=["verified", "reused", "packed"],
)
def test_refused(rules: list[Rule], reason: Reason) -> None:
    model, outputs = told(Policy(tuple(rules)), 4)
    assert {refusal.reason for refusal in model.explain().refused} == {reason}
    assert model.stats().reused == 0 and tiny.same(outputs, tiny.outputs(tiny.build(), tiny.calls(4)))


def test_a_part_of_a_model_has_no_verified_sites() -> None:
    """Behind a graph break the blocks have no numbers, so the rule does nothing; rules that need no error still
    apply."""
    rules = (Rule(Ne(Mod(step, 2), 0), Verify(), Where(layers=(-1, None))), Rule(forecast_error() < 1e9, Forecast()))
    case = broken_blocks(2)
    model, calls = case.build(), case.calls(6)
    compiled = tiny.rewritten(model, Policy(rules))
    with compiled.trajectory(6):
        outputs = tiny.outputs(compiled, calls)
    assert RefusalReason.PROBE_IN_PART in {refusal.reason for refusal in compiled.explain().refused}
    assert compiled.stats().reused == 0
    assert tiny.same(outputs, tiny.outputs(model, calls))


def test_the_largest_error_and_no_proof() -> None:
    """If one site has no error, the largest error is not measured; if one is NaN, so is the largest."""
    asked = ForecastError((0, 1))
    errors = {0: 0.1, 1: 0.5}
    tracked = Tracked(errors={(i, False): Number(torch.tensor(e), False) for i, e in errors.items()})
    assert tracked.error(asked) == pytest.approx(0.5)
    assert tracked.error(ForecastError((0, 1), True)) is tracked.error(ForecastError((0, 2))) is None
    assert tracked.error(ForecastError(())) is None
    tracked.errors[0, False] = Number(torch.tensor(nan), False)
    assert str(tracked.error(asked)) == "nan"


# --- Verify -----------------------------------------------------------------------------------------------------------


def test_verify_computes_and_keeps_the_slot() -> None:
    """Outputs of verified steps are computed ones, and a later forecast reads the older values."""
    rules = (
        Rule(Ne(Mod(step, 4), 0) & Ne(Mod(step, 4), 3), Verify(1), OUTPUT),
        Rule(Ne(Mod(step, 4), 0), Forecast(1), OUTPUT),
    )
    model, outputs = told(Policy(rules), 8)
    plain = tiny.outputs(tiny.build(), tiny.calls(8))
    assert [d.strategies["output"][0] for d in model.stats().decisions] == list("cvvfcvvf")
    assert all(torch.equal(outputs[i], plain[i]) for i in (0, 1, 2, 4, 5, 6))
    assert torch.equal(outputs[3], plain[0])
    torch.testing.assert_close(outputs[7], plain[4] + (plain[4] - plain[0]) * 3 / 4)


def test_outputs_of_verified_and_of_computed_steps_belong_to_the_caller() -> None:
    """The same sites compute in both, but the slot shares memory with the output in only one of them, which copies
    it."""
    rules = (Rule(Eq(step, 1), Verify(0), OUTPUT), Rule(step > 2, Forecast(0), OUTPUT), Rule(step > 0, Reuse()))
    model, outputs = tiny.rewritten(tiny.build(), Policy(rules)), []
    with model.trajectory(4), torch.no_grad():
        for arguments in tiny.calls(4):
            output = model(**arguments)
            outputs.append(output.clone())
            output.fill_(nan)
    assert [d.strategies["output"][0] for d in model.stats().decisions] == list("cvcf")
    assert torch.equal(outputs[3], outputs[2]) and not outputs[2].isnan().any()


def test_without_a_value_a_verified_site_computes_and_keeps() -> None:
    """The first step has nothing to compare with: it fills the slot."""
    model, _ = told(Policy((Rule(step < 2, Verify(1), OUTPUT), Rule(step >= 2, Forecast(1), OUTPUT))), 3)
    decisions = model.stats().decisions
    assert [d.strategies["output"][0] for d in decisions] == list("cvf")
    assert decisions[0].reasons["output"] is MissReason.EMPTY
    assert model.stats().misses == {}


def test_verify_in_json() -> None:
    policy = Policy(
        (Rule(step > 1, Verify(2, "taylorseer", store="bf16")), Rule(step > 2, Verify(1, Aligned(most=2.0))))
    )
    assert from_json(to_json(policy)) == policy
    with pytest.raises(BadPolicyText, match="basis"):
        from_json(
            to_json(Policy((Rule(step > 1, Reuse()),))).replace('"store"', '"basis": {"basis": "taylor"}, "store"')
        )


@pytest.mark.parametrize("given", [{"store": "int8"}, {"store": "fp8"}, {"order": -1}])
def test_what_cannot_be_verified(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=f"Verify.*{next(iter(given))}="):
        Verify(**given)
    with pytest.raises(BadParameter, match="do="):
        GuidanceDelta("first", Verify())


# --- weights that are measured ----------------------------------------------------------------------------------------

TWO = Past((Computed(5), Computed(2)))


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        (1.2, (1.2, 1 - 1.2)),
        (0.3, (1.0, 0.0)),
        (9, (1.5, -0.5)),
        (None, DecisionReason.NOT_MEASURED),
        (nan, MissReason.NO_WEIGHTS),
        (inf, MissReason.NO_WEIGHTS),
    ],
)
def test_aligned(gone: Any, expected: Any) -> None:
    found = Forecast(1, Aligned()).weights(TWO, Moment(6, 10), {"advance(first_block)": gone}.__getitem__)
    assert found == (expected if isinstance(expected, Reason) else pytest.approx(expected))


def test_aligned_of_one_value_asks_for_nothing() -> None:
    def read(name: str) -> float:
        raise AssertionError(name)

    assert Forecast(1, Aligned()).weights(Past((Computed(5),)), Moment(6, 10), read) == (1.0, 0.0)


@pytest.mark.parametrize(
    "given", [{"probe": "output"}, {"probe": "x"}, {"least": nan}, {"least": None}, {"most": 0.5}, {"most": inf}]
)
def test_aligned_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=f"{next(iter(given))}="):
        Aligned(**given)


def test_a_measured_forecast_on_steps_that_are_known() -> None:
    """No guard measures, but the forecast does: one graph for all weights."""
    policy = Policy((Rule(Ne(Mod(step, 3), 0), Forecast(1, Aligned("latent", -5.0, 5.0)), OUTPUT),))
    model, outputs = told(policy, 8)
    plain, latents = tiny.outputs(tiny.build(), tiny.calls(8)), [c["hidden_states"] for c in tiny.calls(8)]
    assert torch.equal(outputs[1], plain[0]) and torch.equal(outputs[2], plain[0])
    for at, last, before in ((4, 3, 0), (5, 3, 0), (7, 6, 3)):
        way = float((latents[last] - latents[before]).abs().mean())
        share = min(float((latents[at] - latents[before]).abs().mean()) / way, 5.0)
        torch.testing.assert_close(outputs[at], share * plain[last] + (1 - share) * plain[before], rtol=1e-4, atol=1e-5)
        assert model.stats().decisions[at].measured["output"] == pytest.approx({"advance(latent)": share}, rel=1e-4)
    stats = model.stats()
    assert (stats.variants, stats.late_variants, stats.recompiles, stats.misses) == (2, 0, 0, {})


def test_a_forecast_without_its_probe() -> None:
    """A part of a model has no latent: the rule is left out, and the reason is reported."""
    case = broken_blocks(2)
    compiled = tiny.rewritten(case.build(), Policy((Rule(step > 1, Forecast(1, Aligned("latent"))),)))
    with compiled.trajectory(4):
        tiny.outputs(compiled, case.calls(4))
    assert {refusal.reason for refusal in compiled.explain().refused} == {RefusalReason.PROBE_IN_PART}
    assert compiled.stats().reused == 0


def test_in_a_guard() -> None:
    """The distance that the latent has moved decides."""
    model, _ = told(Policy((Rule((step > 1) & (advance("latent") < 1.0 + 1e9), Reuse(), OUTPUT),)), 4)
    assert [d.strategies["output"][0] for d in model.stats().decisions] == list("ccrr")
    assert similarity("behind_first_2_blocks").name == "similarity(behind_first_2_blocks)"
