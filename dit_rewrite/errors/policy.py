"""Policies, rules and guards that have no meaning, and their text forms; see `plans` for plans."""

from __future__ import annotations

from collections.abc import Iterable

from dit_rewrite.errors.base import DitRewriteError, joined


class PolicyError(DitRewriteError, ValueError):
    """A policy, or a part of one, that cannot be used."""


class BadParameter(PolicyError):
    template = "{where}: {name}={value!r} is out of range. Give {name} as {allowed}."


class UnknownSymbol(PolicyError):
    template = (
        "The guard `{guard}` uses {names}, which no guard can know. Use the symbols of dit_rewrite.guards: {known}."
    )

    def __init__(self, names: Iterable[str], guard: object, known: Iterable[str]) -> None:
        super().__init__(names=joined(names), guard=guard, known=joined(known))


class NotBoolean(PolicyError):
    template = (
        "The guard `{guard}` is not a Boolean expression. Write a comparison or a combination of them, for instance "
        "`Ne(Mod(step, 3), 0) & (age < 4)`, or sympy.true."
    )


class LayersOutside(PolicyError):
    template = (
        "Where: layers={layers} is outside the model, which has {count} blocks, numbered from 0. Give (first, end) "
        "with end <= {count}, or fraction=(from, to)."
    )


class OverlappingSpans(PolicyError):
    template = (
        "The spans of blocks {a} and {b} overlap, so that neither could be reused without the other. Give spans that "
        "lie apart or within one another."
    )

    def __init__(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        """The spans as (first, end)."""
        super().__init__(a=f"{a[0]} to {a[1] - 1}", b=f"{b[0]} to {b[1] - 1}")


class NeedsSegments(PolicyError):
    template = (
        "{policy} decides in the middle of a call, by measurements of the same call, and lowering='variants' decides "
        "before it. Use lowering='segments' or 'auto', or give the policy lag=1."
    )


class TwoStores(PolicyError):
    template = (
        "The rules for {site} ask for {stores} in one slot. Give all strategies that reuse this site the same store."
    )

    def __init__(self, site: str, stores: Iterable[object]) -> None:
        super().__init__(site=site, stores=" and ".join(sorted(map(repr, stores))))


class UnknownPolicy(PolicyError):
    template = "No policy is called {text!r}. Give one of {known}, with its parameters, such as `fora:interval=3`."

    def __init__(self, text: str, known: Iterable[str]) -> None:
        super().__init__(text=text, known=joined(known))


class NotAPolicy(PolicyError):
    template = "A policy is needed, and this is of type {given}. {remedy}."


class UnreachedPolicy(PolicyError):
    template = (
        "The policy {policy} reaches none of the model's {sites} sites, so that there is nothing to verify. Check its "
        "kinds and guards against model.explain()."
    )


class BadGuardText(PolicyError):
    template = (
        "The guard `{text:.200}` cannot be read: {problem:.300}. Write comparisons of {symbols} and numbers with "
        "+ - * / ** %, joined by & | ^ ~, and the functions {functions}."
    )

    def __init__(self, text: str, problem: str, symbols: Iterable[str], functions: Iterable[str]) -> None:
        super().__init__(text=text, problem=problem, symbols=joined(symbols), functions=joined(functions))


class ForeignName(BadGuardText):
    def __init__(self, text: str, name: str, kind: str, symbols: Iterable[str], functions: Iterable[str]) -> None:
        super().__init__(text, f"{name[:100]!r} is not a {kind} of guards", symbols, functions)


class UnwritableGuard(PolicyError):
    template = (
        "The guard `{guard}` cannot be saved: its text would be read back as another guard ({cause}). Write it without "
        "evaluate=False, and only with the symbols and functions of guards as text."
    )


class UnwritableBasis(PolicyError):
    template = (
        "A forecast over the basis {basis!r:.100} cannot be saved: a function has no text form. Give it one of "
        "dit_rewrite.bases."
    )


class BadPolicyText(PolicyError):
    template = "This is not a policy in JSON: {where} {problem:.300}. Write it by dit_rewrite.serialise.to_json."


class UnknownVersion(BadPolicyText):
    template = (
        "This is not a policy in JSON that can be read: its version is {version!r:.100}, and this dit_rewrite reads "
        "version {known}. Write it by dit_rewrite.serialise.to_json."
    )
