"""dit_rewrite: diffusion transformers made fast by compiling away what does not change between denoising steps.

model = dit_rewrite.compile(model, dit_rewrite.policies.FORA(interval=3))
"""

from dit_rewrite import errors, guards, policies
from dit_rewrite.compile import RewrittenModule, compile
from dit_rewrite.policy import Policy, Rule, Strategy, Where
from dit_rewrite.verify import Verification, verify

__all__ = [
    "Policy",
    "RewrittenModule",
    "Rule",
    "Strategy",
    "Verification",
    "Where",
    "compile",
    "errors",
    "guards",
    "policies",
    "verify",
]
