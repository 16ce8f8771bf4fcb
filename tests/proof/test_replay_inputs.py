"""A replay receives the inputs of each graph, even where the model changes them in place behind a graph break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dit_rewrite import verify
from dit_rewrite.policies import FORA
from tests.helpers import tiny
from tests.helpers.broken import BrokenAttention
from tests.helpers.drawn import prepare


class InPlaceBehindBreak(nn.Module):
    """Attention, a graph break, and an in-place update of the stream: an output of one graph, an input of the next."""

    def __init__(self, changes: str) -> None:
        super().__init__()
        self.changes = changes
        self.embed = nn.Linear(tiny.CHANNELS, tiny.WIDTH)
        self.attn = BrokenAttention(tiny.WIDTH, 2)
        self.mlp = nn.Sequential(nn.Linear(tiny.WIDTH, tiny.WIDTH), nn.GELU(), nn.Linear(tiny.WIDTH, tiny.WIDTH))

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        x = self.embed(hidden_states) + condition[:, None] + timestep[:, None, None] / 1000
        x = x + self.attn(x)
        torch._dynamo.graph_break()
        if self.changes == "in the graph":
            return x + self.mlp(x.mul_(0.5))
        if self.changes == "between graphs":
            self._double(x)
        return x + self.mlp(x)

    @staticmethod
    @torch._dynamo.disable
    def _double(x: Tensor) -> None:
        x.mul_(2)


@pytest.mark.parametrize("changes", ["nothing", "in the graph", "between graphs"])
def test_what_is_changed_in_place_behind_a_break(changes: str) -> None:
    model = prepare(InPlaceBehindBreak(changes), torch.float32)
    found = verify(model, tiny.calls(4), FORA(2), backend="aot_eager")
    assert found.exact, found
    assert found.reused > 0
