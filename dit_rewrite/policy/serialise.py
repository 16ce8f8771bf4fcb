"""Policies as JSON; `from_json` returns an equal policy. Guards are written as text (guard_text.py)."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import asdict, replace
from typing import Any

from dit_rewrite.errors import BadPolicyText, UnknownVersion, UnwritableBasis, UnwritableStrategy
from dit_rewrite.policy.guard_text import guard_text, parse_guard
from dit_rewrite.policy.measured_bases import MEASURED_KINDS as KINDS
from dit_rewrite.policy.rules import MadeFor, Policy, Rule
from dit_rewrite.policy.strategies import (
    BlockwiseReuse,
    Compute,
    Forecast,
    GuidanceDelta,
    Reuse,
    ReuseKV,
    ReuseTiles,
    ShareGuidance,
    Strategy,
    Verify,
    WindowResidual,
)
from dit_rewrite.policy.where import Where

VERSION = 1
STRATEGIES: dict[str, type[Strategy]] = {
    "compute": Compute, "reuse": Reuse, "forecast": Forecast, "reuse_kv": ReuseKV, "window_residual": WindowResidual,
    "share_guidance": ShareGuidance, "guidance_delta": GuidanceDelta, "blockwise_reuse": BlockwiseReuse,
    "verify": Verify, "reuse_tiles": ReuseTiles,
}  # fmt: skip

_JSON: dict[Any, type] = {tuple: list, typing.Literal: str}
Record = typing.TypeVar("Record")


def to_json(policy: Policy) -> str:
    """Return the policy as JSON.

    Raises UnwritableGuard, UnwritableBasis or UnwritableStrategy for a guard, a basis or a strategy without a text.
    """
    rules = [{"when": guard_text(rule.when), "do": _do(rule.do), "where": asdict(rule.where)} for rule in policy.rules]
    made_for = {} if policy.made_for is None else {"made_for": asdict(policy.made_for)}
    fields = {"version": VERSION, "name": policy.name, "lag": policy.lag, **made_for, "rules": rules}
    return json.dumps(fields, indent=2)


def _do(strategy: Strategy | tuple[Strategy, ...]) -> Any:
    if isinstance(strategy, tuple):
        return [_do(each) for each in strategy]
    name = next((name for name, kind in STRATEGIES.items() if type(strategy) is kind), None)
    if name is None:
        raise UnwritableStrategy(strategy)
    own = {"basis": _basis(strategy.basis)} if isinstance(strategy, Forecast) else {}
    own |= {"do": _do(strategy.do)} if isinstance(strategy, GuidanceDelta) else {}
    return {
        "strategy": name,
        **{field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)},
        **own,
    }


def _basis(basis: object) -> object:
    """Return a basis as its name, or as an object with its name and parameters."""
    if isinstance(basis, str):
        return basis
    name = next((name for name, kind in KINDS.items() if type(basis) is kind), None)
    if name is None:
        raise UnwritableBasis(basis)
    return {"basis": name, **asdict(basis)}  # type: ignore[call-overload]


def from_json(text: str) -> Policy:
    """Parse the JSON of `to_json`; the certificate of `autopolicy` beside the rules is not read.

    Raises BadPolicyText, UnknownVersion, BadGuardText, or an error of Rule or Where.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPolicyText("the text", f"cannot be parsed ({error})") from None
    version = _as(value, dict, "the text").get("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise UnknownVersion(version, VERSION)
    fields = _fields(value, "the policy", ("name", "rules"), ("version", "lag", "made_for", "certificate"))
    rules = _as(fields["rules"], list, "rules")
    read = tuple(_rule(rule, f"rules[{i}]") for i, rule in enumerate(rules))
    made_for = _record(fields["made_for"], MadeFor, "made_for") if "made_for" in fields else None
    return Policy(read, _as(fields["name"], str, "name"), _as(fields.get("lag", 0), int, "lag"), made_for)


def _rule(value: object, where: str) -> Rule:
    fields = _fields(value, where, ("when", "do", "where"))
    place = _record(fields["where"], Where, f"{where}.where")
    return Rule(
        when=parse_guard(_as(fields["when"], str, f"{where}.when")),
        do=_strategy(fields["do"], f"{where}.do"),
        where=place,
    )


def _strategy(value: object, where: str) -> Strategy | tuple[Strategy, ...]:
    if isinstance(value, list):
        return tuple(_one_strategy(item, f"{where}[{i}]") for i, item in enumerate(value))
    return _one_strategy(value, where)


def _one_strategy(value: object, where: str) -> Strategy:
    fields = dict(_as(value, dict, where))
    name = fields.pop("strategy", None)
    if not isinstance(name, str) or name not in STRATEGIES:
        raise BadPolicyText(where, f"has the strategy {name!r:.100}, which is not one of {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    if isinstance(fields.get("basis"), dict) and issubclass(kind, Forecast):
        return _forecast(fields, kind, f"{where}.basis")
    if isinstance(fields.get("do"), dict):
        do: Any = _one_strategy(fields.pop("do"), f"{where}.do")  # GuidanceDelta checks its type
        return replace(_record(fields, GuidanceDelta, where), do=do)
    return _record(fields, kind, where)


def _forecast(fields: dict[str, Any], kind: type[Forecast], where: str) -> Strategy:
    """Read a forecast whose basis has parameters."""
    given = dict(fields.pop("basis"))
    name = given.pop("basis", None)
    if not isinstance(name, str) or name not in KINDS:
        raise BadPolicyText(where, f"has the basis {name!r:.100}, which is not one of {', '.join(KINDS)}")
    read = _record(fields, kind, where)
    return replace(read, basis=_record(given, KINDS[name], where))


def _record(value: object, kind: type[Record], where: str) -> Record:
    """Read a JSON object as a dataclass of type `kind`."""
    hints = typing.get_type_hints(kind)
    fields = _fields(value, where, (), tuple(hints))
    return kind(**{name: _typed(item, hints[name], f"{where}.{name}") for name, item in fields.items()})


def _fields(value: object, where: str, needed: tuple[str, ...], allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a JSON object that has all `needed` fields, and otherwise only `allowed` ones."""
    fields = _as(value, dict, where)
    missing = [name for name in needed if name not in fields]
    if missing:
        raise BadPolicyText(where, f"lacks {', '.join(missing)}")
    unknown = [name for name in fields if name not in needed + allowed]
    if unknown:
        raise BadPolicyText(where, f"has {', '.join(unknown)[:100]}, and its fields are {', '.join(needed + allowed)}")
    return fields


def _as(value: object, kind: type, where: str) -> Any:
    """Return `value`, whose type must be exactly `kind` (a bool is not an int)."""
    if type(value) is not kind:
        raise BadPolicyText(where, f"is {json.dumps(value)[:100]}, but must be a {kind.__name__}")
    return value


def _typed(value: object, hint: Any, where: str) -> Any:
    """Convert a JSON value to a type hint: None, str, int, float, bool, a tuple, or a union of these."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _as(value, str, where)  # the dataclass checks it
    if hint is float and type(value) is int:
        return value
    if origin is tuple:
        items = _as(value, list, where)
        kinds = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(items):
            raise BadPolicyText(where, f"has {len(items)} items, but must have {len(kinds)}")
        return tuple(_typed(item, kinds[i], f"{where}[{i}]") for i, item in enumerate(items))
    if origin in (typing.Union, types.UnionType):
        fitting = (kind for kind in arguments if _JSON.get(typing.get_origin(kind), kind) is type(value))
        return _typed(value, next(fitting, arguments[0]), where)
    return _as(value, hint, where)
