"""Policies of the literature, each in a few lines of the language of guards."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Literal

from sympy import Eq, Mod, Ne, Or, Rational, floor
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter, UnknownPolicy
from dit_rewrite.passes.guards import entropy, layer, num_layers, num_steps, progress, similarity, snr, step
from dit_rewrite.plan import Choice, Plan, Window
from dit_rewrite.policy import MadeFor, Policy, Rule
from dit_rewrite.serialise import from_json
from dit_rewrite.strategy import BlockwiseReuse, Reuse, ShareGuidance, Strategy, WindowResidual
from dit_rewrite.where import Where


def Never() -> Policy:
    """Compute everything: the plain compiled model."""
    return Policy((), "Never()")


def FORA(
    interval: int, kinds: tuple[str, ...] = ("attention", "mlp"), anchor: Literal["start", "paper"] = "start"
) -> Policy:
    """Static caching (FORA, section 3.2): compute at every `interval`-th step, reuse in between.

    anchor="start" computes where step % interval == 0. anchor="paper" does what the paper's source does: it counts
    down, and computes at the first step and where t % interval == 0 with t = num_steps - 1 - step; it needs to be
    told num_steps. Raises BadParameter for an interval below 1 or an unknown kind or anchor.
    """
    if not isinstance(interval, int) or interval < 1:
        raise BadParameter("FORA", "interval", interval, "a whole number >= 1")
    if anchor not in ("start", "paper"):
        raise BadParameter("FORA", "anchor", anchor, '"start" or "paper"')
    t = step if anchor == "start" else num_steps - 1 - step
    rule = Rule(when=Ne(Mod(t, interval), 0) & (step > 0), where=Where(tuple(kinds)))
    return Policy((rule,), f"FORA(interval={interval}, kinds={tuple(kinds)}, anchor={anchor!r})")


def DQAR(
    warmup: float = 0.4,
    layer_fraction: float = 0.33,
    snr_threshold: float | None = 0.5,
    order: Literal["linear", "linear_reverse"] = "linear",
    entropy_threshold: float | None = None,
    kinds: tuple[str, ...] = ("attention",),
) -> Policy:
    """Dynamic attention reuse (DQAR, sections 3.3 and 4.8): more and more layers reuse, once the signal is strong.

    Equation 2: at progress p (step / (num_steps - 1)) the first floor((p - warmup) / (1 - warmup) * layer_fraction * L)
    of L layers reuse, none while p < warmup; "linear_reverse" takes the last ones. Equation 4: and where the
    signal-to-noise ratio is above `snr_threshold` (None: not asked). A layer that reuses keeps its last computed
    output. `entropy_threshold` also asks that the mean entropy of the attention's rows, in nats (equation 5 over the
    number of rows), was below it when it was last computed. Needs to be told num_steps, and the scheduler for the SNR.
    Raises BadParameter for what is out of range.
    """
    _within("DQAR", "warmup", warmup, 0 <= warmup < 1, "a share of the steps, 0 <= warmup < 1")
    _within("DQAR", "layer_fraction", layer_fraction, 0 < layer_fraction <= 1, "a share of the layers, 0 < … <= 1")
    for name, threshold in (("snr_threshold", snr_threshold), ("entropy_threshold", entropy_threshold)):
        _within("DQAR", name, threshold, threshold is None or 0 <= threshold < math.inf, "a number >= 0, or None")
    _within("DQAR", "order", order, order in ("linear", "linear_reverse"), '"linear" or "linear_reverse"')
    w, share = Rational(str(warmup)), Rational(str(layer_fraction))
    depth = layer if order == "linear" else num_layers - 1 - layer
    when = (progress >= w) & (depth < floor((progress - w) / (1 - w) * share * num_layers))
    when = when if snr_threshold is None else when & (snr > snr_threshold)
    when = when if entropy_threshold is None else when & (entropy < entropy_threshold)
    rule = Rule(when=when, where=Where(tuple(kinds)))
    return Policy(
        (rule,),
        f"DQAR(warmup={warmup}, layer_fraction={layer_fraction}, snr_threshold={snr_threshold}, order={order!r}, "
        f"entropy_threshold={entropy_threshold}, kinds={tuple(kinds)})",
    )


def FirstBlockCache(
    threshold: float = 0.08, warmup: int = 0, max_streak: int | None = None, lag: Literal[0, 1] = 0
) -> Policy:
    """Run the first block, and the others only where what it adds to the stream has changed enough.

    ParaAttention's first-block cache, as diffusers' FirstBlockCacheConfig has it: where the relative L1 change of the
    first block's residual since the last step that computed is at most `threshold`, all other blocks are one span whose
    cached change of the stream is added. `warmup` steps compute first, and at most `max_streak` in a row reuse. With
    `lag` 1 the last step's change decides, and nothing waits for the device. Raises BadParameter for what is out of
    range.
    """
    _within("FirstBlockCache", "threshold", threshold, 0 <= threshold < math.inf, "a number >= 0")
    where = Where(span="stack", layers=(1, None))
    rule = Rule(when=similarity("first_block") <= threshold, where=where, max_streak=max_streak)
    name = f"FirstBlockCache(threshold={threshold}, warmup={warmup}, max_streak={max_streak}, lag={lag})"
    return Policy((rule,), name, lag=lag, warmup=warmup)


def CachedAttention(
    threshold: float, block: int = 64, bound: Literal["paper", "sound"] = "sound", kinds: tuple[str, ...] = ("cross",)
) -> Policy:
    """Recompute the blocks of keys whose scores may have changed by more than `threshold` (CachedAttention,
    algorithms 1 and 2); `block` keys each.

    For cross-attention, or with kinds=("self",) for models that read condition and image in one sequence.
    bound="paper" is equation 14 as printed, for keys that stay as they are; "sound" a true bound, in units of the
    softmax's exponent. Raises BadParameter for what is out of range.
    """
    rule = Rule(step > 0, BlockwiseReuse(threshold, block, bound), Where(tuple(kinds)))
    return Policy((rule,), f"CachedAttention(threshold={threshold}, block={block}, bound={bound!r}, kinds={kinds})")


def DiTFastAttn(plan: Plan | str | Path) -> Policy:
    """Do at each step, with each attention, what a searched plan says (DiTFastAttn, section 3.5): see search.py.

    `plan` may be a plan's file. The policy refuses another model, and a trajectory of another length. Raises BadPlan.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    strategies = strategies_of(plan.window, plan.conditional)
    rules = []
    for i, site in enumerate(plan.sites):
        for choice, do in strategies.items():
            steps = [s for s, row in enumerate(plan.table) if row[i] is choice]
            if steps:
                when = Eq(num_steps, plan.steps) & _among(steps)
                rules.append(Rule(when, do, Where(names=escape(site))))
    return Policy(tuple(rules), f"DiTFastAttn(delta={plan.delta})", made_for=MadeFor(plan.model, plan.steps))


def strategies_of(window: Window | None, conditional: str | None) -> dict[Choice, Strategy | tuple[Strategy, ...]]:
    """What a plan's choices mean; None where it has none that need it."""
    found: dict[Choice, Strategy | tuple[Strategy, ...]] = {Choice.AST: Reuse()}
    if conditional is not None:
        found[Choice.ASC] = ShareGuidance(conditional)
    if window is not None:
        found[Choice.WA_RS] = WindowResidual(window)
    if conditional is not None and window is not None:
        found[Choice.WA_RS_ASC] = (WindowResidual(window), ShareGuidance(conditional))
    return found


def _among(steps: Sequence[int]) -> Boolean:
    """The step is one of these, which rise; in as few comparisons as there are runs of them."""
    runs = [[first, first] for first in steps[:1]]
    for s in steps[1:]:
        if s == runs[-1][1] + 1:
            runs[-1][1] = s
        else:
            runs.append([s, s])
    return Or(*(Eq(step, a) if a == b else (step >= a) & (step <= b) for a, b in runs))


def _within(policy: str, name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds or isinstance(value, bool):
        raise BadParameter(policy, name, value, allowed)


_POLICIES: dict[str, Callable[..., Policy]] = {
    "never": Never,
    "fora": FORA,
    "dqar": DQAR,
    "first_block_cache": FirstBlockCache,
    "cached_attention": CachedAttention,
    "ditfastattn": DiTFastAttn,
}


def parse(text: str) -> Policy:
    """A policy from text as on a command line: ``never``, ``fora:interval=3,anchor=paper``, ``dqar:snr_threshold=0.5``.

    Several kinds are joined by ``+``: ``fora:interval=3,kinds=self+mlp``. ``ditfastattn:plan=plan.json`` takes a
    plan. A path that ends in ``.json`` is a policy saved with `serialise.to_json`. Raises UnknownPolicy,
    BadParameter, or BadPolicyText for a file that is none.
    """
    name, _, rest = text.partition(":")
    build = _POLICIES.get(name.strip().lower())
    if build is None and text.endswith(".json"):
        return from_json(Path(text).read_text())
    if build is None:
        raise UnknownPolicy(text, sorted(_POLICIES))
    allowed = inspect.signature(build).parameters
    parameters: dict[str, object] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in allowed:
            raise BadParameter(name, key, value, f"name=value with a name among {', '.join(allowed) or 'none'}")
        parameters[key] = tuple(value.split("+")) if key == "kinds" else _literal(value)
    missing = [p.name for p in allowed.values() if p.default is p.empty and p.name not in parameters]
    if missing:
        raise BadParameter(name, missing[0], None, f"{name}:{missing[0]}=…")
    return build(**parameters)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def as_policy(policy: Policy | str) -> Policy:
    """A policy, or the one that a text such as ``"fora:interval=3"`` names."""
    return parse(policy) if isinstance(policy, str) else policy
