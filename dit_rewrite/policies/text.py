"""Parse policies from text, and accept text or a path as an argument that takes a policy."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from dit_rewrite.errors import BadParameter, BadPolicyFile, NotAPolicy, UnknownPolicy
from dit_rewrite.policies.attention import DQAR, CachedAttention, DiTFastAttn, TileReuse
from dit_rewrite.policies.guidance import CFGGate
from dit_rewrite.policies.measured import (
    DiCache,
    DualBlockCache,
    EasyCache,
    FirstBlockCache,
    MagCache,
    SeaCache,
    TeaCache,
)
from dit_rewrite.policies.schedules import DPCache, MeanCache, Spectrum, StepMask
from dit_rewrite.policies.static import FORA, FoCa, HiCache, Never, PyramidAttentionBroadcast, TaylorSeer, TGate
from dit_rewrite.policies.verified import SpeCa
from dit_rewrite.policy.plan import Plan
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.serialise import from_json

_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside parentheses
_POLICIES: dict[str, Callable[..., Policy]] = {
    "never": Never,
    "fora": FORA,
    "dqar": DQAR,
    "first_block_cache": FirstBlockCache,
    "cfg_gate": CFGGate,
    "cached_attention": CachedAttention,
    "ditfastattn": DiTFastAttn,
    "dicache": DiCache,
    "dpcache": DPCache,
    "dual_block_cache": DualBlockCache,
    "easycache": EasyCache,
    "foca": FoCa,
    "hicache": HiCache,
    "magcache": MagCache,
    "meancache": MeanCache,
    "pyramid_attention_broadcast": PyramidAttentionBroadcast,
    "seacache": SeaCache,
    "speca": SpeCa,
    "spectrum": Spectrum,
    "step_mask": StepMask,
    "taylorseer": TaylorSeer,
    "teacache": TeaCache,
    "tgate": TGate,
    "tile_reuse": TileReuse,
}


def as_policy(given: Policy | str | Path) -> Policy:
    """Return a policy unchanged, or parse the text or the path of a saved policy (see `parse`).

    Raises NotAPolicy for other types. Its message says how to make a policy of the argument.
    """
    if isinstance(given, Policy):
        return given
    if isinstance(given, str | Path):
        return parse(str(given))
    raise NotAPolicy(type(given).__name__, _remedy(given))


def _remedy(given: object) -> str:
    """Return how to make a policy of an argument that is not one."""
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
    """Parse a policy as on the command line: ``never``, ``fora:interval=3,anchor=paper``, ``dqar:snr_threshold=0.5``.

    Join kinds by ``+``: ``fora:interval=3,kinds=self+mlp``. Put sequences in parentheses: ``dpcache:plan=(0,1,2,6)``.
    ``ditfastattn:plan=plan.json`` reads a plan. A path that ends in ``.json`` reads a policy that was saved with
    `serialise.to_json`. Raises UnknownPolicy, BadParameter, BadPlan for an invalid plan, or BadPolicyFile for an
    invalid file.
    """
    if (path := file_of(text)) is not None:
        return _saved(path)
    name, _, rest = text.partition(":")
    allowed = signature_of(text).parameters
    parameters: dict[str, object] = {}
    for item in filter(None, _COMMA.split(rest)):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in allowed:
            raise BadParameter(name, key, value, f"name=value with a name among {', '.join(allowed) or 'none'}")
        if key in parameters:
            raise BadParameter(name, key, value, "one value: it is given twice")
        parameters[key] = _value(key, value)
    missing = [p.name for p in allowed.values() if p.default is p.empty and p.name not in parameters]
    if missing:
        raise BadParameter(name, missing[0], None, f"{name}:{missing[0]}=…")
    return _POLICIES[_name(text)](**parameters)


def file_of(text: str) -> Path | None:
    """Return the path of a saved policy that `parse` would read, or None for the text of a policy."""
    return Path(text) if text.endswith(".json") and _name(text) not in _POLICIES else None


def signature_of(text: str) -> inspect.Signature:
    """Return the signature of the policy that a text names. Raises UnknownPolicy."""
    if _name(text) not in _POLICIES:
        raise UnknownPolicy(text, sorted(_POLICIES))
    return inspect.signature(_POLICIES[_name(text)])


def _name(text: str) -> str:
    return text.partition(":")[0].strip().lower()


def _saved(path: Path) -> Policy:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: an invalid path, not UTF-8, or not a policy
        raise BadPolicyFile(path, getattr(error, "strerror", None) or error) from error


def _value(key: str, text: str) -> object:
    """Convert the text of a parameter: to a Python literal if it is one, else to itself."""
    if key == "kinds":
        return tuple(kind.strip() for kind in text.split("+"))
    if key in ("plan", "mask") and text[:1] not in ("(", "["):  # the mask "1101" is not a number
        return text
    for read in (ast.literal_eval, float):  # float also reads inf and nan
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text
