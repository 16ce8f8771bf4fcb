"""The language of guards: sympy Booleans over a few symbols, partially evaluated, then compiled for the steps.

A guard says when a site may do its strategy. Only proof permits: an unknown or non-finite symbol that the guard
*as written* mentions makes it False, and never reaches sympy (simplification could turn it into True).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean, BooleanFunction
from sympy.printing.pycode import PythonCodePrinter

from dit_rewrite.errors import NotBoolean, UnknownSymbol
from dit_rewrite.passes.guards.measurements import ERROR, ERRORS, PROBES, STATISTICS, Filter, Measurement, measurement
from dit_rewrite.passes.guards.tables import errors_since, look_up, table

step, num_steps, layer, num_layers, age, streak = sympy.symbols(
    "step num_steps layer num_layers age streak", integer=True, nonnegative=True
)
progress = sympy.Symbol("progress", real=True)
sigma, snr = sympy.symbols("sigma snr", nonnegative=True)
entropy = sympy.Symbol("entropy", nonnegative=True)

SYMBOLS = {s.name: s for s in (step, num_steps, progress, sigma, snr, layer, num_layers, age, streak, entropy)}
TOTALS = frozenset({"num_steps", "progress"})
NOISE = frozenset({"sigma", "snr"})
FORESEEN = frozenset({"step", "num_steps", "progress", "layer"})  # known of a step before it comes
ENTROPY = "entropy"
KNOWN = (*SYMBOLS, *(f"{s}({', '.join(ERRORS if s == ERROR else PROBES)})" for s in STATISTICS))  # for messages

Value = int | float | Fraction | None


def similarity(
    probe: str, *, filter: Filter | None = None, rescale: Sequence[float] | Literal["rate"] | None = None
) -> sympy.Symbol:
    """The symbol of a probe's relative L1 change since the site was last computed; 0 is no change at all.

    Probes: "first_block", what the first block adds to the stream, or "first_8_blocks" and so on; "behind_first_block",
    or "behind_first_8_blocks" and so on, the stream behind them; "modulated_input", what its attention is computed
    from; "self", the stream that the site itself reads; "latent", the model's input, known before anything runs;
    "output", what the model returns: the change between the last two steps that computed the site. `rescale`: the
    coefficients, highest power first, of a polynomial that the change is put through (what that makes of it may be
    negative); or "rate", as EasyCache has it: mean |change of the probe|, times (mean |change of the output| / mean
    |change of the probe|) of the last two computed steps, over mean |output of the last one|. `filter`="sea": the probe
    is put through SeaCache's filter of its step's noise before, which must be known. Raises BadParameter for another.
    """
    return Measurement.of("similarity", probe, rescale, filter).symbol


def drift(
    probe: str, *, filter: Filter | None = None, rescale: Sequence[float] | Literal["rate"] | None = None
) -> sympy.Symbol:
    """The symbol of a probe's relative L1 changes from call to call, each filtered and rescaled as in `similarity`,
    added up since the site was last computed."""
    return Measurement.of("drift", probe, rescale, filter).symbol


def advance(probe: str) -> sympy.Symbol:
    """The symbol of how far a probe has gone along the way of the last two computed steps.

    mean |the probe now - at the last computed step but one| over mean |at the last computed step - at that before|: 1
    is where it was at the last computed step. Before two steps have computed the site there is none. Probes are those
    of `similarity`, less "output". Raises BadParameter for another.
    """
    return Measurement.of("advance", probe).symbol


def forecast_error(probe: str = "verified", *, elementwise: bool = False) -> sympy.Symbol:
    """The symbol of how far the forecast of a value was from what was computed, when it was computed last.

    The value and its forecast, from the same slot, at the same step: mean |forecast - computed| / mean |computed|, or
    with `elementwise` the mean of |forecast - computed| / |computed|. It is known from the next call on. "self" is of
    the site itself, "verified" of the sites that a rule has do `Verify`; of several values the largest. Where one of
    them could not be forecast there is none. Raises BadParameter.
    """
    return Measurement.of(ERROR, probe, elementwise=elementwise).symbol


def accumulated_error(ratios: Sequence[float], reach: int) -> sympy.Expr:
    """The sum, over the steps since the site was last computed, of |1 - the product of the ratios from there on|.

    MagCache's estimate of the error: `ratios[i]` is by how much the magnitude of what is reused changes from step i - 1
    to step i, as it was calibrated. It is a table of step and age; more than `reach` steps after the last computed one
    it has no value, and proves nothing. Raises BadParameter for what is out of range.
    """
    return table(errors_since(ratios, reach), step, age - 1)


def symbol(name: str) -> sympy.Symbol | None:
    """The symbol of that name; None where guards have none."""
    if name in SYMBOLS:
        return SYMBOLS[name]
    found = measurement(name)
    return None if found is None else found.symbol


def is_measured(name: str) -> bool:
    """Whether a symbol's value is measured while the model runs."""
    return name == ENTROPY or measurement(name) is not None


def measured(names: Iterable[str]) -> frozenset[str]:
    """Those of the symbols that are measured."""
    return frozenset(filter(is_measured, names))


def check(guard: object) -> Boolean:
    """`guard` as a Boolean over the symbols of guards; raises NotBoolean or UnknownSymbol.

    Python's True and False are welcome. Text is refused: sympy would evaluate it, and its symbols would not be ours.
    """
    try:
        expression = sympy.sympify(guard, strict=True)
    except sympy.SympifyError:
        raise NotBoolean(guard) from None
    if not _is_proposition(expression):
        raise NotBoolean(guard)
    foreign = [s.name for s in expression.free_symbols if symbol(s.name) != s]
    foreign += [str(call.func) for call in expression.atoms(AppliedUndef)]
    if foreign:
        raise UnknownSymbol(sorted(foreign), guard, KNOWN)
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
    return guard.subs({symbol(name): value for name, value in known.items() if value is not None})


def unreachable(guard: Boolean) -> bool:
    """True when no step can make the guard hold: it *is* False. (What merely cannot be decided is reachable.)"""
    return guard == sympy.false


class _ExactPrinter(PythonCodePrinter):
    """Rational numbers as exact fractions: a floor must not depend on how a product was rounded. Floats by all their
    digits."""

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return f"Fraction({expr.p}, {expr.q})"

    def _print_table(self, expr: table) -> str:
        values, *indices = expr.args
        return f"look_up({', '.join([repr(values.rows), *map(self._print, indices)])})"


def _compiled(names: tuple[str, ...], parts: Sequence[sympy.Basic]) -> Callable[..., Sequence[object]]:
    settings = {"fully_qualified_modules": False, "inline": True}
    function: Callable[..., Sequence[object]] = sympy.lambdify(
        [symbol(name) for name in names],
        list(parts),
        modules=[{"Fraction": Fraction, "look_up": look_up}, "math"],
        printer=_ExactPrinter(settings),
    )
    return function


def is_known(name: str, value: Any) -> bool:
    """Whether a symbol's value can prove anything: there is one, it is finite, and no change is negative."""
    return value is not None and math.isfinite(value) and not (value < 0 and _is_never_negative(name))


def reads_noise(names: Collection[str]) -> bool:
    """Whether the noise level must be known for one of these symbols to be."""
    found = map(measurement, names)
    return not NOISE.isdisjoint(names) or any(each is not None and each.filter is not None for each in found)


def _is_never_negative(name: str) -> bool:
    found = measurement(name)
    return name == ENTROPY if found is None else not found.may_be_negative


@dataclass(frozen=True)
class Predicate:
    """A guard compiled to plain Python.

    ``needs`` are the symbols of the guard as written; each of them must be known and finite for it to hold. So must all
    tables of the guard as written have a value: they are looked up first, whatever simplification or Python's `or`
    would have left out.
    """

    guard: Boolean
    needs: tuple[str, ...]
    _function: Callable[..., Sequence[object]] = field(repr=False, compare=False)
    _before: Predicate | None = field(repr=False, compare=False, default=None)

    @classmethod
    def of(cls, written: Boolean, known: Mapping[str, Value] | None = None) -> Predicate:
        """Compile `written` after partial evaluation by `known`."""
        known = {name: value for name, value in (known or {}).items() if value is not None}
        guard = partially_evaluate(written, known)
        needs = tuple(sorted(mentions(written) - known.keys()))
        cheap = [part for part in sympy.And.make_args(guard) if not measured(mentions(part))]
        before = cls.of(sympy.And(*cheap)) if measured(needs) else None
        tables = {partially_evaluate(each, known) for each in written.atoms(table)}
        looked_up = sorted((each for each in tables if isinstance(each, table)), key=sympy.default_sort_key)
        return cls(guard, needs, _compiled(needs, [*looked_up, guard]), before)

    @property
    def measured(self) -> tuple[str, ...]:
        """The symbols it needs that must be measured."""
        return tuple(filter(is_measured, self.needs))

    def lacks(self, symbols: Mapping[str, Value]) -> bool:
        """Whether it needs something, other than a measurement, that is not known."""
        return any(not is_known(name, symbols.get(name)) for name in self.needs if not is_measured(name))

    def may_hold(self, symbols: Mapping[str, Value]) -> bool:
        """Whether measuring could still prove the guard: no part of it that needs no measurement is unproven."""
        return self._before is None or self._before.holds(symbols)

    def holds(self, symbols: Mapping[str, Any]) -> bool:
        """Whether the guard is proven by `symbols`; a missing, None or non-finite one that it needs is no proof.

        Nor is a negative change: none can be.
        """
        values = [symbols.get(name) for name in self.needs]
        if not all(map(is_known, self.needs, values)):
            return False
        try:
            return bool(self._function(*values)[-1])
        except (ArithmeticError, ValueError, TypeError):  # 1/0, log(0), a complex root: no value proves nothing
            return False
