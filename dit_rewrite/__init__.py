"""dit_rewrite compiles diffusion transformers so that they reuse values that change little between denoising steps.

dit_rewrite.enable(pipe, "taylorseer:interval=3")      # a diffusers pipeline
dit_rewrite.compile(model, policies.FORA(interval=3))  # a denoiser
"""

from dit_rewrite import errors, guards, policies
from dit_rewrite.analysis.analyze import analyze
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.analysis.reuse_errors import reuse_errors
from dit_rewrite.compile import RewrittenModule, compile, enable, predict, restore
from dit_rewrite.policy import bases
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import (
    BlockwiseReuse,
    Compute,
    Forecast,
    GuidanceDelta,
    Reuse,
    ReuseKV,
    ReuseTiles,
    ShareGuidance,
    Verify,
    WindowResidual,
)
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.verify import Verification, verify
from dit_rewrite.search.autopolicy import autopolicy
from dit_rewrite.search.calibrate import calibrate
from dit_rewrite.search.certificate import AutoPolicy
from dit_rewrite.search.evaluation import Evaluation
from dit_rewrite.search.tune import Range, tune

__all__ = [
    "Analysis",
    "AutoPolicy",
    "BlockwiseReuse",
    "Compute",
    "Evaluation",
    "Forecast",
    "GuidanceDelta",
    "Policy",
    "Range",
    "Reuse",
    "ReuseKV",
    "ReuseTiles",
    "RewrittenModule",
    "Rule",
    "ShareGuidance",
    "Verification",
    "Verify",
    "Where",
    "WindowResidual",
    "analyze",
    "autopolicy",
    "bases",
    "calibrate",
    "compile",
    "enable",
    "errors",
    "guards",
    "policies",
    "predict",
    "restore",
    "reuse_errors",
    "tune",
    "verify",
]
