"""Policies of the literature, each in a few lines of the language of guards."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sympy import Mod, Ne

from dit_rewrite.errors import BadParameter, UnknownPolicy
from dit_rewrite.passes.guards import num_steps, step
from dit_rewrite.policy import Policy, Rule, Where
from dit_rewrite.serialise import from_json


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


_POLICIES: dict[str, Callable[..., Policy]] = {"never": Never, "fora": FORA}


def parse(text: str) -> Policy:
    """A policy from text as on a command line: ``never``, ``fora:interval=3``, ``fora:interval=3,anchor=paper``.

    Several kinds are joined by ``+``: ``fora:interval=3,kinds=self+mlp``. A path that ends in ``.json`` is a policy
    saved with `serialise.to_json`. Raises UnknownPolicy, BadParameter, or BadPolicyText for a file that is none.
    """
    if text.endswith(".json"):
        return from_json(Path(text).read_text())
    name, _, rest = text.partition(":")
    build = _POLICIES.get(name.strip().lower())
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
