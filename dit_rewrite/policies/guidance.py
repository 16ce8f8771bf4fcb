"""Policies of classifier-free guidance."""

from __future__ import annotations

from sympy import Rational, floor

from dit_rewrite.passes.guards.symbols import num_steps, step
from dit_rewrite.policies.checks import real, title
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast, GuidanceDelta, Reuse
from dit_rewrite.policy.where import Where


def CFGGate(gate: float = 0.5, conditional: str = "first", forecast: Reuse | Forecast | None = None) -> Policy:
    """From a share `gate` of the steps on, compute the condition alone (FastVideo's and SGLang's CFG gate).

    At step floor(gate * num_steps) the difference between the two sides of the guidance is kept: the unconditional
    output is the conditional one and that difference, or what `forecast` makes of the last ones. `conditional` is the
    half of the batch that has the condition, "first" or "second"; where guidance takes two calls, the name of the
    conditional stream, which is called first. gate=1 computes everything. Needs to be told num_steps. Raises
    BadParameter for what is out of range.
    """
    real("CFGGate", "gate", gate, lambda g: 0 <= g <= 1, "a share of the steps, 0 <= gate <= 1")
    do = GuidanceDelta(conditional, Reuse() if forecast is None else forecast)
    rule = Rule(step >= floor(num_steps * Rational(str(gate))), do, Where(span="output"))
    return Policy((rule,), title("CFGGate", gate=gate, conditional=conditional, forecast=forecast))
