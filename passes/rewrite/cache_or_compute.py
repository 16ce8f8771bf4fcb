"""The node that stands for a guarded site in a guarded graph. It runs as it is, with the decision as an input."""

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
    """The values of a site and of the sites inside it: the `cached` ones, or those that `compute` makes of `live_ins`.

    Where there is an `instead`, it makes them in the place of the cached ones. `site`, `guard` and `strategy` are what
    a reader of the graph sees; they change nothing here.
    """
    if not reuse:
        return compute(*live_ins)
    return cached if instead is None else instead(*live_ins)
