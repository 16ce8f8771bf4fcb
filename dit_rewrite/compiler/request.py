"""The facts about a compilation that no pass finds out: they come from the model, the call and the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Noise = Callable[[int], tuple[float | None, float | None]]


def unknown_noise(step: int) -> tuple[None, None]:
    """Sigma and SNR of a step when no scheduler gave them."""
    return None, None


@dataclass(frozen=True)
class Request:
    """``whole``: the graph is all of the model. ``num_steps`` and ``noise`` (sigma and SNR of a step) are those of the
    trajectory, as far as they are known. ``hoist``: trajectory-invariant values are computed once. ``force``: every
    decision computes, for `verify`."""

    whole: bool
    num_steps: int | None = None
    noise: Noise = unknown_noise
    hoist: bool = True
    force: bool = False
