"""Policies of the literature, each in a few lines of the language of guards.

static.py and schedules.py follow from the step alone, measured.py asks what has changed, verified.py how wrong a
forecast was, attention.py is of attention ops, guidance.py of guidance. published.py has the tables that sources print
for named models, and calibrate.py measures them on yours. text.py reads policies from text.
"""

from dit_rewrite.policies.attention import DQAR, CachedAttention, DiTFastAttn, strategies_of
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
    "as_policy",
    "parse",
    "strategies_of",
]
