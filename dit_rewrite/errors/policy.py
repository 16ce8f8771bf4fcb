"""Errors of policies, rules and guards, and of their text; see `plans` for plans."""

from __future__ import annotations

from collections.abc import Iterable

from dit_rewrite.errors.base import DitRewriteError, joined


class PolicyError(DitRewriteError, ValueError):
    """A policy, or a part of one, is invalid."""


class BadParameter(PolicyError):
    template = "{where}: {name}={value!r} is out of range. Give {name} as {allowed}."


class AllRefused(PolicyError):
    template = (
        "The policy refused the parameters of all {count} trials. Give values that it takes, and its other parameters. "
        "The last reason: {reason}"
    )


class UnknownSymbol(PolicyError):
    template = (
        "The guard `{guard}` uses {names}, which guards do not have. Use the symbols of dit_rewrite.guards: {known}."
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
        "The spans of blocks {a} and {b} overlap, so neither can be reused without the other. Give disjoint spans, or "
        "spans of which one contains the other."
    )

    def __init__(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        """`a` and `b` are (first, end)."""
        super().__init__(a=f"{a[0]} to {a[1] - 1}", b=f"{b[0]} to {b[1] - 1}")


class NeedsSegments(PolicyError):
    template = (
        "{policy} decides during a call, by measurements of the same call, but lowering='variants' decides before it. "
        "Use lowering='segments' or 'auto', or give the policy lag=1."
    )


class TwoStores(PolicyError):
    template = (
        "The rules for {site} need {stores} as formats of one slot. Give all strategies for this site the same store."
    )

    def __init__(self, site: str, stores: Iterable[object]) -> None:
        super().__init__(site=site, stores=" and ".join(sorted(map(repr, stores))))


class UnknownPolicy(PolicyError):
    template = "No policy is called {text!r}. Give one of {known}, with its parameters, such as `fora:interval=3`."

    def __init__(self, text: str, known: Iterable[str]) -> None:
        super().__init__(text=text, known=joined(known))


class NotAPolicy(PolicyError):
    template = "A policy is needed, but an object of type {given} was given. {remedy}."


class UnreachedPolicy(PolicyError):
    template = (
        "The policy {policy} reaches none of the model's {sites} sites, so there is nothing to verify. Check its "
        "kinds and guards with model.explain()."
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
        "The guard `{guard}` cannot be saved: its text would be parsed as another guard ({cause}). Write it without "
        "evaluate=False, and only with the symbols and functions that text can express."
    )


class UnwritableBasis(PolicyError):
    template = (
        "A forecast with the basis {basis!r:.100} cannot be saved: functions have no text. Use a basis of "
        "dit_rewrite.bases."
    )


class UnwritableStrategy(PolicyError):
    template = (
        "A policy with the strategy {strategy!r:.100} cannot be saved: its class has no name. Give it one in "
        "dit_rewrite.policy.serialise.STRATEGIES."
    )


class BadPolicyText(PolicyError):
    template = (
        "This is not a policy in JSON: {where} {problem:.300}. Write it with dit_rewrite.policy.serialise.to_json."
    )


class BadPolicyFile(BadPolicyText):
    template = (
        "{path} cannot be used as a policy ({problem!s:.400}). Give a file that tune, autopolicy or to_json wrote."
    )


class UnknownVersion(BadPolicyText):
    template = (
        "This policy in JSON cannot be read: its version is {version!r:.100}, and this dit_rewrite reads version "
        "{known}. Write it with dit_rewrite.policy.serialise.to_json."
    )


class StatesTooLarge(PolicyError, MemoryError):
    template = (
        "Blockwise attention at {sites} sites would store {needed} for each stream, which is more than {share} of the "
        "{memory} of {device}. Give BlockwiseReuse larger blocks than {blocks} keys, block=None, which chooses "
        "them by shape, or fewer sites."
    )
