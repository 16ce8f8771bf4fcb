"""Conditions that are not arguments of the call: no stream takes another one's values, whatever the order of calls."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_rewrite.errors import MissReason
from tests.helpers import tiny
from tests.helpers.broken import broken_blocks
from tests.helpers.drawn import prepare
from tests.helpers.tiny import WIDTH, TinyDiT, calls, condition, rewritten, same

STEPS = 5
CURRENT: ContextVar[Tensor] = ContextVar("CURRENT")


class InContext(TinyDiT):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, CURRENT.get())


class InBuffer(TinyDiT):
    given: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("given", torch.zeros(2, WIDTH))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, self.given)


class Hooked(TinyDiT):
    """A hook provides the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "condition": CURRENT.get()}), with_kwargs=True
        )


Setter = Callable[[Any, Tensor], object]
HIDDEN: dict[str, tuple[type[TinyDiT], Setter, MissReason]] = {
    "context variable": (InContext, lambda _, given: CURRENT.set(given), MissReason.CHANGED_UNKNOWN),
    "hook": (Hooked, lambda _, given: CURRENT.set(given), MissReason.CHANGED_UNKNOWN),
    "buffer": (InBuffer, lambda model, given: model.given.copy_(given), MissReason.CHANGED_WEIGHTS),
}


def made(kind: type[TinyDiT]) -> TinyDiT:
    model = kind()
    prepare(model, torch.float32)
    return model


@torch.no_grad()
def drawn(model: nn.Module, hide: Setter, order: Callable[[int], str]) -> list[Tensor]:
    given, found = {name: condition(seed) for seed, name in enumerate("cu")}, []
    for step, arguments in enumerate(calls(STEPS)):
        for name in order(step):
            hide(model, given[name])
            hidden = {**arguments, "condition": torch.zeros(2, WIDTH)} if isinstance(model, Hooked) else arguments
            if not isinstance(model, Hooked):
                hidden.pop("condition", None)
            found.append(model(**hidden).clone())
    return found


@pytest.mark.parametrize("name", HIDDEN)
@torch.no_grad()
def test_calls_in_another_order_compute(name: str) -> None:
    kind, hide, why = HIDDEN[name]
    plain = made(kind)
    model = rewritten(plain)
    with model.trajectory(STEPS):
        found = drawn(model, hide, lambda step: "uc" if step % 2 else "cu")
    assert same(found, drawn(plain, hide, lambda step: "uc" if step % 2 else "cu"))
    assert set(model.stats().misses) == {why}


@pytest.mark.parametrize("name", HIDDEN)
@torch.no_grad()
def test_a_condition_that_stays_is_reused_under(name: str) -> None:
    kind, hide, _ = HIDDEN[name]
    model = rewritten(made(kind))
    given = condition()
    hide(model, given)
    with model.trajectory(STEPS):
        drawn(model, lambda *_: None, lambda step: "c")
    assert (tiny.row(model, STEPS), model.stats().misses) == ("CRRCR", {})


Pair = namedtuple("Pair", ["x", "context"])


class Packed(TinyDiT):
    """The latent and the condition are in one container."""

    def forward(self, batch: Any, timestep: Tensor) -> Tensor:
        x, context = batch.values() if isinstance(batch, dict) else batch
        return super().forward(x, timestep, context)


@pytest.mark.parametrize("pack", [lambda x, c: {"x": x, "context": c}, Pair, lambda x, c: [x, c]])
@torch.no_grad()
def test_a_condition_beside_the_latent(pack: Callable[[Tensor, Tensor], Any]) -> None:
    """The two streams take turns in going first, and each equals itself alone."""
    given = {name: condition(seed) for seed, name in enumerate("cu")}
    found: dict[str, list[Tensor]] = {"c": [], "u": []}
    model = rewritten(made(Packed))
    with model.trajectory(STEPS):
        for step, arguments in enumerate(calls(STEPS)):
            for name in "uc" if step % 2 else "cu":
                packed = pack(arguments["hidden_states"], given[name])
                found[name].append(model(packed, arguments["timestep"]).clone())
    assert tiny.row(model, 2 * STEPS) == "CCRRRRCCRR"
    for name in given:
        with model.trajectory(STEPS):
            alone = [model(pack(a["hidden_states"], given[name]), a["timestep"]).clone() for a in calls(STEPS)]
        assert same(found[name], alone)


@torch.no_grad()
def test_tensors_between_graphs_are_data() -> None:
    """Code between two graphs makes the tokens of the first block anew in each call: they are no hidden condition."""
    case = broken_blocks(layers=2)
    inputs, compiled = case.calls(STEPS), rewritten(case.build())
    with compiled.trajectory(STEPS):
        for arguments in inputs:
            compiled(**arguments)
    assert any(each.captured.unknown for each in compiled._backend.rewritten)
    assert (compiled.stats().reused, compiled.stats().misses) == (3 * 4, {})
