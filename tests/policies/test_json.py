"""Policies of the literature as JSON: they come back equal."""

from __future__ import annotations

import pytest

from dit_rewrite.policies import (
    DiCache,
    DPCache,
    DualBlockCache,
    EasyCache,
    FoCa,
    HiCache,
    MagCache,
    MeanCache,
    PyramidAttentionBroadcast,
    SeaCache,
    SpeCa,
    Spectrum,
    StepMask,
    TaylorSeer,
    TeaCache,
    TGate,
)
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.serialise import from_json, to_json


@pytest.mark.parametrize(
    "policy",
    [
        TaylorSeer(5, 2, store="bf16"),
        HiCache(5, scale=0.7, span="output"),
        FoCa(4, variant="cache-dit"),
        Spectrum(),
        StepMask("1101001", store="int8"),
        StepMask("1101001", order=2),
        MeanCache("qwen-image-17"),
        DPCache((0, 1, 2, 9), 12),
        PyramidAttentionBroadcast(2, 4, 6),
        TGate(),
        TeaCache(0.2, "flux"),
        TeaCache(0.2, (-2.5, 1e-7), lag=1),
        SeaCache(),
        SeaCache(order=0, probe="modulated_input"),
        EasyCache(),
        MagCache("flux", 0.24, 5, 0.1),
        DualBlockCache(4, 2, max_streak=3),
        DualBlockCache(forecast="taylorseer"),
        DiCache(),
        DiCache(depth=3, store="bf16"),
        SpeCa(),
        SpeCa(7, 0.3, 0.1, max_streak=8, span="block", error="mean"),
        SpeCa(decay=1, layer=3, store="bf16"),
    ],
    ids=str,
)
def test_round_trip(policy: Policy) -> None:
    assert from_json(to_json(policy)) == policy
