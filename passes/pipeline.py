"""The pass pipeline: an ordered tuple of passes over one graph, and the function that runs them.

A pass is a function ``(gm, ctx) -> result``. If the result is a graph module, it becomes the input of the next pass.
Any other result is stored in the context under its class; a later pass reads it with, for example, ``ctx[Found]``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import fx

from dit_rewrite.errors import BadArgument, DitRewriteError, PassFailed

T = TypeVar("T")


class Context:
    """Settings and results of earlier passes, stored under their classes."""

    def __init__(self, *known: object) -> None:
        self._known: dict[type, object] = {type(value): value for value in known}

    def put(self, value: object) -> None:
        """Store `value` under its class. Replaces an earlier value of that class."""
        self._known[type(value)] = value

    def get(self, kind: type[T]) -> T | None:
        """Return the value of class `kind`, or None if there is none."""
        found: Any = self._known.get(kind)
        return found

    def __getitem__(self, kind: type[T]) -> T:
        """Return the value of class `kind`. Raises LookupError if there is none."""
        found = self.get(kind)
        if found is None:
            raise LookupError(f"no pass before this one made a {kind.__name__}")
        return found


@dataclass(frozen=True)
class Pass:
    """A named pass. Only an ``optional`` pass can be disabled, because later passes need the results of the others."""

    name: str
    run: Callable[[fx.GraphModule, Context], object]
    optional: bool = False


@dataclass(frozen=True)
class PassRun:
    """Statistics of one run of a pass: time in seconds, node counts of the graph, and the number of refused places."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    refused: int = 0


class Watch(Protocol):
    """A callback that runs after each pass. `number` is the position of the pass in the tuple, starting at 1."""

    def __call__(self, number: int, name: str, gm: fx.GraphModule, result: object) -> None: ...


def check_disabled(names: Collection[str], passes: Iterable[Pass]) -> frozenset[str]:
    """Return `names` as a set. Raises BadArgument for a name that is not the name of an optional pass."""
    optional = sorted(each.name for each in passes if each.optional)
    for name in (names,) if isinstance(names, str) else names:
        if name not in optional:
            raise BadArgument("compile", "disable_passes", name, f"a tuple of {', '.join(optional)}")
    return frozenset((names,) if isinstance(names, str) else names)


def run_passes(
    passes: Sequence[Pass],
    gm: fx.GraphModule,
    ctx: Context,
    runs: list[PassRun],
    disabled: Collection[str] = (),
    watch: Watch | None = None,
) -> fx.GraphModule:
    """Run the passes in order and return the last graph.

    Appends a PassRun to `runs` and calls `watch` after each pass. If a pass raises a DitRewriteError, its `during` is
    set to the name of the pass; any other exception is raised as PassFailed.
    """
    for number, each in enumerate(passes, 1):
        if each.name in disabled:
            continue
        before, start = len(gm.graph.nodes), time.perf_counter()
        result = _run(each, gm, ctx)
        seconds = time.perf_counter() - start
        if isinstance(result, fx.GraphModule):
            gm = result
        else:
            ctx.put(result)
        refused = len(getattr(result, "refused", ()))
        runs.append(PassRun(each.name, seconds, before, len(gm.graph.nodes), refused))
        if watch is not None:
            watch(number, each.name, gm, result)
    return gm


def _run(each: Pass, gm: fx.GraphModule, ctx: Context) -> object:
    try:
        return each.run(gm, ctx)
    except DitRewriteError as error:
        error.during = each.name
        raise
    except Exception as error:
        raise PassFailed(each.name, error) from error
