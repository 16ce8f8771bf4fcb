"""Policies that compute some of the sites that they forecast, and reuse while the error of the forecast is small."""

from __future__ import annotations

from typing import Literal

from sympy import Eq, Float, Max

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.guards.symbols import forecast_error, num_steps, step, streak
from dit_rewrite.policies.checks import one_of, real, threshold_of, title, whole
from dit_rewrite.policies.static import BRANCHES
from dit_rewrite.policy.plan import is_whole
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast, Store, Verify
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
    """Forecast all blocks, and compute one of them to check the forecast (SpeCa).

    The outputs of the branches of `kinds`, or with span="block" the change across each block, are forecast by
    TaylorSeer's differences of `order`. From the `min_streak`-th consecutive forecast on (counted from 0), the block
    `layer` (negative: from the end) is computed and compared with its forecast. The next step computes if the relative
    error exceeds max(floor, threshold * decay^(step / num_steps)), or after `max_streak` consecutive forecasts. The
    `error` is "elementwise", the source's mean of ratios, or "mean", the ratio of means. The step after each computed
    one is always forecast, also during the first `warmup` steps, whose other steps compute.

    The defaults are those of the source's DiT. For FLUX it uses a threshold of 7, a decay of 0.3, a floor of 0.1 and a
    max_streak of 8. Differences from the source:
    - A verified step uses the computed value; the source uses the forecast.
    - The branches before their gates are compared, as in the source's FLUX, and the largest error counts. Its DiT
      compares the stream after the block, and counts the steps of the decay from 1.
    - An error of NaN computes; the source takes it for a small error.
    - Its other metrics are not available. Like the source, and unlike the paper, this policy does not repeat a step
      whose error is too large.

    Needs num_steps (`model.trajectory`). Raises BadParameter for invalid parameters.
    """
    threshold_of("SpeCa", threshold)
    real("SpeCa", "decay", decay, lambda d: 0 < d <= 1, "a number above 0, at most 1")
    real("SpeCa", "floor", floor, lambda f: 0 <= f < float("inf"), "a number >= 0")
    whole("SpeCa", "min_streak", min_streak, 0)
    whole("SpeCa", "max_streak", max_streak, 1)
    whole("SpeCa", "warmup", warmup, 1)
    one_of("SpeCa", "error", error, ("elementwise", "mean"))
    _forecasts("SpeCa", span, store)
    most = Max(Float(float(floor)), Float(float(threshold)) * Float(float(decay)) ** (step / num_steps))
    first = max(min_streak, 1)  # the first consecutive forecast that is verified
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
    """Raise BadParameter for a span or a store that cannot be verified."""
    if span not in ("block", None):
        raise BadParameter(policy, "span", span, '"block", or None for the branches')
    if store not in ("bf16", None):
        raise BadParameter(policy, "store", store, '"bf16" or None')


def _only(policy: str, layer: int) -> tuple[int, int | None]:
    """Return one block as a range of layers."""
    if not is_whole(layer, -9999):
        raise BadParameter(policy, "layer", layer, "the index of a block: from 0, or from -1 counted from the end")
    return layer, layer + 1 if layer != -1 else None
