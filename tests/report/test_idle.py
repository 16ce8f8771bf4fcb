"""Why a policy can reuse nothing: the warning is certain, and absent where a step may reuse."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from sympy import Eq, Ne

from dit_rewrite.guards import age, layer, num_steps, similarity, snr, step, streak
from dit_rewrite.policies import DQAR, FORA, FirstBlockCache
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Compute, ShareGuidance
from dit_rewrite.policy.where import Where
from dit_rewrite.report.idle import Noise, idle_reason
from tests.helpers import tiny
from tests.helpers.models import MODELS

STEPS = 12
NEVER = "no guard can hold at any of the 12 steps at its 4 sites, in blocks 0 to 1 of 0 to 1"


@cache
def rewritten(policy: Policy, name: str = "tiny") -> Any:
    """The rewritten graphs of a model after one call."""
    model, calls = (tiny.build(), tiny.calls(1)) if name == "tiny" else (MODELS[name].build(), MODELS[name].inputs(1))
    compiled = tiny.rewritten(model, policy)
    with torch.no_grad(), compiled.trajectory(STEPS, Scheduler()):
        compiled(**calls[0])
    return compiled.explain().rewritten


class Scheduler:
    """Noise levels that a trajectory reads; the tests provide their own."""

    timesteps = torch.arange(STEPS - 1, -1, -1)
    alphas_cumprod = torch.linspace(0.99, 0.01, STEPS)


def rising(at: int) -> tuple[float | None, float | None]:
    return 1.0, at / 10


def unknown(at: int) -> tuple[float | None, float | None]:
    return None, None


def one(*guards: Any) -> Policy:
    return Policy(tuple(g if isinstance(g, Rule) else Rule(g) for g in guards), "one")


@pytest.mark.parametrize(
    ("policy", "steps", "noise"),
    [
        (FORA(3), STEPS, None),
        (FORA(3), None, None),
        (FORA(3), 2, None),
        (DQAR(0.2, 1.0, None), STEPS, None),
        (DQAR(0.2, 1.0, 0.5), STEPS, None),
        (DQAR(0.2, 1.0, 0.5), STEPS, rising),
        (FirstBlockCache(0.1), STEPS, None),
        (one(similarity("first_block") <= 0), STEPS, None),
        (one(step >= STEPS - 1), STEPS, None),
        (one(step >= 200), None, None),
        (one(age >= 11), STEPS, None),
        (one((streak >= 3) | (snr > 5)), STEPS, None),
        (one(Rule(step < 11, Compute()), sympy.true), STEPS, None),
        (one(Rule(snr > 0, Compute()), sympy.true), STEPS, None),
        (one(Rule(Eq(step, 0), ShareGuidance("first"), Where(("self",)))), STEPS, None),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_what_may_reuse(policy: Policy, steps: int | None, noise: Noise | None) -> None:
    """Policies that reuse at one step at least, or for which nothing is certain."""
    assert idle_reason(rewritten(policy), steps, noise) is None


@pytest.mark.parametrize(
    ("policy", "steps", "noise", "says"),
    [
        (FORA(3), 1, None, "no guard can hold at any of the 1 steps"),
        (FORA(1000), STEPS, None, None),
        (DQAR(0.2, 1.0, 5.0), STEPS, rising, NEVER.replace("4 sites", "2 sites")),
        (DQAR(0.2, 1.0, None), None, None, r"needs the number of steps.*trajectory\(num_steps=…\)"),
        (DQAR(0.2, 1.0, 0.5), STEPS, unknown, r"needs the noise level.*trajectory\(scheduler=…\)"),
        (FirstBlockCache(0.1, warmup=STEPS), STEPS, None, "no guard can hold at any of the 12 steps at its 1 sites"),
        (one(step >= STEPS), STEPS, None, NEVER),
        (one(step >= 2000), None, None, NEVER.replace("any of the 12 steps", "any step")),
        (one((step >= STEPS) & (similarity("first_block") < 1)), STEPS, None, "its 2 sites, in block 1 of 0 to 1"),
        (one(age >= STEPS), STEPS, None, NEVER),
        (one(Ne(num_steps, STEPS)), STEPS, None, NEVER),
        (one(Rule(step >= 1, Compute()), sympy.true), STEPS, None, NEVER),
        (one((layer < 1) & (step > 20)), STEPS, None, "its 2 sites, in block 0 of 0 to 1"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_what_cannot(policy: Policy, steps: int | None, noise: Noise | None, says: str | None) -> None:
    """The reason says what is missing, or which steps and sites the policy covers."""
    found = idle_reason(rewritten(policy), steps, noise)
    if says is None:
        assert found is None
    else:
        assert found is not None and re.search(says, found), found


def test_a_policy_that_reaches_nothing_has_its_own_warning() -> None:
    assert idle_reason(rewritten(FORA(3, kinds=("mlp",))), STEPS) is None
    with pytest.warns(UserWarning, match="reaches no site"):
        found = rewritten(FORA(3, kinds=("cross",)))
    assert idle_reason(found, STEPS) is None


def test_attention_that_shares_its_projection() -> None:
    """The last blocks of FLUX are parallel: attention alone is not reused there, but they count as layers."""
    policy = DQAR(0.2, 0.5, None, order="linear_reverse")
    says = "reaches no site.*; the model's 2 parallel branches are not among them: add the kind 'parallel'"
    with pytest.warns(UserWarning, match=says):
        rewritten(policy, "flux")
    policy = DQAR(0.2, 0.5, None, order="linear_reverse", kinds=("attention", "parallel"))
    assert idle_reason(rewritten(policy, "flux"), STEPS) is None
