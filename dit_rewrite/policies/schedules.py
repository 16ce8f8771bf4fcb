"""Policies that follow a schedule: a table of the steps that compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sympy import Rational
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.guards.symbols import step
from dit_rewrite.passes.guards.tables import MAX_VALUES, table
from dit_rewrite.policies.checks import numbers, one_of, real, reuse_or_forecast, title, whole
from dit_rewrite.policies.published import MEANCACHE
from dit_rewrite.policy.bases import Basis, Chebyshev
from dit_rewrite.policy.plan import is_whole
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import LONGEST, MOST, Forecast, Store
from dit_rewrite.policy.where import Where


def Spectrum(
    window: float = 2.0,
    growth: float = 0.75,
    degree: int = 4,
    ridge: float = 0.1,
    blend: float = 0.5,
    warmup: int = 5,
    steps: int = 50,
    history: int | None = None,
    span: Literal["stack", "output"] = "stack",
    store: Store = None,
) -> Policy:
    """Compute at growing intervals, and forecast by Chebyshev polynomials that are fitted to all computed values
    (Spectrum).

    The first `warmup` steps compute; then one step in `window`, which grows by `growth` after each computed step. Steps
    after the first `steps` compute. `history` is the number of computed values that are kept, by default all, as in the
    source. Differences from the source: it forecasts the stream after the last block, while this policy forecasts the
    change across the stack; and it maps steps 0 to 50 to the domain of the polynomials for any number of steps, while
    this policy maps steps 0 to `steps`. Raises BadParameter for invalid parameters.
    """
    real("Spectrum", "window", window, lambda w: 1 <= w <= MAX_VALUES, f"a number from 1 to {MAX_VALUES}")
    real("Spectrum", "growth", growth, lambda g: 0 <= g <= MAX_VALUES, f"a number from 0 to {MAX_VALUES}")
    whole("Spectrum", "warmup", warmup, 1)
    whole("Spectrum", "steps", steps, 1, MAX_VALUES)
    whole("Spectrum", "degree", degree, 1, MOST)
    one_of("Spectrum", "span", span, ("stack", "output"))
    mask = _ever_fewer(float(window), growth, warmup, steps)
    basis = Chebyshev(ridge, blend, domain=(0, steps))
    do = Forecast(degree, basis, min(sum(mask), LONGEST) if history is None else history, store=store)
    name = title("Spectrum", window=window, growth=growth, degree=degree, blend=blend, warmup=warmup, steps=steps)
    return Policy((Rule(_reused(mask), do, Where(span=span)),), name)


def _ever_fewer(window: float, growth: float, warmup: int, steps: int) -> list[bool]:
    """Return for each step whether Spectrum's growing window computes it."""
    mask: list[bool] = []
    reused = 0  # consecutive steps
    for i in range(steps):
        mask.append(i < warmup or (reused + 1) % int(window) == 0)
        if mask[i] and i >= warmup:
            window = round(window + growth, 3)
        reused = 0 if mask[i] else reused + 1
    return mask


def StepMask(
    mask: str | Sequence[int] | None = None,
    computed: Sequence[int] | None = None,
    num_steps: int | None = None,
    order: int = 0,
    basis: str | Basis = "taylor",
    span: Literal["block", "stack", "output"] | None = "output",
    kinds: tuple[str, ...] = ("attention", "mlp"),
    store: Store = None,
) -> Policy:
    """Compute at the steps of a mask, and reuse at the others, or forecast if `order` is above 0.

    `mask` has a 1 for each step that computes and a 0 for each other, as text ("1101") or as numbers. Alternatively
    give the `computed` steps, of `num_steps` (by default up to the last computed one). The first step must compute;
    steps after the end of the mask compute. Raises BadParameter for invalid parameters.
    """
    computes = _mask("StepMask", mask, computed, num_steps)
    do = reuse_or_forecast("StepMask", order, basis, store)
    name = title("StepMask", mask="".join("01"[c] for c in computes), order=order, span=span)
    return Policy((Rule(_reused(computes), do, Where(kinds, span=span)),), name)


def MeanCache(
    plan: str | Sequence[int],
    num_steps: int | None = 50,
    order: int = 0,
    span: Literal["stack", "output"] = "output",
    store: Store = None,
) -> Policy:
    """Compute at the steps of a plan, and reuse the output at the others (MeanCache).

    `plan` has the steps that compute, or is the name of a published plan of 50 steps (`published.MEANCACHE`). The
    source corrects the reused output by a Jacobian-vector product along the last 1 to 6 velocities, which is not
    available here. Order 0 is its span of 1; a higher `order` extrapolates instead. Raises BadParameter for invalid
    parameters.
    """
    steps = MEANCACHE.get(plan) if isinstance(plan, str) else plan
    if steps is None:
        raise BadParameter("MeanCache", "plan", plan, f"the steps that compute, or one of {', '.join(MEANCACHE)}")
    computes = _computed("MeanCache", "plan", steps, num_steps)
    one_of("MeanCache", "span", span, ("stack", "output"))
    do = reuse_or_forecast("MeanCache", order, "taylor", store)
    name = title("MeanCache", plan=plan, num_steps=num_steps, order=order, span=span)
    return Policy((Rule(_reused(computes), do, Where(span=span)),), name)


def DPCache(
    plan: Sequence[int],
    num_steps: int | None = None,
    order: int = 2,
    span: Literal["stack", "output"] = "stack",
    store: Store = None,
) -> Policy:
    """Compute at the steps of a plan, and forecast the change across the stack at the others (DPCache).

    `plan` has the steps that compute. The source finds them by dynamic programming on one run, and always includes the
    first three steps and the last. It forecasts the stream after the last block; this policy forecasts the change
    across the stack. Raises BadParameter for invalid parameters.
    """
    computes = _computed("DPCache", "plan", plan, num_steps)
    one_of("DPCache", "span", span, ("stack", "output"))
    do = reuse_or_forecast("DPCache", order, "taylorseer", store)
    name = title("DPCache", plan=tuple(plan), num_steps=num_steps, order=order, span=span)
    return Policy((Rule(_reused(computes), do, Where(span=span)),), name)


def _mask(policy: str, mask: object, computed: object, num_steps: int | None) -> tuple[bool, ...]:
    """Return for each step whether it computes, from either `mask` or the list `computed`."""
    if (mask is None) == (computed is None):
        raise BadParameter(policy, "mask", mask, "the only one of `mask` and `computed`")
    if mask is None:
        return _computed(policy, "computed", computed, num_steps)
    if num_steps is not None:
        raise BadParameter(policy, "num_steps", num_steps, "None with a mask, whose length is the number of steps")
    allowed = f"a 1 for each step that computes and a 0 for each other, the first a 1, at most {MAX_VALUES}"
    signs = list(mask) if isinstance(mask, Sequence) and not isinstance(mask, bytes) else []
    given = [{"0": 0, "1": 1}.get(s, -1) if isinstance(s, str) else s + 0 if isinstance(s, bool) else s for s in signs]
    found = numbers(policy, "mask", given, lambda x: x in (0, 1), allowed)
    if not found[0] or len(found) > MAX_VALUES:
        raise BadParameter(policy, "mask", mask, allowed)
    return tuple(map(bool, found))


def _computed(policy: str, name: str, computed: object, num_steps: int | None) -> tuple[bool, ...]:
    """Return for each step whether it computes, from the list `computed`."""
    if num_steps is not None:
        whole(policy, "num_steps", num_steps, 1, MAX_VALUES)
    end = MAX_VALUES if num_steps is None else num_steps
    steps = list(computed) if isinstance(computed, Sequence) else []
    rising = all(is_whole(s, 0) for s in steps) and steps == sorted(set(steps))
    if not steps or not rising or steps[0] != 0 or steps[-1] >= end:
        raise BadParameter(
            policy, name, computed, f"the steps that compute: ascending whole numbers from 0, below {end}"
        )
    among = set(steps)
    return tuple(s in among for s in range(steps[-1] + 1 if num_steps is None else num_steps))


def _reused(computes: Sequence[bool]) -> Boolean:
    """Return the guard that holds at the steps of the table that do not compute."""
    return table([float(not computed) for computed in computes], step) > Rational(1, 2)
