"""The facts about a compilation that come from the model, the call and the caller, and not from a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Noise = Callable[[int], tuple[float | None, float | None]]


def unknown_noise(step: int) -> tuple[None, None]:
    """The noise of a trajectory without a scheduler: sigma and SNR are unknown."""
    return None, None


@dataclass(frozen=True)
class Request:
    """``whole``: the graph is the whole model. ``num_steps`` and ``noise``, which returns sigma and SNR of a step, are
    those of the trajectory; None means unknown. ``hoist``: trajectory-invariant values are computed once per
    trajectory. ``force``: every decision computes, for `verify`."""

    whole: bool
    num_steps: int | None = None
    noise: Noise = unknown_noise
    hoist: bool = True
    force: bool = False
