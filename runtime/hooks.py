"""The forward hooks of a model, which Dynamo traces into its graphs without noticing later changes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dit_rewrite import torch_compat

Compiled = Callable[..., Any]
MOST = 8  # compilations of a model with different hooks; as many as Dynamo compiles a function


class HookedCalls:
    """The compiled calls of a model, by the hooks that were registered when they were traced.

    Most calls compare two numbers: every registration increases a counter of torch, and only a removal of hooks that
    are present changes their number.
    """

    def __init__(self, model: nn.Module, compile_call: Callable[[], Compiled], eager: Compiled) -> None:
        """`compile_call` returns a new compiled call. `eager` runs after MOST of them."""
        self._model, self._compile, self._eager = model, compile_call, eager
        self._calls: list[tuple[list[Any], Compiled]] = []
        self._current: Compiled | None = None
        self._registered, self._count = -1, 0
        self._present: list[Any] = []  # the dictionaries of hooks that are not empty

    def current(self) -> Compiled:
        """Return the compiled call for the present hooks."""
        registered, count = torch_compat.hooks_registered(), sum(map(len, self._present))
        if self._current is None or (registered, count) != (self._registered, self._count):
            self._present = torch_compat.forward_hooks(self._model)
            self._registered, self._count = registered, sum(map(len, self._present))
            self._current = self._find()
        return self._current

    def _find(self) -> Compiled:
        hooks = [(of, *of.values()) for of in self._present]  # a dictionary that changed is equal to itself
        for known, call in self._calls:
            if known == hooks:
                return call
        if len(self._calls) >= MOST:
            return self._eager
        self._calls.append((hooks, self._compile()))
        return self._calls[-1][1]
