"""The pipeline: an ordered tuple of passes over one graph, one contract for all of them, and one runner.

A pass is a function ``(gm, ctx) -> result``. If the result is a graph module, the passes behind it get that graph. Any
other result is an analysis: it stands in the context by its class, and a later pass reads it with ``ctx[Found]``.
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
    """The facts that passes share beside the graph: settings and results of earlier passes, each by its class."""

    def __init__(self, *known: object) -> None:
        self._known: dict[type, object] = {type(value): value for value in known}

    def put(self, value: object) -> None:
        """Add a result, or replace the one of the same class."""
        self._known[type(value)] = value

    def get(self, kind: type[T]) -> T | None:
        """The result of that class; None if no pass made one."""
        found: Any = self._known.get(kind)
        return found

    def __getitem__(self, kind: type[T]) -> T:
        """The result of that class. Raises LookupError if no earlier pass made one."""
        found = self.get(kind)
        if found is None:
            raise LookupError(f"no pass before this one made a {kind.__name__}")
        return found


@dataclass(frozen=True)
class Pass:
    """A named step of the pipeline. Only an ``optional`` one can be disabled: later ones need the results of others."""

    name: str
    run: Callable[[fx.GraphModule, Context], object]
    optional: bool = False


@dataclass(frozen=True)
class PassRun:
    """One run of a pass: its seconds, the graph's node counts, and how many places it refused."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    refused: int = 0


class Watch(Protocol):
    """Is called after each pass with its number in the tuple, counted from 1, its name, the graph and its result."""

    def __call__(self, number: int, name: str, gm: fx.GraphModule, result: object) -> None: ...


def check_disabled(names: Collection[str], passes: Iterable[Pass]) -> frozenset[str]:
    """The names as a set. Raises BadArgument for one that no pass has, or whose pass cannot be left out."""
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
    """Run the passes in their order and return the last graph.

    Each run is appended to `runs`, and shown to `watch` before the next pass starts. Errors of this package name the
    pass in `DitRewriteError.during`; any other exception is raised as PassFailed.
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
