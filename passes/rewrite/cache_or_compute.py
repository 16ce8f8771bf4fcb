"""The function that a guarded graph calls for each guarded site. It is executable, with the decision as an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def cache_or_compute(
    reuse: bool,
    cached: Sequence[Any],
    compute: Callable[..., Sequence[Any]],
    live_ins: Sequence[Any],
    *,
    instead: Callable[..., Sequence[Any]] | None = None,
    site: str,
    guard: str,
    strategy: str,
) -> Sequence[Any]:
    """Return the values of a site and of the sites inside it.

    Without `reuse`, returns ``compute(*live_ins)``. With `reuse`, returns `cached`, or ``instead(*live_ins)`` if
    `instead` is given. `site`, `guard` and `strategy` have no effect; they are shown when the graph is printed.
    """
    if not reuse:
        return compute(*live_ins)
    return cached if instead is None else instead(*live_ins)
