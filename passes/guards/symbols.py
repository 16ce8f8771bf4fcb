"""Guards: sympy Booleans over a few symbols, which are partially evaluated and compiled to Python functions.

A guard decides when a site may use its strategy. If a symbol that the guard *as written* mentions is unknown or not
finite, the guard does not hold. Such a value never reaches sympy, because simplification could turn the guard into
True.
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
FORESEEN = frozenset({"step", "num_steps", "progress", "layer"})  # known for future steps
ENTROPY = "entropy"
DOUBLE = 53  # bits of the floats in guards, as text has them
KNOWN = (*SYMBOLS, *(f"{s}({', '.join(ERRORS if s == ERROR else PROBES)})" for s in STATISTICS))  # for error messages

Value = int | float | Fraction | None


def similarity(
    probe: str, *, filter: Filter | None = None, rescale: Sequence[float] | Literal["rate"] | None = None
) -> sympy.Symbol:
    """Return the symbol of the relative L1 change of `probe` since the site was last computed. 0 means no change.

    Probes:

    * "first_block", "first_8_blocks" and so on: the change that the first blocks add to the stream
    * "behind_first_block", "behind_first_8_blocks" and so on: the stream after these blocks
    * "modulated_input": the input of the projections of the first attention
    * "self": the stream that the site reads
    * "latent": the latent input of the model, which is known before any op runs
    * "output": the output of the model; its change is that between the last two steps that computed the site

    `rescale` gives the coefficients, highest power first, of a polynomial that is applied to the change (its value may
    be negative). "rate" predicts the relative change of the output as in EasyCache: mean |change of the probe| times
    (mean |change of the output| / mean |change of the probe|) of the last two computed steps, divided by mean |output|
    of the last one. `filter`="sea" first applies SeaCache's filter for the noise level of the step, which must be
    known. Raises BadParameter for any other value.
    """
    return Measurement.of("similarity", probe, rescale, filter).symbol


def drift(
    probe: str, *, filter: Filter | None = None, rescale: Sequence[float] | Literal["rate"] | None = None
) -> sympy.Symbol:
    """Return the symbol of the sum of the relative L1 changes of `probe` since the site was last computed.

    A change is that from one call to the next, filtered and rescaled as in `similarity`. Raises BadParameter as
    `similarity` does, and for the probe "output".
    """
    return Measurement.of("drift", probe, rescale, filter).symbol


def advance(probe: str) -> sympy.Symbol:
    """Return the symbol of the distance of `probe` relative to its change between the last two computed steps.

    With the probe p now, p1 at the last computed step and p2 at the one before: mean |p - p2| / mean |p1 - p2|, so 1
    means the distance of the last computed step. The value is unknown until two steps have computed the site. Takes the
    probes of `similarity` except "output", and raises BadParameter for any other.
    """
    return Measurement.of("advance", probe).symbol


def forecast_error(probe: str = "verified", *, elementwise: bool = False) -> sympy.Symbol:
    """Return the symbol of the relative error of a forecast at the last step that computed the value.

    The error is mean |forecast - computed| / mean |computed|, or with `elementwise` the mean of
    |forecast - computed| / |computed|, where the forecast is made from the site's slot at the same step. It is known
    from the next call on. `probe` "self" takes the site itself, "verified" the sites with the strategy `Verify`; of
    several values the largest error counts, and if one has no forecast, the error is unknown. Raises BadParameter for
    any other probe.
    """
    return Measurement.of(ERROR, probe, elementwise=elementwise).symbol


def accumulated_error(ratios: Sequence[float], reach: int) -> sympy.Expr:
    """Return MagCache's estimate of the error of reuse, as a table indexed by step and age.

    If the site was last computed at step c, the estimate at step s is the sum over t = c + 1 .. s of
    |1 - ratios[c + 1] · … · ratios[t]|. `ratios[i]` is the calibrated ratio of the magnitudes of the reused value at
    steps i and i - 1. More than `reach` steps after the last computed step the table has no value, and the guard does
    not hold. Raises BadParameter unless `ratios` are finite numbers and `reach` is a positive integer.
    """
    return table(errors_since(ratios, reach), step, age - 1)


def symbol(name: str) -> sympy.Symbol | None:
    """Return the guard symbol called `name`, or None."""
    if name in SYMBOLS:
        return SYMBOLS[name]
    found = measurement(name)
    return None if found is None else found.symbol


def is_measured(name: str) -> bool:
    """Return whether the value of the symbol `name` is measured while the model runs."""
    return name == ENTROPY or measurement(name) is not None


def measured(names: Iterable[str]) -> frozenset[str]:
    """Return those of `names` that are measured."""
    return frozenset(filter(is_measured, names))


def check(guard: object) -> Boolean:
    """Return `guard` as a sympy Boolean over guard symbols. Raises NotBoolean or UnknownSymbol.

    Python's True and False are accepted. Text is refused: sympy would evaluate it, and would make symbols with other
    assumptions than the guard symbols.
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
    others = [number for number in expression.atoms(sympy.Float) if number._prec < DOUBLE]  # such as numpy's float32
    return expression.xreplace({number: sympy.Float(float(number)) for number in others}) if others else expression


def _is_proposition(expression: object) -> bool:
    """Return whether an expression is a proposition. A Symbol is a sympy Boolean, but guard symbols are numbers."""
    if not isinstance(expression, Boolean) or isinstance(expression, sympy.Symbol):
        return False
    return not isinstance(expression, BooleanFunction) or all(map(_is_proposition, expression.args))


def mentions(guard: Boolean) -> frozenset[str]:
    """Return the names of the symbols that a guard mentions."""
    return frozenset(s.name for s in guard.free_symbols)


def partially_evaluate(guard: Boolean, known: Mapping[str, Value]) -> Boolean:
    """Return `guard` with the `known` values substituted, simplified by sympy's automatic evaluation."""
    return guard.subs({symbol(name): value for name, value in known.items() if value is not None})


def unreachable(guard: Boolean) -> bool:
    """Return whether the guard has simplified to False. A guard that cannot be decided counts as reachable."""
    return guard == sympy.false


class _ExactPrinter(PythonCodePrinter):
    """Prints rational numbers as exact fractions, because rounding could change a floor, and floats with all digits."""

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
    """Return whether `value` is valid for the symbol `name`: finite, and not negative if the symbol cannot be."""
    return value is not None and math.isfinite(value) and not (value < 0 and _is_never_negative(name))


def reads_noise(names: Collection[str]) -> bool:
    """Return whether one of these symbols needs the noise level of the step."""
    found = map(measurement, names)
    return not NOISE.isdisjoint(names) or any(each is not None and each.filter is not None for each in found)


def _is_never_negative(name: str) -> bool:
    found = measurement(name)
    return name == ENTROPY if found is None else not found.may_be_negative


@dataclass(frozen=True)
class Predicate:
    """A guard compiled to plain Python.

    ``needs`` are the symbols of the guard as written. The guard holds only if each of them is known and finite and each
    table of the guard as written has a value. Tables are therefore looked up first, because simplification or Python's
    short-circuit `or` could skip them.
    """

    guard: Boolean
    needs: tuple[str, ...]
    _function: Callable[..., Sequence[object]] = field(repr=False, compare=False)
    _before: Predicate | None = field(repr=False, compare=False, default=None)

    @classmethod
    def of(cls, written: Boolean, known: Mapping[str, Value] | None = None) -> Predicate:
        """Compile `written` after partial evaluation with the `known` values."""
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
        """The measured symbols among ``needs``."""
        return tuple(filter(is_measured, self.needs))

    def missing_inputs(self, symbols: Mapping[str, Value]) -> bool:
        """Return whether a needed symbol that is not measured is unknown."""
        return any(not is_known(name, symbols.get(name)) for name in self.needs if not is_measured(name))

    def may_hold(self, symbols: Mapping[str, Value]) -> bool:
        """Return whether the guard may still hold: all its conjuncts that need no measurement hold."""
        return self._before is None or self._before.holds(symbols)

    def holds(self, symbols: Mapping[str, Any]) -> bool:
        """Return whether the guard holds. It does not if a needed value is missing, None, not finite or invalid."""
        values = [symbols.get(name) for name in self.needs]
        if not all(map(is_known, self.needs, values)):
            return False
        try:
            return bool(self._function(*values)[-1])
        except (ArithmeticError, ValueError, TypeError):  # 1/0, log(0), a complex root: the guard has no value
            return False
