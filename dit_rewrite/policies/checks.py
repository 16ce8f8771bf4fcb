"""What parameters of policies may be, and how a policy is named by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dit_rewrite.errors import BadParameter
from dit_rewrite.policy.bases import Basis
from dit_rewrite.policy.plan import is_whole
from dit_rewrite.policy.strategies import Forecast, Reuse, Store, is_number

LONG = 60  # characters of a parameter in a name


def real(policy: str, name: str, value: object, fits: Callable[[Any], bool], allowed: str) -> None:
    """Raise BadParameter unless `value` is a number that `fits`; NaN fits nothing, and True is no number."""
    if not is_number(value) or not fits(value):
        raise BadParameter(policy, name, value, allowed)


def threshold_of(policy: str, value: object) -> None:
    """Raise BadParameter unless `value` can be the most that something may have changed."""
    real(policy, "threshold", value, lambda t: 0 <= t < math.inf, "a number >= 0")


def whole(policy: str, name: str, value: object, least: int, most: float = math.inf) -> None:
    """Raise BadParameter unless `value` is a whole number in these bounds."""
    if not is_whole(value, least) or value > most:
        upper = "" if most == math.inf else f" and <= {most}"
        raise BadParameter(policy, name, value, f"a whole number >= {least}{upper}")


def one_of(policy: str, name: str, value: object, allowed: Collection[str]) -> None:
    """Raise BadParameter unless `value` is one of these texts."""
    if not isinstance(value, str) or value not in allowed:
        raise BadParameter(policy, name, value, " or ".join(f'"{word}"' for word in allowed))


def numbers(policy: str, name: str, value: object, fits: Callable[[float], bool], allowed: str) -> tuple[float, ...]:
    """`value` as a tuple; raises BadParameter unless it is a sequence of finite numbers that each `fits`, not empty."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    if not items or not all(is_number(item) and math.isfinite(item) and fits(item) for item in items):
        raise BadParameter(policy, name, value, allowed)
    return tuple(map(float, items))


def reuse_or_forecast(policy: str, order: int, basis: str | Basis, store: Store) -> Reuse | Forecast:
    """Order 0 is plain reuse."""
    whole(policy, "order", order, 0)
    return Reuse(store) if order == 0 else Forecast(order, basis, store=store)


def title(policy: str, **parameters: object) -> str:
    """The name of a policy, such as ``FORA(interval=3)``; long tables are left out."""
    texts = {name: repr(value) for name, value in parameters.items()}
    shown = (f"{name}={text if len(text) <= LONG else chr(8230)}" for name, text in texts.items())
    return f"{policy}({', '.join(shown)})"
