"""Policies of the literature as JSON: they come back equal."""

from __future__ import annotations

import pytest

from dit_rewrite.policies import (
    DiCache,
    DPCache,
    DualBlockCache,
    EasyCache,
    MagCache,
    MeanCache,
    PyramidAttentionBroadcast,
    SeaCache,
    StepMask,
    TeaCache,
    TGate,
)
from dit_rewrite.policy import Policy
from dit_rewrite.serialise import from_json, to_json


@pytest.mark.parametrize(
    "policy",
    [
        StepMask("1101001", store="int8"),
        MeanCache("qwen-image-17"),
        DPCache((0, 1, 2, 9), 12, order=0),
        PyramidAttentionBroadcast(2, 4, 6),
        TGate(),
        TeaCache(0.2, "flux"),
        TeaCache(0.2, (-2.5, 1e-7), lag=1),
        SeaCache(order=0, probe="modulated_input"),
        EasyCache(),
        MagCache("flux", 0.24, 5, 0.1),
        DualBlockCache(4, 2, max_streak=3),
        DiCache(),
    ],
    ids=str,
)
def test_round_trip(policy: Policy) -> None:
    assert from_json(to_json(policy)) == policy
