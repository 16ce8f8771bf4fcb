"""Kernels that are built while further graphs are lowered."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import async_compile
from torch._inductor.async_compile import AsyncCompile

import dit_rewrite
from dit_rewrite.policies import FORA
from dit_rewrite.torch_compat.kernel_builds import KernelBuilds
from tests.helpers import tiny

WAIT = AsyncCompile.wait


@pytest.fixture(autouse=True)
def several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 2)


def loaded(kernel: Future[Any]) -> dict[str, Any]:
    """The globals of a graph's code, as Inductor loads it: it waits for its kernels at the end."""
    scope: dict[str, Any] = {"kernel": kernel, "number": 3}
    AsyncCompile().wait(scope)
    return scope


def built(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def test_the_code_of_a_graph_is_loaded_before_its_kernels_are_built() -> None:
    builds, future = KernelBuilds(), Future[Any]()
    with builds.started():
        scope = loaded(future)
    future.set_result(abs)
    builds.finish()
    assert scope == {"kernel": abs, "number": 3}


def test_a_kernel_that_is_used_early_is_waited_for() -> None:
    """Inductor runs some graphs while it lowers another one, to choose the fastest kernel."""
    builds = KernelBuilds()
    with builds.started():
        called, asked = loaded(built(abs)), loaded(built(SimpleNamespace(run=abs)))
        assert called["kernel"](-2) == 2 and asked["kernel"].run(-3) == 3
    assert called["kernel"] is abs
    builds.finish()


def test_a_kernel_is_asked_for_once() -> None:
    """Inductor may make the result of a finished build anew each time."""
    future, builds = built(None), KernelBuilds()
    made: list[object] = []
    future.result = lambda timeout=None: (made.append(object()), made[-1])[1]  # type: ignore[method-assign]
    with builds.started():
        scope = loaded(future)
    builds.finish()
    builds.finish()
    assert made == [scope["kernel"]]


def test_a_kernel_that_cannot_be_built_is_an_error() -> None:
    builds, future = KernelBuilds(), Future[Any]()
    with builds.started():
        loaded(future)
    future.set_exception(RuntimeError("no compiler"))
    with pytest.raises(RuntimeError, match="no compiler"):
        builds.finish()


def test_others_wait_as_before() -> None:
    """Another thread does, and this one does after the context, whichever thread leaves its own first."""
    entered, leave, found = threading.Event(), threading.Event(), []

    def other() -> None:
        found.append(loaded(built(abs))["kernel"])
        with KernelBuilds().started():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with KernelBuilds().started():
        thread.start()
        entered.wait()
    assert found == [abs]
    assert loaded(built(abs))["kernel"] is abs
    leave.set()
    thread.join()
    assert AsyncCompile.wait is WAIT


def test_the_variants_of_a_model_are_built_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both graphs are lowered before the first kernel is waited for, and none is left unbuilt."""
    events: list[str] = []
    hold, finish = KernelBuilds.hold, KernelBuilds.finish
    monkeypatch.setattr(KernelBuilds, "hold", lambda *given: (events.append("load"), hold(*given))[1])
    monkeypatch.setattr(KernelBuilds, "finish", lambda self: (events.append("finish"), finish(self))[1])
    model, inputs = tiny.build(), tiny.calls(2)
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        expected = model(**inputs[0])
        ours = dit_rewrite.compile(model, FORA(2))
        with ours.trajectory(num_steps=2):
            found = [ours(**each) for each in inputs]
    assert events == ["load", "load", "finish"]
    assert ours.stats().reused and len(found) == 2
    torch.testing.assert_close(found[0], expected)
