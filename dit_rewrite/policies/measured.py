"""Policies that measure changes at probes, or estimate errors from calibrated parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sympy import Rational, floor

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.guards.measurements import MAX_COEFFICIENTS
from dit_rewrite.passes.guards.symbols import accumulated_error, drift, num_steps, similarity, step
from dit_rewrite.passes.guards.tables import MAX_VALUES
from dit_rewrite.policies.checks import numbers, one_of, real, reuse_or_forecast, threshold_of, title, whole
from dit_rewrite.policies.published import MAGCACHE, TEACACHE
from dit_rewrite.policy.bases import BASES
from dit_rewrite.policy.measured_bases import Aligned
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast, Reuse, Store
from dit_rewrite.policy.where import Where

Lag = Literal[0, 1]
MOST_BLOCKS = 9999  # maximum number of blocks before a probe


def FirstBlockCache(threshold: float = 0.08, warmup: int = 0, max_streak: int | None = None, lag: Lag = 0) -> Policy:
    """Run the first block, and skip the others while its residual has changed little (first-block cache).

    The method is ParaAttention's; this follows diffusers' FirstBlockCacheConfig. If the relative L1 change of the first
    block's residual since the last computed step is at most `threshold`, the cached change across all other blocks of
    the main stack is added to the stream; in a model with graph breaks, across those of each graph. The first `warmup`
    steps compute, and at most `max_streak` consecutive steps reuse. With lag=1 the change at the previous step decides,
    and no call waits for the device. Raises BadParameter for invalid parameters.
    """
    threshold_of("FirstBlockCache", threshold)
    where = Where(span="stack", layers=(1, None))
    rule = Rule(when=similarity("first_block") <= threshold, where=where, max_streak=max_streak)
    name = title("FirstBlockCache", threshold=threshold, warmup=warmup, max_streak=max_streak, lag=lag)
    return Policy((rule,), name, lag=lag, warmup=warmup)


def DualBlockCache(
    front: int = 8,
    back: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    max_streak: int | None = None,
    forecast: Forecast | str | None = None,
    lag: Lag = 0,
) -> Policy:
    """Run the first and the last blocks, and skip those between while the first have changed little (DBCache).

    This follows cache-dit. If the relative L1 change of the residual of the first `front` blocks of the main stack
    since the last computed step is below `threshold`, the cached change across the blocks between these and the last
    `back` blocks is added to the stream. `forecast` is cache-dit's calibrator: it forecasts the change instead of
    reusing it, by a Forecast, or by the basis of that name at order 1. `warmup`, `max_streak` and `lag` are as in
    `FirstBlockCache`. cache-dit's limits on the sum of changes and on the number of cached steps are not available.
    Raises BadParameter for invalid parameters.
    """
    whole("DualBlockCache", "front", front, 1)
    whole("DualBlockCache", "back", back, 0)
    threshold_of("DualBlockCache", threshold)
    if isinstance(forecast, str) and forecast in BASES:
        forecast = Forecast(1, forecast)
    if forecast is not None and not isinstance(forecast, Forecast):
        raise BadParameter("DualBlockCache", "forecast", forecast, f"a Forecast, one of {', '.join(BASES)}, or None")
    where = Where(span="stack", layers=(front, -back if back else None))
    probe = "first_block" if front == 1 else f"first_{front}_blocks"
    rule = Rule(similarity(probe) < threshold, forecast or Reuse(), where, max_streak=max_streak)
    name = title(
        "DualBlockCache", front=front, back=back, threshold=threshold, warmup=warmup, max_streak=max_streak,
        forecast=forecast, lag=lag,
    )  # fmt: skip
    return Policy((rule,), name, lag=lag, warmup=warmup)


def TeaCache(
    threshold: float,
    coefficients: str | Sequence[float],
    warmup: int = 1,
    cooldown: int = 1,
    lag: Lag = 0,
    store: Store = None,
) -> Policy:
    """Reuse the whole stack until the estimated changes of its output add up to a threshold (TeaCache).

    `coefficients`, highest power first, define a polynomial that maps the relative L1 change of the first attention's
    modulated input between consecutive steps to an estimate of the output's change. They may be the name of a model for
    which the source publishes them (`published.TEACACHE`); `dit_rewrite.calibrate` fits them for other models. While
    the sum of the estimates since the last computed step is below `threshold`, the cached change across the stack is
    added. The first `warmup` and the last `cooldown` steps compute; a `cooldown` above 0 needs num_steps
    (`model.trajectory`). Raises BadParameter for invalid parameters.
    """
    threshold_of("TeaCache", threshold)
    known = TEACACHE.get(coefficients) if isinstance(coefficients, str) else coefficients
    allowed = f"up to {MAX_COEFFICIENTS} finite numbers, highest power first, or one of {', '.join(TEACACHE)}"
    found = numbers("TeaCache", "coefficients", known, lambda _: True, allowed)
    if len(found) > MAX_COEFFICIENTS:
        raise BadParameter("TeaCache", "coefficients", coefficients, allowed)
    rule = Rule(drift("modulated_input", rescale=found) < threshold, Reuse(store), Where(span="stack"))
    name = title("TeaCache", threshold=threshold, coefficients=coefficients, warmup=warmup, cooldown=cooldown, lag=lag)
    return Policy((rule,), name, lag=lag, warmup=warmup, cooldown=cooldown)


def SeaCache(
    threshold: float = 0.25,
    order: int = 1,
    warmup: int = 1,
    cooldown: int = 1,
    max_streak: int | None = 2,
    probe: Literal["latent", "modulated_input"] = "latent",
    lag: Lag = 0,
    store: Store = None,
) -> Policy:
    """Reuse or forecast the whole stack until the changes of the denoised probe add up to a threshold (SeaCache).

    The `probe` passes through a Wiener filter for the noise of its step. While the sum of its relative L1 changes
    between consecutive steps since the last computed step is below `threshold`, the change across the stack is forecast
    to `order` (0: reused). The defaults follow diffusers, which filters the latent. The paper's code filters the
    modulated input, with order 0, no `max_streak`, and thresholds of 0.2 to 0.6. As in the paper's code, the power of
    the signal falls with the square of the frequency for images and with the cube for videos. A model that takes its
    latent as tokens, such as FLUX, has no grid to filter on, and computes. The first `warmup` and the last `cooldown`
    steps compute.

    Needs num_steps, and a scheduler for the noise (`model.trajectory`). Raises BadParameter for invalid parameters.
    """
    threshold_of("SeaCache", threshold)
    one_of("SeaCache", "probe", probe, ("latent", "modulated_input"))
    do = reuse_or_forecast("SeaCache", order, "taylorseer", store)
    rule = Rule(drift(probe, filter="sea") < threshold, do, Where(span="stack"), max_streak=max_streak)
    name = title(
        "SeaCache", threshold=threshold, order=order, warmup=warmup, cooldown=cooldown, max_streak=max_streak,
        probe=probe, lag=lag,
    )  # fmt: skip
    return Policy((rule,), name, lag=lag, warmup=warmup, cooldown=cooldown)


def EasyCache(
    threshold: float = 0.025, warmup: int = 5, cooldown: int = 1, lag: Lag = 0, store: Store = None
) -> Policy:
    """Skip the whole model until the estimated changes of its output add up to a threshold (EasyCache).

    The estimate is the change of the latent since the previous step, times the rate at which the output followed the
    latent between the last two computed steps, relative to the output. While the sum of the estimates since the last
    computed step is below `threshold`, the output is the latent plus the cached difference of the two. The defaults are
    HunyuanVideo's; Wan2.2 uses thresholds of 0.05 to 0.06 and a warmup of 7. Each call of a guidance decides for
    itself; in the source the conditional call decides for both. The first `warmup` and the last `cooldown` steps
    compute; a `cooldown` above 0 needs num_steps (`model.trajectory`). Raises BadParameter for invalid parameters.
    """
    threshold_of("EasyCache", threshold)
    rule = Rule(drift("latent", rescale="rate") < threshold, Reuse(store), Where(span="output", minus="latent"))
    name = title("EasyCache", threshold=threshold, warmup=warmup, cooldown=cooldown, lag=lag)
    return Policy((rule,), name, lag=lag, warmup=warmup, cooldown=cooldown)


def MagCache(
    ratios: str | Sequence[float],
    threshold: float = 0.06,
    max_streak: int = 3,
    retention: float = 0.2,
    num_steps: int | None = None,
    store: Store = None,
) -> Policy:
    """Reuse the whole stack while the error estimated from magnitude ratios is small (MagCache).

    ``ratios[i]`` is the magnitude of the stack's change at step i divided by that at step i - 1. `ratios` may be the
    name of a model for which the source publishes them (`published.MAGCACHE`); `dit_rewrite.calibrate` measures them
    for other models. Another `num_steps` takes the nearest ratios, as in the source. A step reuses if the sum of
    |1 - product of the ratios since the last computed step| over the steps since then is at most `threshold`, and at
    most `max_streak` consecutive steps reuse. The first fraction `retention` of the steps computes. The decisions
    depend on the step alone. Raises BadParameter for invalid parameters.
    """
    threshold_of("MagCache", threshold)
    whole("MagCache", "max_streak", max_streak, 1)
    real("MagCache", "retention", retention, lambda r: 0 <= r <= 1, "a fraction of the steps, 0 to 1")
    known = MAGCACHE.get(ratios) if isinstance(ratios, str) else ratios
    allowed = f"a number above 0 for each of at most {MAX_VALUES} steps, or one of {', '.join(MAGCACHE)}"
    table = numbers("MagCache", "ratios", known, lambda ratio: ratio > 0, allowed)
    if num_steps is not None:
        whole("MagCache", "num_steps", num_steps, 1, MAX_VALUES)
        gaps = max(num_steps - 1, 1)
        table = tuple(table[round(i * (len(table) - 1) / gaps)] for i in range(num_steps))
    first = int(retention * len(table) + 0.5)
    if len(table) * max_streak > MAX_VALUES:
        raise BadParameter("MagCache", "max_streak", max_streak, f"a number below {MAX_VALUES} / len(ratios)")
    when = (step >= max(first, 1)) & (accumulated_error(table, max_streak) <= threshold)
    rule = Rule(when, Reuse(store), Where(span="stack"), max_streak=max_streak)
    name = title(
        "MagCache", ratios=ratios, threshold=threshold, max_streak=max_streak, retention=retention, num_steps=num_steps
    )
    return Policy((rule,), name)


def DiCache(
    threshold: float = 0.4, depth: int = 1, retention: float = 0.2, lag: Lag = 0, store: Store = None
) -> Policy:
    """Run the first blocks, and skip the others until the changes of the stream after them add up to a threshold
    (DiCache).

    While the sum of the relative L1 changes between consecutive steps of the stream after the first `depth` blocks of
    the main stack is below `threshold`, counted since the last computed step, the other blocks do not run. The change
    across the whole stack is then extrapolated from the last two computed ones, as far as the residual of the first
    blocks has advanced (`measured_bases.Aligned`, which clamps the factor to [1, 1.5] as the source does); if there is
    only one, it is reused. The first fraction `retention` of the steps and the last step compute.

    If the first blocks' residual was equal at the last two computed steps, the source divides by zero and continues
    with NaN; here such a step computes. The source leaves its text stream as it enters the stack; here it is
    extrapolated like the image's if a later node reads it. The source's "delta_minus" is not available.

    Needs num_steps (`model.trajectory`). Raises BadParameter for invalid parameters.
    """
    threshold_of("DiCache", threshold)
    whole("DiCache", "depth", depth, 1, MOST_BLOCKS)
    real("DiCache", "retention", retention, lambda r: 0 <= r <= 1, "a fraction of the steps, 0 to 1")
    first = "first_block" if depth == 1 else f"first_{depth}_blocks"
    when = (drift(f"behind_{first}") < threshold) & (step > floor(Rational(str(retention)) * num_steps))
    rule = Rule(when, Forecast(1, Aligned(first), store=store), Where(span="stack"))
    name = title("DiCache", threshold=threshold, depth=depth, retention=retention, lag=lag)
    return Policy((rule,), name, lag=lag, cooldown=1)
