"""Hooks that are registered or removed after a model was compiled take effect at the next call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from dit_rewrite.errors import MissReason
from dit_rewrite.policies import FORA
from dit_rewrite.runtime.hooks import MOST
from tests.helpers import tiny
from tests.helpers.tiny import calls, outputs, rewritten, row, same

STEPS = 8
Register = Callable[[tiny.TinyDiT, Any], Any]
PLACES: dict[str, Register] = {
    "a branch": lambda model, hook: model.blocks[1].mlp.register_forward_hook(hook),
    "the model": lambda model, hook: model.register_forward_hook(hook),
    "every module": lambda model, hook: nn.modules.module.register_module_forward_hook(hook),
}


def smaller(_: nn.Module, args: Any, result: Tensor) -> Tensor:
    return 0.9 * result


@contextmanager
def hooked(model: Any, register: Register, hook: Any = smaller) -> Iterator[None]:
    handle = register(model, hook)
    yield
    handle.remove()


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_that_comes_and_goes(place: str) -> None:
    """Of eight steps, it is there at the third and fourth and at the last two: each change computes."""
    model, inputs = tiny.build(), calls(STEPS)
    compiled, found, expected = rewritten(model, FORA(10)), [], []
    with compiled.trajectory(STEPS):
        for arguments, there in zip(inputs, "--hh--hh", strict=True):
            for each, results in ((compiled, found), (model, expected)):
                if there == "h":
                    with hooked(each, PLACES[place]):
                        results += outputs(each, [arguments])
                else:
                    results += outputs(each, [arguments])
    letters = row(compiled, 10 * STEPS).replace("?", "")  # a hook of the model is a graph without sites
    assert letters == ("CRCCCRCC" if place == "every module" else "CRCRCRCR"), (
        "global ones are compiled at each registration"
    )
    assert same(found[::2], expected[::2])
    assert set(compiled.stats().misses) == {MissReason.CHANGED_GRAPH}
    if place != "every module":
        assert len(compiled._backend.rewritten) == (2 if place == "a branch" else 3), "what comes back is compiled once"


def test_other_hooks_change_nothing() -> None:
    compiled = rewritten(tiny.build(), FORA(10))
    with compiled.trajectory(STEPS):
        for arguments in calls(4):
            with hooked(nn.Linear(1, 1), lambda module, hook: module.register_forward_hook(hook)):
                outputs(compiled, [arguments])
    assert (row(compiled, 4), len(compiled._backend.rewritten)) == ("CRRR", 1)


def test_ever_new_hooks_run_without_compilation() -> None:
    model, inputs = tiny.build(1), calls(MOST + 2)
    compiled, found, expected = rewritten(model), [], []
    with compiled.trajectory(len(inputs)):
        for step, arguments in enumerate(inputs):
            hook = lambda _, __, result, step=step: (1 - step / 100) * result  # noqa: E731
            for each, results in ((compiled, found), (model, expected)):
                with hooked(each, lambda model, hook: model.blocks[0].mlp.register_forward_hook(hook), hook):
                    results += outputs(each, [arguments])
    assert same(found, expected)
    assert len(compiled._backend.rewritten) == MOST
    assert compiled.stats().misses[MissReason.NOT_CAPTURED] == 2
