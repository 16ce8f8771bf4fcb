"""Policies of the literature, written in the guard language.

The decisions of static.py and schedules.py depend on the step alone. measured.py has policies that measure changes,
verified.py policies that measure the error of a forecast, attention.py policies for attention, and guidance.py policies
for classifier-free guidance. published.py has the parameters that papers publish for named models;
`dit_rewrite.calibrate` measures them for others. text.py parses policies.
"""

from dit_rewrite.policies.attention import DQAR, CachedAttention, DiTFastAttn, TileReuse, strategies_of
from dit_rewrite.policies.guidance import CFGGate
from dit_rewrite.policies.measured import (
    DiCache,
    DualBlockCache,
    EasyCache,
    FirstBlockCache,
    MagCache,
    SeaCache,
    TeaCache,
)
from dit_rewrite.policies.schedules import DPCache, MeanCache, Spectrum, StepMask
from dit_rewrite.policies.static import FORA, FoCa, HiCache, Never, PyramidAttentionBroadcast, TaylorSeer, TGate
from dit_rewrite.policies.text import as_policy, parse
from dit_rewrite.policies.verified import SpeCa

__all__ = [
    "DQAR",
    "CFGGate",
    "FORA",
    "CachedAttention",
    "DPCache",
    "DiCache",
    "DiTFastAttn",
    "DualBlockCache",
    "EasyCache",
    "FirstBlockCache",
    "FoCa",
    "HiCache",
    "MagCache",
    "MeanCache",
    "Never",
    "PyramidAttentionBroadcast",
    "SeaCache",
    "SpeCa",
    "Spectrum",
    "StepMask",
    "TGate",
    "TaylorSeer",
    "TeaCache",
    "TileReuse",
    "as_policy",
    "parse",
    "strategies_of",
]
