"""Policies that compute a part of what they forecast, and go on while the forecast is right."""

from __future__ import annotations

from typing import Literal

from sympy import Eq, Float, Max

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.guards.symbols import forecast_error, num_steps, step, streak
from dit_rewrite.policies.checks import one_of, real, threshold_of, title, whole
from dit_rewrite.policies.static import BRANCHES
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast, Store, Verify, is_count
from dit_rewrite.policy.where import Where

Error = Literal["elementwise", "mean"]


def SpeCa(
    threshold: float = 0.1,
    decay: float = 0.01,
    floor: float = 0.01,
    min_streak: int = 2,
    max_streak: int = 5,
    warmup: int = 3,
    order: int = 4,
    layer: int = -1,
    error: Error = "elementwise",
    kinds: tuple[str, ...] = BRANCHES,
    span: Literal["block"] | None = None,
    store: Literal["bf16"] | None = None,
) -> Policy:
    """Forecast, with one block really computed, until that block's forecast is too wrong (SpeCa).

    Each branch of `kinds`, or with span="block" the change across each block, is forecast by TaylorSeer's differences
    to `order`. From the `min_streak`-th forecast in a row on (counted from 0), the block number `layer`, from the end
    where it is negative, is computed and compared with its forecast. Where the relative error, by the source's mean of
    the ratios or with error="mean" the ratio of the means, exceeds max(floor, threshold * decay^(step / num_steps)),
    the next step computes; and so it does after `max_streak` forecasts. One step after each that computed is forecast,
    whatever else is said; of the first `warmup` steps all others compute. Needs to be told num_steps.

    Defaults are those of the source's DiT; its FLUX has a threshold of 7, a decay of 0.3, a floor of 0.1 and a
    max_streak of 8. Where the source computes beside the forecast and goes on with this, here the step goes on with
    what was computed. What is compared are the branches before their gates, as in the source's FLUX, and of several the
    worst; its DiT compares the stream behind the block, and counts the steps of the decay from 1. An error of NaN,
    which the source takes for a small one, computes. A failed step is not done again, as in the source; in the paper it
    is. Its other metrics are not there. Raises BadParameter for what is out of range.
    """
    threshold_of("SpeCa", threshold)
    real("SpeCa", "decay", decay, lambda d: 0 < d <= 1, "a number above 0, at most 1")
    real("SpeCa", "floor", floor, lambda f: 0 <= f < float("inf"), "a number >= 0")
    whole("SpeCa", "min_streak", min_streak, 0)
    whole("SpeCa", "max_streak", max_streak, 1)
    whole("SpeCa", "warmup", warmup, 1)
    one_of("SpeCa", "error", error, ("elementwise", "mean"))
    _forecasts("SpeCa", span, store)
    most = Max(Float(floor), Float(threshold) * Float(decay) ** (step / num_steps))
    first = max(min_streak, 1)  # forecast in a row that is verified
    on = (step >= warmup) & (streak < max_streak)
    right = on & (streak > first) & (forecast_error(elementwise=error == "elementwise") <= most)
    do, block = (order, "taylorseer"), Where(kinds, _only("SpeCa", layer), span=span)
    rules = (
        Rule(on & Eq(streak, first), Verify(*do, store=store), block),
        Rule(right, Verify(*do, store=store), block),
        Rule(
            (Eq(streak, 0) & (step > 0)) | (on & (streak <= first)), Forecast(*do, store=store), Where(kinds, span=span)
        ),
        Rule(right, Forecast(*do, store=store), Where(kinds, span=span)),
    )
    name = title(
        "SpeCa", threshold=threshold, decay=decay, floor=floor, min_streak=min_streak, max_streak=max_streak,
        warmup=warmup, order=order, layer=layer, error=error, span=span,
    )  # fmt: skip
    return Policy(rules, name)


def _forecasts(policy: str, span: object, store: Store) -> None:
    """Raise BadParameter for a place or a store that cannot be verified."""
    if span not in ("block", None):
        raise BadParameter(policy, "span", span, '"block", or None for the branches')
    if store not in ("bf16", None):
        raise BadParameter(policy, "store", store, '"bf16" or None')


def _only(policy: str, layer: int) -> tuple[int, int | None]:
    """A block alone, as a range of layers."""
    if not is_count(layer, -9999):
        raise BadParameter(policy, "layer", layer, "the number of a block, from 0, or from the end, from -1")
    return layer, layer + 1 if layer != -1 else None
