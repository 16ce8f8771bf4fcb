"""Policies of the literature, each in a few lines of the language of guards."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any, Literal

from sympy import Eq, Mod, Ne, Or, Rational, floor
from sympy.logic.boolalg import Boolean
from torch import nn

from dit_rewrite.errors import BadParameter, BadPlan, BadPolicyText, NotAPolicy, UnknownPolicy
from dit_rewrite.passes.guards import entropy, layer, num_layers, num_steps, progress, similarity, snr, step
from dit_rewrite.plan import Choice, Grid, Plan, Window, is_whole
from dit_rewrite.policy import MadeFor, Policy, Rule
from dit_rewrite.serialise import from_json
from dit_rewrite.strategy import BlockwiseReuse, Reuse, ShareGuidance, Strategy, WindowResidual, is_number
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
    if not is_whole(interval, 1):
        raise BadParameter("FORA", "interval", interval, "a whole number >= 1")
    _one_of("FORA", "anchor", anchor, ("start", "paper"))
    where = Where(kinds)
    t = step if anchor == "start" else num_steps - 1 - step
    rule = Rule(when=Ne(Mod(t, interval), 0) & (step > 0), where=where)
    return Policy((rule,), f"FORA(interval={interval}, kinds={where.kinds}, anchor={anchor!r})")


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
    _real("DQAR", "warmup", warmup, lambda w: 0 <= w < 1, "a share of the steps, 0 <= warmup < 1")
    _real("DQAR", "layer_fraction", layer_fraction, lambda f: 0 < f <= 1, "a share of the layers, 0 < … <= 1")
    for name, threshold in (("snr_threshold", snr_threshold), ("entropy_threshold", entropy_threshold)):
        if threshold is not None:
            _real("DQAR", name, threshold, lambda t: 0 <= t < math.inf, "a number >= 0, or None")
    _one_of("DQAR", "order", order, ("linear", "linear_reverse"))
    where = Where(kinds)
    w, share = Rational(str(warmup)), Rational(str(layer_fraction))
    depth = layer if order == "linear" else num_layers - 1 - layer
    when = (progress >= w) & (depth < floor((progress - w) / (1 - w) * share * num_layers))
    when = when if snr_threshold is None else when & (snr > snr_threshold)
    when = when if entropy_threshold is None else when & (entropy < entropy_threshold)
    return Policy(
        (Rule(when=when, where=where),),
        f"DQAR(warmup={warmup}, layer_fraction={layer_fraction}, snr_threshold={snr_threshold}, order={order!r}, "
        f"entropy_threshold={entropy_threshold}, kinds={where.kinds})",
    )


def FirstBlockCache(
    threshold: float = 0.08, warmup: int = 0, max_streak: int | None = None, lag: Literal[0, 1] = 0
) -> Policy:
    """Run the first block, and the others only where what it adds to the stream has changed enough.

    ParaAttention's first-block cache, as diffusers' FirstBlockCacheConfig has it: where the relative L1 change of the
    first block's residual since the last step that computed is at most `threshold`, all other blocks of the main stack
    are one span whose cached change of the stream is added; in a model with graph breaks, those of each graph.
    `warmup` steps compute first, and at most `max_streak` in a row reuse. With `lag` 1 the last step's change decides,
    and nothing waits for the device. Raises BadParameter for what is out of range.
    """
    _real("FirstBlockCache", "threshold", threshold, lambda t: 0 <= t < math.inf, "a number >= 0")
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
    rule = Rule(step > 0, BlockwiseReuse(threshold, block, bound), Where(kinds))
    name = f"CachedAttention(threshold={threshold}, block={block}, bound={bound!r}, kinds={rule.where.kinds})"
    return Policy((rule,), name)


def DiTFastAttn(plan: Plan | str | Path) -> Policy:
    """Do at each step, with each attention, what a searched plan says (DiTFastAttn, section 3.5): see search.py.

    `plan` may be a plan's file. The policy refuses another model, and a trajectory of another length. Raises BadPlan.
    """
    plan = plan if isinstance(plan, Plan) else _load(plan)
    strategies = strategies_of(plan.window, plan.conditional, plan.grid)
    rules = []
    for i, site in enumerate(plan.sites):
        for choice, do in strategies.items():
            steps = [s for s, row in enumerate(plan.table) if row[i] is choice]
            if steps:
                when = Eq(num_steps, plan.steps) & _among(steps)
                rules.append(Rule(when, do, Where(names=escape(site))))
    return Policy(tuple(rules), f"DiTFastAttn(delta={plan.delta})", made_for=MadeFor(plan.model, plan.steps))


def strategies_of(
    window: Window | None, conditional: str | None, grid: Grid | None = None
) -> dict[Choice, Strategy | tuple[Strategy, ...]]:
    """What a plan's choices mean; `window` and `conditional` are None where it has none that need it."""
    found: dict[Choice, Strategy | tuple[Strategy, ...]] = {Choice.AST: Reuse()}
    if conditional is not None:
        found[Choice.ASC] = ShareGuidance(conditional)
    if window is not None:
        found[Choice.WA_RS] = WindowResidual(window, grid)
    if conditional is not None and window is not None:
        found[Choice.WA_RS_ASC] = (WindowResidual(window, grid), ShareGuidance(conditional))
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


def _load(path: str | Path) -> Plan:
    if not isinstance(path, str | Path):
        raise BadParameter("DiTFastAttn", "plan", path, "a Plan, or the path of its file")
    try:
        return Plan.load(path)
    except OSError as error:
        raise BadPlan(path, f"it cannot be read ({error.strerror or error})") from error


def _real(policy: str, name: str, value: object, fits: Callable[[Any], bool], allowed: str) -> None:
    """Raise BadParameter unless `value` is a number that `fits`; NaN fits nothing, and True is no number."""
    if not is_number(value) or not fits(value):
        raise BadParameter(policy, name, value, allowed)


def _one_of(policy: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise BadParameter(policy, name, value, " or ".join(f'"{word}"' for word in allowed))


_POLICIES: dict[str, Callable[..., Policy]] = {
    "never": Never,
    "fora": FORA,
    "dqar": DQAR,
    "first_block_cache": FirstBlockCache,
    "cached_attention": CachedAttention,
    "ditfastattn": DiTFastAttn,
}


def as_policy(given: Policy | str | Path) -> Policy:
    """A policy as it is, or the one that text or the path of a saved policy names (see `parse`).

    Raises NotAPolicy, with what to give, for anything else.
    """
    if isinstance(given, Policy):
        return given
    if isinstance(given, str | Path):
        return parse(str(given))
    raise NotAPolicy(type(given).__name__, _remedy(given))


def _remedy(given: object) -> str:
    """How to make a policy of what was given in the place of one."""
    if callable(given) and not isinstance(given, nn.Module):
        name = getattr(given, "__name__", "FORA")
        return f"Call it: `{name}(interval=3)`" if given is FORA else f"Call it with its parameters: `{name}(…)`"
    if isinstance(given, nn.Module):
        return "Give the model first, and then the policy"
    if isinstance(given, Rule):
        return "Put the rule into a policy: `Policy((rule,))`"
    if isinstance(given, Sequence) and given and all(isinstance(item, Rule) for item in given):
        return "Put the rules into a policy: `Policy(tuple(rules))`"
    if isinstance(given, Plan):
        return "Make a policy of the plan: `policies.DiTFastAttn(plan)`"
    return "Give one of dit_rewrite.policies, such as `FORA(interval=3)`, or its text, such as `fora:interval=3`"


def parse(text: str) -> Policy:
    """A policy from text as on a command line: ``never``, ``fora:interval=3,anchor=paper``, ``dqar:snr_threshold=0.5``.

    Several kinds are joined by ``+``: ``fora:interval=3,kinds=self+mlp``. ``ditfastattn:plan=plan.json`` takes a
    plan. A path that ends in ``.json`` is a policy saved with `serialise.to_json`. Raises UnknownPolicy,
    BadParameter, BadPlan for a plan that cannot be used, or BadPolicyText for a file that is no policy.
    """
    name, _, rest = text.partition(":")
    build = _POLICIES.get(name.strip().lower())
    if build is None and text.endswith(".json"):
        return _saved(text)
    if build is None:
        raise UnknownPolicy(text, sorted(_POLICIES))
    allowed = inspect.signature(build).parameters
    parameters: dict[str, object] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in allowed:
            raise BadParameter(name, key, value, f"name=value with a name among {', '.join(allowed) or 'none'}")
        if key in parameters:
            raise BadParameter(name, key, value, "one value: it is given twice")
        parameters[key] = _value(key, value)
    missing = [p.name for p in allowed.values() if p.default is p.empty and p.name not in parameters]
    if missing:
        raise BadParameter(name, missing[0], None, f"{name}:{missing[0]}=…")
    return build(**parameters)


def _saved(path: str) -> Policy:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no file, no path, or no text
        raise BadPolicyText(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return from_json(text)


def _value(key: str, text: str) -> object:
    """What the text of a parameter stands for: a number, None, or the text itself."""
    if key == "kinds":
        return tuple(kind.strip() for kind in text.split("+"))
    if key == "plan":
        return text
    for read in (ast.literal_eval, float):  # float also knows inf and nan
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text
