"""The trials of `autopolicy`: the predicted size of the caches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit_rewrite import compile
from dit_rewrite.guards import step
from dit_rewrite.policy.fitted import Fitted
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast
from dit_rewrite.policy.where import Where
from dit_rewrite.search.trials import Trials
from tests.helpers import tiny
from tests.helpers.drawn import prepare
from tests.search.test_autopolicy import STEPS, sample


class Projected(nn.Module):
    """The tiny denoiser after a projection of the condition, which is computed once per trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.body = nn.Linear(tiny.WIDTH, tiny.WIDTH), tiny.TinyDiT()

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        output: Tensor = self.body(hidden_states, timestep, self.project(condition))
        return output


def test_hoisted_values_count_among_the_caches() -> None:
    """What is computed once per trajectory is stored beside the values that forecasts read, however few these are."""
    model = Projected()
    prepare(model, torch.float32)
    trials = Trials(model, sample, "branches", "aot_eager")
    trials.record(0)
    slots = {depth: trials.cache_bytes(depth) - 2 * tiny.WIDTH * 4 for depth in (2, 4)}
    assert slots[4] == 2 * slots[2] > 0
    assert peak_of_two(model) == trials.cache_bytes(2)


def peak_of_two(model: nn.Module) -> int:
    """The largest size of the caches in a run whose forecasts read two values."""
    table = Fitted(((), (), *[(2.0, -1.0)] * (STEPS - 2)))
    rule = Rule(step > 1, Forecast(1, table, 2), Where())
    compiled = compile(model, Policy((rule,), "two values"), backend="aot_eager")
    sample(compiled, 0)
    return compiled.stats().peak_bytes
