"""The language of guards: sympy Booleans over a few symbols, partially evaluated, then compiled for the steps.

A guard says when a site may do its strategy. Only proof permits: an unknown or non-finite symbol that the guard
*as written* mentions makes it False, and never reaches sympy (simplification could turn it into True).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean, BooleanFunction

from dit_rewrite.errors import NotBoolean, UnknownSymbol

step, num_steps, layer, num_layers, age, streak = sympy.symbols(
    "step num_steps layer num_layers age streak", integer=True, nonnegative=True
)
progress = sympy.Symbol("progress", real=True)
sigma, snr = sympy.symbols("sigma snr", nonnegative=True)
SYMBOLS = {s.name: s for s in (step, num_steps, progress, sigma, snr, layer, num_layers, age, streak)}
TOTALS = frozenset({"num_steps", "progress"})
NOISE = frozenset({"sigma", "snr"})

Value = int | float | None


def check(guard: object) -> Boolean:
    """`guard` as a Boolean over SYMBOLS; raises NotBoolean or UnknownSymbol. Python's True and False are welcome.

    Text is refused: sympy would evaluate it, and its symbols would not be ours.
    """
    try:
        expression = sympy.sympify(guard, strict=True)
    except sympy.SympifyError:
        raise NotBoolean(guard) from None
    if not _is_proposition(expression):
        raise NotBoolean(guard)
    foreign = [s.name for s in expression.free_symbols if SYMBOLS.get(s.name) != s]
    foreign += [str(call.func) for call in expression.atoms(AppliedUndef)]
    if foreign:
        raise UnknownSymbol(sorted(foreign), guard, list(SYMBOLS))
    return expression


def _is_proposition(expression: object) -> bool:
    """Whether this is true or false. (A symbol of sympy counts as Boolean, but each of ours is a number.)"""
    if not isinstance(expression, Boolean) or isinstance(expression, sympy.Symbol):
        return False
    return not isinstance(expression, BooleanFunction) or all(map(_is_proposition, expression.args))


def mentions(guard: Boolean) -> frozenset[str]:
    """The names of the symbols that a guard mentions."""
    return frozenset(s.name for s in guard.free_symbols)


def partially_evaluate(guard: Boolean, known: Mapping[str, Value]) -> Boolean:
    """`guard` with what is known put in, and simplified by sympy's own rules of evaluation."""
    return guard.subs({SYMBOLS[name]: value for name, value in known.items() if value is not None})


def unreachable(guard: Boolean) -> bool:
    """True when no step can make the guard hold: it *is* False. (What merely cannot be decided is reachable.)"""
    return guard == sympy.false


@dataclass(frozen=True)
class Predicate:
    """A guard compiled to plain Python.

    ``needs`` are the symbols of the guard as written; each of them must be known and finite for it to hold.
    """

    guard: Boolean
    needs: tuple[str, ...]
    _function: Callable[..., object] = field(repr=False, compare=False)

    @classmethod
    def of(cls, written: Boolean, known: Mapping[str, Value] | None = None) -> Predicate:
        """Compile `written` after partial evaluation by `known`."""
        known = {name: value for name, value in (known or {}).items() if value is not None}
        guard = partially_evaluate(written, known)
        needs = tuple(sorted(mentions(written) - known.keys()))
        function = sympy.lambdify([SYMBOLS[name] for name in needs], guard, modules="math")
        return cls(guard, needs, function)

    def holds(self, symbols: Mapping[str, Value]) -> bool:
        """Whether the guard is proven by `symbols`; a missing, None or non-finite one that it needs is no proof."""
        values = [symbols.get(name) for name in self.needs]
        if any(value is None or not math.isfinite(value) for value in values):
            return False
        try:
            return bool(self._function(*values))
        except (ArithmeticError, ValueError, TypeError):  # 1/0, log(0), a complex root: no value proves nothing
            return False
