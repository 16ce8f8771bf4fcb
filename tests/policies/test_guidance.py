"""The guidance policy beside FastVideo's loop."""

from __future__ import annotations

from typing import Any

import pytest

from dit_rewrite.errors import BadParameter
from dit_rewrite.policies import CFGGate, parse
from dit_rewrite.policy.serialise import from_json, to_json
from dit_rewrite.policy.strategies import Forecast
from tests.helpers.runs import decided, the_row


def gated(steps: int, share: float) -> str:
    """FastVideo's denoising stage: both sides until the gate, if a difference exists by then."""
    gate, delta, did = int(steps * share), None, ""
    for i in range(steps):
        if i < gate or delta is None:
            delta, did = i, did + "C"
        else:
            did += "R"
    return did


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.71])
@pytest.mark.parametrize("steps", [7, 12])
def test_decisions(steps: int, share: float) -> None:
    assert the_row(decided(CFGGate(share), steps)) == gated(steps, share)


@pytest.mark.parametrize("given", [{"gate": -0.1}, {"gate": 1.5}, {"conditional": ""}, {"forecast": 3}])
def test_parameters_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter):
        CFGGate(**given)


def test_text_and_json() -> None:
    assert parse("cfg_gate:gate=0.25,conditional=second") == CFGGate(0.25, "second")
    for policy in (CFGGate(), CFGGate(forecast=Forecast(1, store="bf16")), CFGGate(conditional="cond")):
        assert from_json(to_json(policy)) == policy
