"""Checks of the parameters of policies, and the name of a policy with its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any

from dit_rewrite.errors import BadParameter
from dit_rewrite.policy.bases import Basis
from dit_rewrite.policy.plan import is_whole
from dit_rewrite.policy.strategies import Forecast, Reuse, Store

LONG = 60  # maximum characters of a parameter in a name


def real(policy: str, name: str, value: object, fits: Callable[[Any], bool], allowed: str) -> None:
    """Raise BadParameter unless `value` is a number (not a bool) for which `fits` returns True."""
    if not _is_real(value) or not fits(value):
        raise BadParameter(policy, name, value, allowed)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def threshold_of(policy: str, value: object) -> None:
    """Raise BadParameter unless `value` is a finite number >= 0."""
    real(policy, "threshold", value, lambda t: 0 <= t < math.inf, "a number >= 0")


def whole(policy: str, name: str, value: object, least: int, most: float = math.inf) -> None:
    """Raise BadParameter unless `value` is a whole number with `least` <= value <= `most`."""
    if not is_whole(value, least) or value > most:
        upper = "" if most == math.inf else f" and <= {most}"
        raise BadParameter(policy, name, value, f"a whole number >= {least}{upper}")


def one_of(policy: str, name: str, value: object, allowed: Collection[str]) -> None:
    """Raise BadParameter unless `value` is one of the `allowed` strings."""
    if not isinstance(value, str) or value not in allowed:
        raise BadParameter(policy, name, value, " or ".join(f'"{word}"' for word in allowed))


def numbers(policy: str, name: str, value: object, fits: Callable[[float], bool], allowed: str) -> tuple[float, ...]:
    """Return `value` as a tuple of floats.

    Raises BadParameter unless it is a non-empty sequence of finite numbers for which `fits` returns True.
    """
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    if not items or not all(_is_real(item) and math.isfinite(item) and fits(item) for item in items):
        raise BadParameter(policy, name, value, allowed)
    return tuple(map(float, items))


def reuse_or_forecast(policy: str, order: int, basis: str | Basis, store: Store) -> Reuse | Forecast:
    """Return `Reuse` for order 0, else a `Forecast`. Raises BadParameter."""
    whole(policy, "order", order, 0)
    return Reuse(store) if order == 0 else Forecast(order, basis, store=store)


def title(policy: str, **parameters: object) -> str:
    """Return the name of a policy, such as ``FORA(interval=3)``. Parameters with long texts are shown as "…"."""
    texts = {name: repr(value) for name, value in parameters.items()}
    shown = (f"{name}={text if len(text) <= LONG else chr(8230)}" for name, text in texts.items())
    return f"{policy}({', '.join(shown)})"
