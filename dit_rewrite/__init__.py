"""dit_rewrite: diffusion transformers made fast by compiling away what does not change between denoising steps.

model = dit_rewrite.compile(model, dit_rewrite.policies.FORA(interval=3))
"""

from dit_rewrite import errors, guards, policies
from dit_rewrite.compile import RewrittenModule, compile
from dit_rewrite.policy import Policy, Rule
from dit_rewrite.strategy import BlockwiseReuse, Compute, Reuse, ReuseKV, ShareGuidance, WindowResidual
from dit_rewrite.verify import Verification, verify
from dit_rewrite.where import Where

__all__ = [
    "BlockwiseReuse",
    "Compute",
    "Policy",
    "Reuse",
    "ReuseKV",
    "RewrittenModule",
    "Rule",
    "ShareGuidance",
    "Verification",
    "Where",
    "WindowResidual",
    "compile",
    "errors",
    "guards",
    "policies",
    "verify",
]
