"""The context of a first call: garbage is collected once, at its end."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from dit_rewrite import torch_compat
from dit_rewrite.compiler.first_call import first_call
from tests.helpers import tiny


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.enable()


class Cycle:
    """An object that refers to itself, as a compilation leaves behind."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_once_at_the_end() -> None:
    dynamo = torch_compat.dynamo_config()
    before = dynamo.run_gc_after_compile
    with first_call(threading.RLock()):
        made = weakref.ref(Cycle())
        assert not gc.isenabled() and not dynamo.run_gc_after_compile
        assert made() is not None
    assert made() is None and gc.isenabled()
    assert dynamo.run_gc_after_compile is before


def test_a_failed_call_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(ValueError, match="of the model"), first_call(threading.RLock()):
        raise ValueError("of the model")
    assert gc.isenabled()


def test_a_collector_that_the_caller_disabled_stays_disabled() -> None:
    gc.disable()
    with first_call(threading.RLock()):
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_models_may_be_compiled_at_the_same_time() -> None:
    dynamo = torch_compat.dynamo_config()
    before = dynamo.run_gc_after_compile
    first, second = first_call(threading.RLock()), first_call(threading.RLock())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled() and not dynamo.run_gc_after_compile
    second.__exit__(None, None, None)
    assert gc.isenabled() and dynamo.run_gc_after_compile is before


def test_a_model_that_is_not_captured_pauses_the_collector_once() -> None:
    model, enabled = tiny.rewritten(tiny.build()), list[bool]()
    model.register_forward_pre_hook(lambda *_: enabled.append(gc.isenabled()))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), pytest.warns(match="no effect"):
        for call in tiny.calls(3):
            model(**call)
    assert enabled == [False, True, True]
