"""Policies that ask what has changed, and those of an error that is estimated by calibrated numbers."""

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
MOST_BLOCKS = 9999  # that a probe may lie behind


def FirstBlockCache(threshold: float = 0.08, warmup: int = 0, max_streak: int | None = None, lag: Lag = 0) -> Policy:
    """Run the first block, and the others only where what it adds to the stream has changed enough.

    ParaAttention's first-block cache, as diffusers' FirstBlockCacheConfig has it: where the relative L1 change of the
    first block's residual since the last step that computed is at most `threshold`, all other blocks of the main stack
    are one span whose cached change of the stream is added; in a model with graph breaks, those of each graph.
    `warmup` steps compute first, and at most `max_streak` in a row reuse. With `lag` 1 the last step's change decides,
    and nothing waits for the device. Raises BadParameter for what is out of range.
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
    """Run the first and the last blocks, and those between only where what the first add has changed enough (DBCache).

    As cache-dit has it: where the relative L1 change of what the first `front` blocks of the main stack add to the
    stream, since the last step that computed, is below `threshold`, the cached change across all but these and the last
    `back` blocks is added. `forecast` is cache-dit's calibrator: instead of adding the cached change it forecasts it,
    by a Forecast or, to order 1, by a basis of that name. `warmup`, `max_streak` and `lag` are as in `FirstBlockCache`.
    Not there: its caps on the sum of changes and on the cached steps in all. Raises BadParameter.
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
    """Reuse the whole stack until the changes of its modulated input, made the output's, have added up (TeaCache).

    `coefficients`, highest power first, are of the polynomial that makes the relative L1 change of the first
    attention's modulated input, from step to step, one of the output; or the name of a model for which the source has
    published them (`published.TEACACHE`); `dit_rewrite.calibrate` finds yours. While their sum since the last computed
    step is below `threshold`, the cached change across the stack is added. The first `warmup` and the last `cooldown`
    steps compute; the latter needs num_steps. Raises BadParameter for what is out of range.
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
    """Reuse or forecast the whole stack until the changes of what is signal in the probe have added up (SeaCache).

    The relative L1 changes, from step to step, of the `probe` behind a Wiener filter of its step's noise; while their
    sum since the last computed step is below `threshold`, the change across the stack is forecast to `order`, 0 being
    reuse. As diffusers has it, whose default probe is the latent; the paper's code has the modulated input, order 0,
    no `max_streak`, and thresholds of 0.2 to 0.6. The power of the signal falls with the square of the frequency in
    images and with the cube in videos, as in the paper's code. A model that is given its latent as tokens, such as
    FLUX, shows no grid to filter it on, and computes. The first `warmup` and the last `cooldown` steps compute. Needs
    to be told num_steps, and the scheduler for the noise. Raises BadParameter for what is out of range.
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
    """Run nothing of the model until the changes of its input, made the output's, have added up (EasyCache).

    The change of the latent from step to step times the rate at which the output followed it between the last two
    computed steps, over the output; while their sum since the last computed step is below `threshold`, the output is
    the latent and the cached difference of the two. Defaults are HunyuanVideo's; Wan2.2 has 0.05 to 0.06 and a warmup
    of 7. Each call of a guidance decides for itself, where in the source the conditional one decides for both. The
    first `warmup` and the last `cooldown` steps compute; the latter needs num_steps. Raises BadParameter.
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
    """Reuse the whole stack while the error that calibrated ratios of magnitudes foretell stays small (MagCache).

    ``ratios[i]`` is by how much the magnitude of the stack's change grows from step i - 1 to step i, or all is the name
    of a model for which the source has published them (`published.MAGCACHE`); `dit_rewrite.calibrate` finds yours.
    Another `num_steps` takes the nearest ones, as the source does. The sum over the steps since the last computed one
    of |1 - the product of the ratios up to there| is at most `threshold`, at most `max_streak` steps in a row reuse,
    and the first share `retention` of the steps computes. Follows from the step alone. Raises BadParameter.
    """
    threshold_of("MagCache", threshold)
    whole("MagCache", "max_streak", max_streak, 1)
    real("MagCache", "retention", retention, lambda r: 0 <= r <= 1, "a share of the steps, 0 to 1")
    known = MAGCACHE.get(ratios) if isinstance(ratios, str) else ratios
    allowed = f"a number above 0 for each of at most {MAX_VALUES} steps, or one of {', '.join(MAGCACHE)}"
    table = numbers("MagCache", "ratios", known, lambda ratio: ratio > 0, allowed)
    if num_steps is not None:
        whole("MagCache", "num_steps", num_steps, 1, MAX_VALUES)
        gaps = max(num_steps - 1, 1)
        table = tuple(table[round(i * (len(table) - 1) / gaps)] for i in range(num_steps))
    first = int(retention * len(table) + 0.5)
    if len(table) * max_streak > MAX_VALUES:
        raise BadParameter("MagCache", "max_streak", max_streak, f"one that is less than {MAX_VALUES} / len(ratios)")
    when = (step >= max(first, 1)) & (accumulated_error(table, max_streak) <= threshold)
    rule = Rule(when, Reuse(store), Where(span="stack"), max_streak=max_streak)
    name = title(
        "MagCache", ratios=ratios, threshold=threshold, max_streak=max_streak, retention=retention, num_steps=num_steps
    )
    return Policy((rule,), name)


def DiCache(
    threshold: float = 0.4, depth: int = 1, retention: float = 0.2, lag: Lag = 0, store: Store = None
) -> Policy:
    """Run the first blocks, and go on from them only once the changes of what they give have added up (DiCache).

    The relative L1 changes, from step to step, of the stream behind the first `depth` blocks of the main stack; while
    their sum since the last computed step is below `threshold`, the other blocks do not run. Instead the change across
    the whole stack is added to its input, the last two computed ones extrapolated by as much as what the first blocks
    add has gone on since (`Aligned`, which clips that to 1 … 1.5 as the source does); of one, it is that. The first
    steps up to the share `retention`, and the last, compute; it needs num_steps.

    Where the first blocks added the same at the last two computed steps the source divides by zero, and goes on with
    NaN; here such a step computes. The source's text stream is left as it enters the stack; here it is had like the
    image's, where anything behind reads it. Its "delta_minus" is not there. Raises BadParameter.
    """
    threshold_of("DiCache", threshold)
    whole("DiCache", "depth", depth, 1, MOST_BLOCKS)
    real("DiCache", "retention", retention, lambda r: 0 <= r <= 1, "a share of the steps, 0 to 1")
    first = "first_block" if depth == 1 else f"first_{depth}_blocks"
    when = (drift(f"behind_{first}") < threshold) & (step > floor(Rational(str(retention)) * num_steps))
    rule = Rule(when, Forecast(1, Aligned(first), store=store), Where(span="stack"))
    name = title("DiCache", threshold=threshold, depth=depth, retention=retention, lag=lag)
    return Policy((rule,), name, lag=lag, cooldown=1)
