"""Fake results of calls that a pass adds to a graph."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.torch_compat import FakeTensorMode


def evaluate(mode: FakeTensorMode | None, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the fake result of a call. Autocast is off, because its casts are already in the graph."""
    values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with ExitStack() as modes:
        for each in (mode, torch.no_grad(), torch_compat.no_autocast()):
            modes.enter_context(each or nullcontext())
        return target(*values[0], **values[1])
