"""Lowered by Inductor, blockwise attention updates the tensors of a slot in place: no state is copied."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import dit_rewrite
from dit_rewrite import BlockwiseReuse, Policy, Rule
from dit_rewrite.guards import step
from dit_rewrite.kernels.blockwise_attention.state import State
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.runtime.session import Observation
from examples.stdit import sincos
from tests.helpers import tiny
from tests.helpers.broken import BrokenAttention
from tests.helpers.drawn import prepare

LAYERS, STEPS = 2, 3
TENSORS = len(State._fields) - 3


class Attentions(nn.Module):
    """Self-attentions with two heads of 16 channels, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(tiny.CHANNELS, 32), nn.Linear(32, tiny.CHANNELS)
        self.blocks = nn.ModuleList(BrokenAttention(32, 2) for _ in range(LAYERS))
        prepare(self, torch.float32)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states) + 0.1 * sincos(timestep, 32)[:, None]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def calls() -> list[dict[str, Any]]:
    return [{name: call[name] for name in ("hidden_states", "timestep")} for call in tiny.calls(15)[:STEPS]]


def test_a_state_is_not_copied() -> None:
    """In the code of a reusing step the op takes the inputs themselves, which no other op reads or writes; and the
    slots keep the same memory from the first step to the last."""
    policy = Policy((Rule(step > 0, BlockwiseReuse(3.0, 4)),))
    compiled = dit_rewrite.compile(Attentions(), policy, fullgraph=True)
    observed: list[Observation] = []
    compiled._backend.session.observer = observed.append

    def run() -> list[Tensor]:
        with compiled.trajectory(STEPS):
            return tiny.outputs(compiled, calls())

    found, codes = run_and_get_code(run)
    (reusing,) = (code for code in codes if "dit_rewrite.blockwise_attention" in code)
    (filling,) = (code for code in codes if "dit_rewrite.blockwise_fill" in code)
    assert filling is not reusing
    states = states_of(reusing)
    assert len(states) == LAYERS
    assert len(set().union(*states)) == LAYERS * TENSORS
    body = reusing[reusing.index("def call(") : reusing.index("return (")]
    for name in (name for state in states for name in state):
        uses = [line.strip() for line in body.splitlines() if re.search(rf"\b{name}\b", line)]
        kinds = [next((kind for kind in ALLOWED if re.search(kind, use)), use) for use in uses]
        assert sorted(kinds) == sorted(ALLOWED), uses

    (graph,) = compiled.explain().rewritten
    held = [i for i, site in enumerate(graph.guarded.sites) if site.part is Part.CORE_STATE]
    places = [[tensor.data_ptr() for i in held for tensor in seen.slots[i] or ()] for seen in observed]
    assert [len(place) for place in places] == [LAYERS * TENSORS] * STEPS
    assert places[0] == places[1] == places[2]
    counts = [[(seen.slots[i] or ())[State._fields.index("counters")] for i in held] for seen in observed]
    assert all(count[1].item() == (STEPS - 1) * 2 * 2 * 2 for count in counts[-1]), "pairs: batch, heads, blocks, steps"

    eager = tiny.rewritten(Attentions(), policy)
    with eager.trajectory(STEPS):
        expected = tiny.outputs(eager, calls())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# every use of a state's tensor in Inductor's code: it is unpacked, checked, passed to the op and released
ALLOWED = (r"= args$", r"^assert_size_stride\(", r"dit_rewrite\.blockwise_attention\.default\(", r"^del ")


def states_of(code: str) -> list[list[str]]:
    """The names of the tensors that each call of the op takes as its state; all of them are inputs of the code."""
    (unpacked,) = re.findall(r"^ +(.*) = args$", code, re.MULTILINE)
    inputs = set(unpacked.split(", "))
    states = re.findall(r"dit_rewrite\.blockwise_attention\.default\(.*?\[([^\[\]]*)\], None, 3\.0, 4", code)
    names = [state.split(", ") for state in states]
    assert all(set(state) <= inputs and len(state) == TENSORS for state in names), states
    return names
