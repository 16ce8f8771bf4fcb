"""Plans under a negative prompt (DiTFastAttn, appendix A.8): the unconditional half is no longer like the conditional.

In the tiny model the first attention reads the latent alone, which both halves share, so that sharing its output costs
nothing. The second one reads what the condition did to the first gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite
from dit_rewrite.policies import DiTFastAttn
from dit_rewrite.policy.plan import Choice, Plan
from dit_rewrite.search.metrics import relative_error
from dit_rewrite.search.segment_runner import greedy_plan
from tests.helpers import tiny

STEPS, DELTA = 3, 0.02
PROMPT = tiny.condition()[:1]
NULL = PROMPT + 1e-3  # hardly another than the prompt
NEGATIVE = tiny.condition(7)[:1]


def calls(other: Tensor, half: str = "first") -> list[dict[str, Any]]:
    """Both halves of the guidance in one batch, with the same latents."""
    pair = [PROMPT, other] if half == "first" else [other, PROMPT]
    given = torch.cat(pair)
    return [
        {**call, "hidden_states": call["hidden_states"][:1].expand(2, -1, -1).clone()}
        for call in tiny.calls(STEPS, given=given)
    ]


def sampling(inputs: list[dict[str, Any]]) -> Callable[[Any], None]:
    def sample(model: Any) -> None:
        with model.trajectory(num_steps=STEPS):
            tiny.outputs(model, inputs)

    return sample


def search(*others: Tensor, half: Any = "first") -> Plan:
    torch.compiler.reset()
    samplers = [sampling(calls(other, half)) for other in others]
    return greedy_plan(
        tiny.build(), samplers, DELTA, [Choice.ASC], steps=STEPS, conditional=half, backend="aot_eager"
    )  # fmt: skip


def errors(plan: Plan, other: Tensor) -> list[float]:
    """The error of the model's output at each step under a plan, with this unconditional half."""
    torch.compiler.reset()
    model, inputs = tiny.build(), calls(other)
    compiled = dit_rewrite.compile(tiny.build(), DiTFastAttn(plan), backend="aot_eager")
    with compiled.trajectory(STEPS):
        found = tiny.outputs(compiled, inputs)
    return [relative_error(a, b) for a, b in zip(tiny.outputs(model, inputs), found, strict=True)]


FULL, ASC = Choice.FULL, Choice.ASC


def test_a_plan_is_calibrated_with_the_negative_prompt() -> None:
    """Without it both attentions are shared, and the negative prompt loses its effect; with it only the first is."""
    usual, negative, both = search(NULL), search(NEGATIVE), search(NULL, NEGATIVE)
    assert usual.table == ((FULL, FULL), (ASC, ASC), (ASC, ASC))
    assert negative.table == both.table == ((FULL, FULL), (ASC, FULL), (ASC, FULL))
    assert max(errors(usual, NULL)) < DELTA
    assert errors(usual, NEGATIVE)[0] == 0 and min(errors(usual, NEGATIVE)[1:]) > DELTA
    for other in (NULL, NEGATIVE):
        assert max(errors(negative, other)) < 1e-5, "the first attention does not read the prompt"


def test_either_half_may_have_it() -> None:
    """PixArt's pipeline puts the negative prompt first."""
    assert search(NEGATIVE, half="second").table == search(NEGATIVE).table


@pytest.mark.parametrize("other", [NULL, NEGATIVE], ids=["null", "negative"])
def test_the_attention_of_a_shared_step(other: Tensor) -> None:
    """Half of it where it is shared, in one layer or in both."""
    assert search(other).attention == ((1.0, 0.5, 0.5) if other is NULL else (1.0, 0.75, 0.75))
