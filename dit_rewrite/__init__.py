"""dit_rewrite: diffusion transformers made fast by compiling away what does not change between denoising steps.

dit_rewrite.enable(pipe, "taylorseer:interval=3")      # a diffusers pipeline
dit_rewrite.compile(model, policies.FORA(interval=3))  # a denoiser
"""

from dit_rewrite import bases, errors, guards, policies
from dit_rewrite.compile import RewrittenModule, compile, restore
from dit_rewrite.enable import enable
from dit_rewrite.policies.calibrate import calibrate
from dit_rewrite.policy import Policy, Rule
from dit_rewrite.strategy import (
    BlockwiseReuse,
    Compute,
    Forecast,
    GuidanceDelta,
    Reuse,
    ReuseKV,
    ShareGuidance,
    WindowResidual,
)
from dit_rewrite.verify import Verification, verify
from dit_rewrite.where import Where

__all__ = [
    "BlockwiseReuse",
    "Compute",
    "Forecast",
    "GuidanceDelta",
    "Policy",
    "Reuse",
    "ReuseKV",
    "RewrittenModule",
    "Rule",
    "ShareGuidance",
    "Verification",
    "Where",
    "WindowResidual",
    "bases",
    "calibrate",
    "compile",
    "enable",
    "errors",
    "guards",
    "policies",
    "restore",
    "verify",
]
