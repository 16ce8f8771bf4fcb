"""Policies that compute at regular intervals: their decisions are known before a run."""

from __future__ import annotations

from typing import Literal

from sympy import Mod, Ne, Rational, true
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.guards.symbols import num_steps as total
from dit_rewrite.passes.guards.symbols import progress, step
from dit_rewrite.policies.checks import numbers, one_of, title, whole
from dit_rewrite.policy.bases import BDF, Basis, Hermite
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Compute, Forecast, Reuse, Store
from dit_rewrite.policy.where import Where

BRANCHES = ("attention", "mlp")
SpanName = Literal["block", "stack", "output"] | None


def Never() -> Policy:
    """Compute everything: the plain compiled model."""
    return Policy((), "Never()")


def FORA(
    interval: int,
    kinds: tuple[str, ...] = BRANCHES,
    anchor: Literal["start", "paper"] = "start",
    store: Store = None,
) -> Policy:
    """Static caching (FORA, section 3.2): compute at every `interval`-th step, reuse in between.

    anchor="start" computes where step % interval == 0. anchor="paper" does what the paper's source does: it counts
    down, and computes at the first step and where t % interval == 0 with t = num_steps - 1 - step; it needs to be
    told num_steps. `store` is what the cache holds, as in `Reuse`. Raises BadParameter for an interval below 1 or an
    unknown kind, anchor or store.
    """
    whole("FORA", "interval", interval, 1)
    one_of("FORA", "anchor", anchor, ("start", "paper"))
    where = Where(kinds)
    t = step if anchor == "start" else total - 1 - step
    rule = Rule(Ne(Mod(t, interval), 0) & (step > 0), Reuse(store), where)
    named = {} if store is None else {"store": store}
    return Policy((rule,), title("FORA", interval=interval, kinds=where.kinds, anchor=anchor, **named))


def TaylorSeer(
    interval: int,
    order: int = 1,
    warmup: int | None = None,
    kinds: tuple[str, ...] = BRANCHES,
    span: SpanName = None,
    store: Store = None,
    basis: str | Basis = "taylorseer",
) -> Policy:
    """Compute at every `interval`-th step, and forecast in between by differences (TaylorSeer, equation 3).

    The first `warmup` steps compute, by default as many as the order, and at least one; then every `interval`-th,
    counted from the last of these. What is forecast is each branch of `kinds`, with this step's gates, or the change
    across a `span`. The source has interval 6, order 1 and warmup 3 for FLUX, and no default for DiT.
    Raises BadParameter for what is out of range.
    """
    do = Forecast(order, basis, store=store)
    warmup = max(1, order) if warmup is None else warmup
    when = _every("TaylorSeer", interval, warmup)
    name = title("TaylorSeer", interval=interval, order=order, warmup=warmup, span=span, basis=basis)
    return Policy((Rule(when, do, Where(kinds, span=span)),), name)


def HiCache(
    interval: int,
    order: int = 2,
    scale: float = 0.5,
    warmup: int = 3,
    kinds: tuple[str, ...] = BRANCHES,
    span: SpanName = None,
    store: Store = None,
) -> Policy:
    """TaylorSeer's steps and differences, weighted by scaled Hermite polynomials (HiCache): see `bases.Hermite`.

    Raises BadParameter for what is out of range.
    """
    do = Forecast(order, Hermite(scale), store=store)
    when = _every("HiCache", interval, warmup)
    name = title("HiCache", interval=interval, order=order, scale=scale, warmup=warmup, span=span)
    return Policy((Rule(when, do, Where(kinds, span=span)),), name)


def FoCa(
    interval: int,
    warmup: int = 2,
    variant: Literal["paper", "cache-dit"] = "paper",
    kinds: tuple[str, ...] = BRANCHES,
    span: SpanName = None,
    store: Store = None,
) -> Policy:
    """Compute at every `interval`-th step, and solve from forecast to forecast in between (FoCa): see `bases.BDF`.

    The paper does not say how many steps compute first; two are the least that its recursion starts from.
    Raises BadParameter for what is out of range.
    """
    do = Forecast(1, BDF(variant), store=store)
    when = _every("FoCa", interval, warmup)
    name = title("FoCa", interval=interval, warmup=warmup, variant=variant, span=span)
    return Policy((Rule(when, do, Where(kinds, span=span)),), name)


def _every(policy: str, interval: int, warmup: int) -> Boolean:
    """All steps but the first `warmup`, and every `interval`-th from the last of these on."""
    whole(policy, "interval", interval, 1)
    whole(policy, "warmup", warmup, 1)
    return (step >= warmup) & Ne(Mod(step - warmup + 1, interval), 0)


def PyramidAttentionBroadcast(
    spatial: int | None = 2,
    temporal: int | None = None,
    cross: int | None = None,
    window: tuple[float, float] = (0.2, 0.9),
    temporal_names: str = "*temp*",
    store: Store = None,
) -> Policy:
    """Reuse attention outputs in the middle of the trajectory, each kind of attention at its own interval (PAB).

    `spatial`, `temporal` and `cross` are the intervals, None for an attention that always computes. A self or joint
    attention whose name fits the pattern `temporal_names` is temporal. The source reuses where the timestep, of 1000,
    is strictly between 100 and 800; guards have the progress instead, which of evenly spaced timesteps is
    1 - t / 1000: `window` is where it lies strictly between two shares. Steps outside are counted too, as in the
    source; both calls of a guidance have their own counters, which the source lets share one. The MLPs that one of its
    models reuses at certain timesteps are not reused. Needs to be told num_steps. Raises BadParameter.
    """
    intervals = {"spatial": spatial, "temporal": temporal, "cross": cross}
    for name, interval in intervals.items():
        if interval is not None:
            whole("PyramidAttentionBroadcast", name, interval, 1)
    low, high = _window("PyramidAttentionBroadcast", window)
    inside = (progress > low) & (progress < high)
    tokens = Where(("self", "joint"))
    places = {"cross": Where(("cross",)), "temporal": Where(("self", "joint"), names=temporal_names), "spatial": tokens}
    rules = []
    for name, where in places.items():
        interval = intervals[name]
        if interval is not None:
            rules.append(Rule(inside & Ne(Mod(step, interval), 0), Reuse(store), where))
        if name == "temporal":  # whatever the rule for spatial attention says of these
            rules.append(Rule(true, Compute(), where))
    return Policy(tuple(rules), title("PyramidAttentionBroadcast", **intervals, window=window))


def _window(policy: str, window: object) -> tuple[Rational, Rational]:
    """Two shares, exactly as they are written."""
    allowed = "(from, to) with 0 <= from < to <= 1, shares of the steps"
    found = numbers(policy, "window", window, lambda share: 0 <= share <= 1, allowed)
    if len(found) != 2 or found[0] >= found[1]:
        raise BadParameter(policy, "window", window, allowed)
    return Rational(str(found[0])), Rational(str(found[1]))


def TGate(
    gate_step: int = 10, self_interval: int = 5, warmup: int = 2, late_interval: int = 1, store: Store = None
) -> Policy:
    """Cross-attention until a step, and self-attention rarely before it (T-GATE).

    From `gate_step` on cross-attention is what it was one step before. Before that, behind the `warmup`, self-attention
    computes at every `self_interval`-th step; afterwards at every `late_interval`-th. The source also ends guidance at
    the gate: it goes on without it, on half of the batch, with the mean of both halves' cross-attention. Here the batch
    stays whole, each half keeps its own, and guidance is not dropped. Raises BadParameter for what is out of range.
    """
    whole("TGate", "gate_step", gate_step, 1)
    whole("TGate", "self_interval", self_interval, 1)
    whole("TGate", "warmup", warmup, 0)
    whole("TGate", "late_interval", late_interval, 1)
    early = (step > warmup) & (step < gate_step - 1) & Ne(Mod(step, self_interval), 0)
    late = (step >= gate_step) & Ne(Mod(step, late_interval), 0)
    rules = (
        Rule(step >= gate_step, Reuse(store), Where(("cross",))),
        Rule(early | late, Reuse(store), Where(("self",))),
    )
    name = title("TGate", gate_step=gate_step, self_interval=self_interval, warmup=warmup, late_interval=late_interval)
    return Policy(rules, name)
