"""Policies for attention: DQAR, CachedAttention, tiles of cross-attention, and DiTFastAttn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Literal

from sympy import Eq, Or, Rational, floor
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter, BadPlan
from dit_rewrite.passes.guards.symbols import entropy, layer, num_layers, num_steps, progress, snr, step
from dit_rewrite.policies.checks import one_of, real, title
from dit_rewrite.policy.plan import Choice, Grid, Plan, Window
from dit_rewrite.policy.rules import MadeFor, Policy, Rule
from dit_rewrite.policy.strategies import (
    BlockwiseReuse,
    Reuse,
    ReuseKV,
    ReuseTiles,
    ShareGuidance,
    Store,
    Strategy,
    WindowResidual,
)
from dit_rewrite.policy.where import Where


def DQAR(
    warmup: float = 0.4,
    layer_fraction: float = 0.33,
    snr_threshold: float | None = 0.5,
    order: Literal["linear", "linear_reverse"] = "linear",
    entropy_threshold: float | None = None,
    kinds: tuple[str, ...] = ("attention",),
    cache: Literal["output", "kv"] = "output",
    store: Store = None,
    rounding: Literal["equation", "paper"] = "equation",
) -> Policy:
    """Dynamic attention reuse (DQAR, sections 3.3 and 4.8): more layers reuse as the trajectory progresses, if the
    signal is strong enough.

    Equation 2: at progress p = step / (num_steps - 1) >= warmup, the first floor((p - warmup) / (1 - warmup) *
    layer_fraction * L) of L layers reuse their last computed output. "linear_reverse" takes the last layers instead.
    Equation 4: the signal-to-noise ratio must also exceed `snr_threshold` (None: no condition). `entropy_threshold`
    adds the condition that the mean entropy of the attention's rows (equation 5, in nats, divided by the number of
    rows) was below it when the attention was last computed.

    cache="kv" caches keys and values instead of the output; section 3.1 finds that worse (table 2). `store` is the
    format of cached values, as in `Reuse`. rounding="paper" also rounds layer_fraction * L down, as in the numbers of
    the paper's tables (benchmarks/dqar_tables.py).

    Needs num_steps, and a scheduler for the SNR (`model.trajectory`). Raises BadParameter for invalid parameters.
    """
    real("DQAR", "warmup", warmup, lambda w: 0 <= w < 1, "a fraction of the steps, 0 <= warmup < 1")
    real("DQAR", "layer_fraction", layer_fraction, lambda f: 0 < f <= 1, "a fraction of the layers, 0 < … <= 1")
    for name, threshold in (("snr_threshold", snr_threshold), ("entropy_threshold", entropy_threshold)):
        if threshold is not None:
            real("DQAR", name, threshold, lambda t: 0 <= t < math.inf, "a number >= 0, or None")
    one_of("DQAR", "order", order, ("linear", "linear_reverse"))
    one_of("DQAR", "cache", cache, ("output", "kv"))
    one_of("DQAR", "rounding", rounding, ("equation", "paper"))
    where = Where(kinds)
    w, share = Rational(str(warmup)), Rational(str(layer_fraction))
    depth = layer if order == "linear" else num_layers - 1 - layer
    most = share * num_layers if rounding == "equation" else floor(share * num_layers)
    when = (progress >= w) & (depth < floor((progress - w) / (1 - w) * most))
    when = when if snr_threshold is None else when & (snr > snr_threshold)
    when = when if entropy_threshold is None else when & (entropy < entropy_threshold)
    do = Reuse(store) if cache == "output" else ReuseKV(store)
    name = title(
        "DQAR",
        warmup=warmup,
        layer_fraction=layer_fraction,
        snr_threshold=snr_threshold,
        order=order,
        entropy_threshold=entropy_threshold,
        kinds=where.kinds,
        **{n: v for n, v, usual in (("cache", cache, "output"), ("store", store, None)) if v != usual},
        **({} if rounding == "equation" else {"rounding": rounding}),
    )
    return Policy((Rule(when, do, where),), name)


def CachedAttention(
    threshold: float,
    block: int | None = None,
    bound: Literal["paper", "sound"] = "sound",
    kinds: tuple[str, ...] = ("cross",),
    certify: bool = False,
    keys: Literal["all", "condition"] = "all",
) -> Policy:
    """Recompute attention for the blocks of `block` keys whose scores may have changed by more than `threshold`
    (CachedAttention, algorithms 1 and 2). With block=None the block is chosen by shape, see `BlockwiseReuse`.

    It applies to cross-attention. For models that read condition and image in one sequence, give keys="condition" and
    kinds=("joint", "parallel") or ("self",): then only the condition's keys are reused, and the image's are recomputed.
    bound="paper" is equation 14 as printed, for constant keys; "sound" is a true upper bound. `threshold` is in units
    of the softmax's exponent.

    certify=True bounds the error of the output of each attention at each step, for either `bound`;
    `stats().certificates` has the numbers. They do not bound the error of the image, see `BlockwiseReuse`. Raises
    BadParameter for invalid parameters.
    """
    rule = Rule(step > 0, BlockwiseReuse(threshold, block, bound, certify, keys), Where(kinds))
    given: dict[str, object] = {"threshold": threshold, "block": block, "bound": bound, "kinds": rule.where.kinds}
    others = (("certify", certify, False), ("keys", keys, "all"))
    given |= {name: value for name, value, usual in others if value != usual}
    return Policy((rule,), title("CachedAttention", **given))


def TileReuse(
    refresh: float = 0.25,
    tile: int = 128,
    order: Literal["turns", "change"] = "turns",
    kinds: tuple[str, ...] = ("cross",),
) -> Policy:
    """Recompute a share `refresh` of the tiles of tokens of each cross-attention in every step, and reuse the others.

    The whole branch is computed for the chosen tokens, with its projections, and the choice does not need the queries.
    Tiles have at most `tile` tokens. They take turns, or with order="change", those that are expected to have changed
    most are recomputed. Other `kinds` are possible where tokens do not depend on one another, such as "mlp"; others are
    refused. See `ReuseTiles`. Raises BadParameter for invalid parameters.
    """
    rule = Rule(step > 0, ReuseTiles(refresh, tile, order), Where(kinds))
    return Policy((rule,), title("TileReuse", refresh=refresh, tile=tile, order=order, kinds=rule.where.kinds))


def DiTFastAttn(plan: Plan | str | Path) -> Policy:
    """Follow a searched plan, which has a choice for each step and attention (DiTFastAttn, section 3.5).

    `plan` may be the path of a saved plan. The policy refuses other models and numbers of steps. Raises BadPlan for an
    invalid file, BadParameter for another type.
    """
    plan = plan if isinstance(plan, Plan) else _load(plan)
    strategies = strategies_of(plan.window, plan.conditional, plan.grid)
    rules = []
    for i, (stream, site) in enumerate(plan.columns):
        where = Where(names=escape(site), streams=None if stream is None else (stream,))
        for choice, do in strategies.items():
            steps = [s for s, row in enumerate(plan.table) if row[i] is choice]
            if steps:
                when = Eq(num_steps, plan.steps) & _among(steps)
                rules.append(Rule(when, do, where))
    by = "" if plan.metric == "relative_error" else f", metric={plan.metric}"
    return Policy(tuple(rules), f"DiTFastAttn(delta={plan.delta}{by})", made_for=MadeFor(plan.model, plan.steps))


def strategies_of(
    window: Window | None, conditional: str | None, grid: Grid | None = None
) -> dict[Choice, Strategy | tuple[Strategy, ...]]:
    """Return the strategies of a plan's choices; `window` and `conditional` are None if no choice needs them."""
    found: dict[Choice, Strategy | tuple[Strategy, ...]] = {Choice.AST: Reuse()}
    if conditional is not None:
        found[Choice.ASC] = ShareGuidance(conditional)
    if window is not None:
        found[Choice.WA_RS] = WindowResidual(window, grid)
    if conditional is not None and window is not None:
        found[Choice.WA_RS_ASC] = (WindowResidual(window, grid), ShareGuidance(conditional))
    return found


def _among(steps: Sequence[int]) -> Boolean:
    """Return the guard that holds at `steps`, which ascend; it has one comparison per run of consecutive steps."""
    runs = [[first, first] for first in steps[:1]]
    for s in steps[1:]:
        if s == runs[-1][1] + 1:
            runs[-1][1] = s
        else:
            runs.append([s, s])
    return Or(*(Eq(step, a) if a == b else (step >= a) & (step <= b) for a, b in runs))


def _load(path: str | Path) -> Plan:
    if not isinstance(path, str | Path):
        raise BadParameter("DiTFastAttn", "plan", path, "a Plan, or the path of its file")
    try:
        return Plan.load(path)
    except OSError as error:
        raise BadPlan(path, f"it cannot be read ({error.strerror or error})") from error
