"""Policies that compute at regular intervals. Their decisions depend on the step alone."""

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

    anchor="start" computes at steps with step % interval == 0. anchor="paper" follows the paper's source, which counts
    down: it computes at the first step and at steps with t % interval == 0, where t = num_steps - 1 - step; it needs
    num_steps (`model.trajectory`). `store` is the format of cached values, as in `Reuse`. Raises BadParameter for an
    interval below 1 or an unknown kind, anchor or store.
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

    The first `warmup` steps compute, by default `order` steps but at least one; then every `interval`-th step, counted
    from the last warm-up step. The forecast values are the outputs of the branches of `kinds` before their gates, or
    the change of the stream across a `span`. The source uses interval 6, order 1 and warmup 3 for FLUX, and has no
    default for DiT. Raises BadParameter for invalid parameters.
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

    Raises BadParameter for invalid parameters.
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
    """Compute at every `interval`-th step, and forecast in between by an ODE solver (FoCa): see `bases.BDF`.

    The paper does not give the number of warm-up steps; its recursion needs at least two. Raises BadParameter for
    invalid parameters.
    """
    do = Forecast(1, BDF(variant), store=store)
    when = _every("FoCa", interval, warmup)
    name = title("FoCa", interval=interval, warmup=warmup, variant=variant, span=span)
    return Policy((Rule(when, do, Where(kinds, span=span)),), name)


def _every(policy: str, interval: int, warmup: int) -> Boolean:
    """Return the guard that holds except at the first `warmup` steps and every `interval`-th step after the last of
    them."""
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
    """Reuse attention outputs in the middle of the trajectory, with an interval per kind of attention (PAB).

    `spatial`, `temporal` and `cross` are the intervals; None always computes. Self and joint attentions whose names
    match the pattern `temporal_names` are temporal. The source reuses if the timestep, of 1000, is strictly between 100
    and 800. Guards have the progress instead, which is 1 - t / 1000 for evenly spaced timesteps; `window` is the open
    interval of progress in which values are reused. As in the source, steps outside it count for the intervals. The two
    calls of a guidance have separate counters; the source uses one for both. The source also reuses the MLPs of one
    model at certain timesteps, which this policy does not.

    Needs num_steps (`model.trajectory`). Raises BadParameter for invalid parameters.
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
        if name == "temporal":  # else the rule for spatial attention would apply
            rules.append(Rule(true, Compute(), where))
    return Policy(tuple(rules), title("PyramidAttentionBroadcast", **intervals, window=window))


def _window(policy: str, window: object) -> tuple[Rational, Rational]:
    """Return the two fractions of `window` as exact decimals."""
    allowed = "(from, to) with 0 <= from < to <= 1, fractions of the steps"
    found = numbers(policy, "window", window, lambda share: 0 <= share <= 1, allowed)
    if len(found) != 2 or found[0] >= found[1]:
        raise BadParameter(policy, "window", window, allowed)
    return Rational(str(found[0])), Rational(str(found[1]))


def TGate(
    gate_step: int = 10, self_interval: int = 5, warmup: int = 2, late_interval: int = 1, store: Store = None
) -> Policy:
    """Reuse cross-attention from a step on, and self-attention at most steps before it (T-GATE).

    From `gate_step` on, cross-attention reuses its output of the step before. Until then, after `warmup`,
    self-attention computes at every `self_interval`-th step; from `gate_step` on, at every `late_interval`-th. The
    source also ends guidance at the gate: it continues with half of the batch and the mean of both halves'
    cross-attention. This policy keeps the whole batch and guidance, and each half reuses its own output. Raises
    BadParameter for invalid parameters.
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
