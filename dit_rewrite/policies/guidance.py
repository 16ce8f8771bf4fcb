"""Policies for classifier-free guidance."""

from __future__ import annotations

from sympy import Rational, floor

from dit_rewrite.passes.guards.symbols import num_steps, step
from dit_rewrite.policies.checks import real, title
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast, GuidanceDelta, Reuse
from dit_rewrite.policy.where import Where


def CFGGate(gate: float = 0.5, conditional: str = "first", forecast: Reuse | Forecast | None = None) -> Policy:
    """Compute only the conditional input from a fraction `gate` of the steps on (FastVideo's and SGLang's CFG gate).

    Earlier steps store the difference between the unconditional and the conditional output. From step
    floor(gate * num_steps) on, the unconditional output is the conditional one plus the last difference, or plus a
    `forecast` of the difference. `conditional` is the conditional half of the batch, "first" or "second"; if guidance
    takes two calls, it is the name of the conditional stream, which must be called first. gate=1 computes everything.

    Needs num_steps (`model.trajectory`). Raises BadParameter for invalid parameters.
    """
    real("CFGGate", "gate", gate, lambda g: 0 <= g <= 1, "a fraction of the steps, 0 <= gate <= 1")
    do = GuidanceDelta(conditional, Reuse() if forecast is None else forecast)
    rule = Rule(step >= floor(num_steps * Rational(str(gate))), do, Where(span="output"))
    return Policy((rule,), title("CFGGate", gate=gate, conditional=conditional, forecast=forecast))
