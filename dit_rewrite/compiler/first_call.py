"""The first call of a model, in which it is compiled."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from dit_rewrite import torch_compat


@contextlib.contextmanager
def first_call(lock: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """A context under `lock`, in which garbage is collected once, at its end.

    A compilation creates millions of objects and keeps most of them until it ends, so that the collector would look at
    them again and again. At the end it must run: reference cycles keep the call's inputs alive, as if the caller did.
    """
    dynamo = torch_compat.dynamo_config()
    with lock:
        enabled, after_compile = gc.isenabled(), dynamo.run_gc_after_compile
        gc.disable()
        dynamo.run_gc_after_compile = False
        try:
            yield
        finally:
            dynamo.run_gc_after_compile = after_compile
            gc.collect()
            if enabled:
                gc.enable()
