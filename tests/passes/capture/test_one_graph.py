"""The settings under which Dynamo captures a model: they hold while it compiles in that thread, and only then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dit_rewrite.passes.capture.capture import one_graph

Settings = tuple[bool, bool, str]


def settings() -> Settings:
    dynamo = torch._dynamo.config
    return dynamo.capture_dynamic_output_shape_ops, dynamo.specialize_float, torch.compiler.config.dynamic_sources


@pytest.fixture(autouse=True)
def usual() -> Iterator[Settings]:
    torch._dynamo.reset()
    before = settings()
    yield before
    assert settings() == before


DYNAMIC = r"L['t'],L\['t'\]\[\d+\]$"  # the argument itself, and the numbers of a list


def compiled(seen: list[Settings]) -> Any:
    """Return a compiled function; the settings of each compilation are appended to `seen`."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(settings())
        return gm.forward

    return torch.compile(lambda x, t: x * t, backend=backend)


def test_the_settings_hold_while_dynamo_compiles(usual: Settings) -> None:
    seen: list[Settings] = []
    run = compiled(seen)
    with one_graph("t"):
        assert settings() == usual, "they are global, and other models may compile now"
        run(torch.ones(2), 0.5)
        assert settings() == usual
    assert seen == [(True, False, DYNAMIC)]


def test_a_number_becomes_dynamic() -> None:
    """The second value compiles the last graph; by default each value would compile another."""
    seen: list[Settings] = []
    run = compiled(seen)
    with one_graph("t"):
        found = [run(torch.ones(1), time).item() for time in (0.5, 0.25, 0.75, 0.125)]
    assert found == [0.5, 0.25, 0.75, 0.125]
    assert len(seen) == 2


def test_other_models_are_compiled_as_usual(usual: Settings) -> None:
    """Both after a context and, in another thread, during one."""
    seen: list[Settings] = []
    with one_graph():
        thread = threading.Thread(target=lambda: compiled(seen)(torch.ones(2), 0.5))
        thread.start()
        thread.join()
    compiled(seen)(torch.ones(2), 0.5)
    assert seen == [usual, usual]


def test_contexts_nest() -> None:
    seen: list[Settings] = []
    with one_graph("t"):
        with one_graph():
            compiled(seen)(torch.ones(2), 0.5)
        compiled(seen)(torch.ones(2), 0.5)
    assert [sources for _, _, sources in seen] == ["", DYNAMIC]


def test_the_settings_return_after_a_failure() -> None:
    """The fixture compares them."""

    def fail(x: Tensor, t: float) -> Tensor:
        return torch.ones(2) @ torch.ones(3)

    with one_graph(), pytest.raises(Exception, match="size"):
        torch.compile(fail, backend="eager")(torch.ones(2), 0.5)


def test_after_a_reset_of_dynamo() -> None:
    """`torch._dynamo.reset` forgets all callbacks."""
    seen: list[Settings] = []
    run = compiled(seen)
    with one_graph():
        run(torch.ones(2), 0.5)
    torch._dynamo.reset()
    with one_graph():
        run(torch.ones(2), 0.5)
    assert [shapes for shapes, _, _ in seen] == [True, True]
