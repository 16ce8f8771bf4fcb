"""The forward hooks of a model, which Dynamo traces into its graphs without noticing later changes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from dit_rewrite import torch_compat

Compiled = Callable[..., Any]
MOST = 8  # compilations of a model with different hooks; as many as Dynamo compiles a function


class _State(NamedTuple):
    """The hooks that were there when `call` was chosen: ``present`` are the dictionaries that were not empty."""

    registered: int
    present: list[dict[int, Any]]
    num_hooks: int
    call: Compiled

    @property
    def is_current(self) -> bool:
        present = self.num_hooks == 0 or self.num_hooks == sum(map(len, self.present))
        return present and self.registered == torch_compat.hooks_registered()


class HookedCalls:
    """The compiled calls of a model, by the hooks that were registered when they were traced.

    Most calls compare two numbers: every registration increases a counter of torch, and only a removal of hooks that
    are present changes their number.
    """

    def __init__(self, model: nn.Module, compile_call: Callable[[], Compiled], eager: Compiled) -> None:
        """`compile_call` returns a new compiled call. `eager` runs after MOST of them."""
        self._model, self._compile, self._eager = model, compile_call, eager
        self._calls: list[tuple[list[Any], Compiled]] = []
        self._state: _State | None = None
        self._lock = threading.Lock()

    def current(self) -> Compiled:
        """Return the compiled call for the present hooks."""
        state = self._state  # read once: other threads replace it
        if state is None or not state.is_current:
            with self._lock:
                registered, present = torch_compat.hooks_registered(), torch_compat.forward_hooks(self._model)
                state = self._state = _State(registered, present, sum(map(len, present)), self._find(present))
        return state.call

    def _find(self, present: list[dict[int, Any]]) -> Compiled:
        hooks = [(of, *of.values()) for of in present]  # a dictionary that changed is equal to itself
        for known, call in self._calls:
            if known == hooks:
                return call
        if len(self._calls) >= MOST:
            return self._eager
        self._calls.append((hooks, self._compile()))
        return self._calls[-1][1]
