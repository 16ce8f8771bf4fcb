"""The policy `Alternate`: from step to step, attention and MLP branches take turns to compute."""

from __future__ import annotations

from sympy import Eq, Mod

from dit_rewrite import Policy, Reuse, Rule, Where
from dit_rewrite.guards import step
from dit_rewrite.policies.checks import title, whole
from dit_rewrite.policy.strategies import Store


def Alternate(warmup: int = 1, store: Store = None) -> Policy:
    """Reuse attention at odd steps and MLPs at even steps; the first `warmup` steps compute everything.

    Every step then costs about the same, whereas `FORA(2)` alternates between a full step and a nearly free one.
    `store` is what the cache holds, as in `Reuse`. Raises BadParameter for a warm-up below 1.
    """
    whole("Alternate", "warmup", warmup, 1)
    rules = (
        Rule(Eq(Mod(step, 2), 1), Reuse(store), Where(("attention",))),
        Rule(Eq(Mod(step, 2), 0), Reuse(store), Where(("mlp",))),
    )
    return Policy(rules, title("Alternate", warmup=warmup, store=store), warmup=warmup)
