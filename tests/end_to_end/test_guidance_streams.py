"""Guidance in two calls a step: attention of the conditional call replaces that of the other (DiTFastAttn's ASC)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sympy import Mod, Ne
from torch import Tensor, nn

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.guards import step
from dit_rewrite.module import RewrittenModule, attach, twin
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import ShareGuidance
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.compare import Check
from dit_rewrite.proof.replay import check_replay
from dit_rewrite.runtime.session import Observation
from tests.helpers.models import MODELS, output
from tests.helpers.runs import interleaved

STEPS = 7
CASE = MODELS["dit"]
SHARED = Policy((Rule(Ne(Mod(step, 3), 0), ShareGuidance("cond"), Where(("attention",))),))
Pair = tuple[dict[str, Any], dict[str, Any]]


def pairs() -> list[Pair]:
    """The conditional and the unconditional call of each step, on one latent."""
    both = zip(CASE.inputs(STEPS, seed=0), CASE.inputs(STEPS, seed=1), strict=True)
    return [(a, {**b, **{name: a[name] for name in ("hidden_states", "timestep")}}) for a, b in both]


def by_hooks(model: Any) -> list[Tensor]:
    """Outputs of an eager model whose attentions return, in the second call of a sharing step, the value of the
    first."""
    lent: dict[nn.Module, Tensor] = {}
    sharing = False

    def hook(module: nn.Module, _: object, result: Tensor) -> Tensor:
        return lent[module] if sharing else lent.setdefault(module, result)

    handles = [block.attn1.register_forward_hook(hook) for block in model.transformer_blocks]
    found = []
    with torch.no_grad():
        for number, (conditional, unconditional) in enumerate(pairs()):
            lent.clear()
            found.append(output(model(**conditional)))
            sharing = number % 3 != 0
            lent = lent if sharing else {}
            found.append(output(model(**unconditional)))
            sharing = False
    for handle in handles:
        handle.remove()
    return found


def sample(model: RewrittenModule, streams: tuple[str, str] = ("cond", "uncond")) -> list[Tensor]:
    calls = dict(zip(streams, zip(*pairs(), strict=True), strict=True))
    return interleaved(model, calls, lambda made: output(made).clone())


@pytest.mark.parametrize("form", ["variants", "segments"])
def test_the_other_call_takes_what_the_conditional_one_computed(form: str) -> None:
    model = CASE.build()
    backend = Backend(model, SHARED, Lowering.of("aot_eager", partition=form))
    compiled = attach(twin(model), backend)
    observed: list[Observation] = []
    backend.session.observer = observed.append
    found = sample(compiled)
    assert all(map(torch.equal, found, by_hooks(model)))
    rows = ["".join("CR"[reused] for reused in observation.record.row) for observation in observed]
    assert rows == [row for number in range(STEPS) for row in ("CCC", "RRR" if number % 3 else "CCC")]
    check = Check()
    check_replay(check, backend.rewritten, observed, ["cond", "uncond"] * STEPS, exact=True)
    assert check.exact, check.first_difference
    assert compiled.stats().misses == {}


def test_streams_of_other_names() -> None:
    """Without a conditional stream to share from, everything computes, and the report says so."""
    model = CASE.build()
    compiled = attach(twin(model), Backend(model, SHARED, Lowering.of("aot_eager")))
    found = sample(compiled, ("text", "empty"))
    with torch.no_grad():
        plain = [output(model(**arguments)) for calls in pairs() for arguments in calls]
    assert all(map(torch.equal, found, plain))
    assert compiled.stats().reused == 0
    assert sum(compiled.stats().misses.values()) == 2 * 3 * 4, "two calls of three sites at four sharing steps"
