"""The first call of a model, in which it is compiled."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

from dit_rewrite import torch_compat


@contextlib.contextmanager
def first_call(lock: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """A context under `lock`, in which garbage is collected once, at its end.

    A compilation creates millions of objects and keeps most of them until it ends, so that the collector would look at
    them again and again. At the end it must run: reference cycles keep the call's inputs alive, as if the caller did.
    All of these objects are young then, so it need not look at those of the rest of the process.
    """
    with lock:
        _Paused.enter()
        try:
            yield
        finally:
            gc.collect(1)
            _Paused.leave()


class _Paused:
    """Pauses Python's collector, and Dynamo's collection after a compilation, while any thread compiles a model."""

    _lock = threading.Lock()
    _depth = 0
    _before = (True, True)

    @classmethod
    def enter(cls) -> None:
        dynamo = torch_compat.dynamo_config()
        with cls._lock:
            if cls._depth == 0:
                cls._before = gc.isenabled(), dynamo.run_gc_after_compile
                gc.disable()
                dynamo.run_gc_after_compile = False
            cls._depth += 1

    @classmethod
    def leave(cls) -> None:
        with cls._lock:
            cls._depth -= 1
            if cls._depth == 0:
                enabled, torch_compat.dynamo_config().run_gc_after_compile = cls._before
                if enabled:
                    gc.enable()
