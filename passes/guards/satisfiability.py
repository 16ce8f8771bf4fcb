"""Satisfiability of guards, by exact linear arithmetic over their symbols.

A guard in disjunctive normal form is a list of conjunctions of linear inequalities. Together with the bounds of the
symbols, each conjunction is decided by Fourier-Motzkin elimination (Schrijver, "Theory of Linear and Integer
Programming", 1986, section 12.2). A nonlinear term (floor, Mod, a product, ...) becomes an unknown of its own with
bounds. This can hide a contradiction, but cannot introduce one. A comparison that Python's arithmetic may round, or for
which it may raise, is left undecided.

sympy's `satisfiable(..., use_lra_theory=True)` decides the same question, but is slower and has no limit on its work.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from fractions import Fraction
from functools import lru_cache, reduce
from types import MappingProxyType

import sympy
from sympy import Abs, And, Eq, Expr, Max, Min, Mod, Ne, Not, Or, Rational, Symbol, ceiling, floor
from sympy.core.relational import Ge, Gt, Le, Lt, Relational
from sympy.logic.boolalg import Boolean

from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.symbols import age, layer, num_layers, num_steps, progress, step, streak

MAX_NODES = 200  # nodes of a guard's expression
MAX_CUBES = 32  # conjunctions of its disjunctive normal form
MAX_TERMS = 64  # terms of an expanded product
MAX_ROWS = 4000  # inequalities processed for one verdict, about 10 us each

Linear = dict[Expr, Fraction]  # unknown -> coefficient; that of 1 is the constant
Inequality = tuple[Linear, bool]  # (form, strict): form <= 0, or < 0
# terms -> (c, strict): their sum + c <= 0, or < 0
Inequalities = dict[
    frozenset[tuple[Expr, int]], tuple[Fraction, bool]
]  # terms -> (c, strict): their sum + c <= 0, or < 0

_ONE = sympy.S.One
_EXACT = frozenset({step, num_steps, progress, layer, num_layers, age, streak})
_LEAST: dict[Expr, int] = {step: 1, num_steps: 2, num_layers: 1, age: 1}  # lower bounds; 0 for other symbols
_SCHEDULE = (step >= 1, step < num_steps, progress > 0, progress <= 1, Eq(num_steps * progress - progress, step))
_TIME = (*_SCHEDULE, age >= 1, age <= step, streak < age)
_PLACE = (layer < num_layers,)


class Verdict(str, Enum):
    """A property of a guard that holds for every schedule."""

    NEVER = "no schedule can make it true"
    ALWAYS = "it is true at every step"

    def __str__(self) -> str:
        return self.value


class _Undecided(Exception):
    """Raised if the guard is not linear or the work exceeds its limits."""


def verdict(guard: Boolean, known: Mapping[str, symbols.Value] = MappingProxyType({})) -> Verdict | None:
    """Return whether `guard` is NEVER or ALWAYS true after partial evaluation with `known`, or None if undecided.

    The verdict is about `Predicate.of(guard, known)` at steps where the slot has a value and all symbols of the guard
    are known and finite. It assumes, and `known` must agree with:

    * 1 <= step < num_steps and progress = step / (num_steps - 1)
    * 0 <= layer < num_layers
    * 1 <= age <= step, because a site is decided once per step
    * 0 <= streak < age, because a site is reused at most once per step since it was computed
    * sigma, snr and changes are >= 0

    A guard that can hold only at step 0 is NEVER, because no slot has a value there. If a caller passes the same
    step_index twice, age may be 0, and the verdict is not a proof. NEVER may therefore only make a site compute, which
    is always correct, and ALWAYS may only be reported.

    The check is sound but not complete: it returns None for large guards and for many nonlinear ones. It does not raise
    for a guard that `symbols.check` accepts.
    """
    if any(True for _ in itertools.islice(sympy.preorder_traversal(guard), MAX_NODES, None)):
        return None
    try:
        left = symbols.partially_evaluate(guard, known)
        groups = [group for group in (_TIME, _PLACE) if any(f.free_symbols & left.free_symbols for f in group)]
        facts = tuple(symbols.partially_evaluate(fact, known) for group in groups for fact in group)
        return _verdict(left, facts)
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return None  # sympy raises, for example, for a comparison with a complex number


@lru_cache(maxsize=4096)
def _verdict(guard: Boolean, facts: tuple[Boolean, ...]) -> Verdict | None:
    for holds, certain in ((True, Verdict.NEVER), (False, Verdict.ALWAYS)):
        try:
            if not _possible(guard, holds, facts):
                return certain
        except _Undecided:
            continue
    return None


def _possible(guard: Boolean, holds: bool, facts: Sequence[Boolean]) -> bool:
    """Return whether the guard may be true, or with `holds` False, whether it may be not true. Raises _Undecided."""
    work = itertools.count(1)
    given = [_cubes(fact, True, lenient=True) for fact in facts]
    for cubes in itertools.product(*given, _cubes(guard, holds, lenient=holds)):
        rows = list(itertools.chain(*cubes))
        if _feasible(_tightest([*rows, *_bounds(rows)], work), work):
            return True
    return False


# Conjunctions


def _cubes(formula: Boolean, holds: bool, lenient: bool) -> list[list[Inequality]]:
    """Return the disjunctive normal form of `formula`, or of its negation if `holds` is False.

    If `lenient`, an undecided part counts as possibly true. Otherwise it raises _Undecided: if Python raises while it
    evaluates such a part, neither the part nor its negation nor the enclosing guard holds.
    """
    if formula in (sympy.true, sympy.false):
        return [[]] if bool(formula) == holds else []
    if isinstance(formula, Not):
        return _cubes(formula.args[0], not holds, lenient)
    if isinstance(formula, (And, Or)):
        parts = [_cubes(part, holds, lenient) for part in formula.args]
        joined = isinstance(formula, And) == holds
        if (math.prod if joined else sum)(map(len, parts)) > MAX_CUBES:  # type: ignore[operator]
            raise _Undecided
        return [sum(choice, []) for choice in itertools.product(*parts)] if joined else sum(parts, [])
    try:
        return _comparison(formula, holds)
    except _Undecided:
        if lenient:
            return [[]]
        raise


def _comparison(formula: Boolean, holds: bool) -> list[list[Inequality]]:
    """Return a comparison, or its negation, as a list of conjunctions; `Ne` gives two. Raises _Undecided."""
    if not isinstance(formula, Relational):
        raise _Undecided
    relation = formula if holds else formula.negated
    under = _sum(_side(relation.lhs), _negative(_side(relation.rhs)))
    over = _negative(under)
    cubes: dict[type[Relational], list[list[Inequality]]] = {
        Le: [[(under, False)]],
        Lt: [[(under, True)]],
        Ge: [[(over, False)]],
        Gt: [[(over, True)]],
        Eq: [[(under, False), (over, False)]],
        Ne: [[(under, True)], [(over, True)]],
    }
    return cubes[relation.func]


# Linear forms


def _side(side: Expr) -> Linear:
    """Return the linear form of one side of a comparison. Raises _Undecided.

    Python compares floats with ints, Fractions and floats exactly, but rounds when it computes with floats. A float is
    therefore accepted only if it is the whole side.
    """
    if isinstance(side, Symbol) and side not in _EXACT:
        return {side: Fraction(1)}
    if isinstance(side, sympy.Float):
        return {_ONE: Fraction(float(side))}
    return _linear(side)


def _linear(expr: Expr) -> Linear:
    """Return the linear form of an expression that Python evaluates exactly. Raises _Undecided for any other."""
    if isinstance(expr, Rational):
        return {_ONE: Fraction(int(expr.p), int(expr.q))}
    if expr in _EXACT:
        return {expr: Fraction(1)}
    if isinstance(expr, sympy.Add):
        return _sum(*map(_linear, expr.args))
    if isinstance(expr, sympy.Mul):
        return reduce(_times, map(_linear, expr.args))
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and 0 < expr.exp <= 4:
        return reduce(_times, [_linear(expr.base)] * int(expr.exp))
    divides = isinstance(expr, Mod) and isinstance(expr.args[1], Rational) and expr.args[1] != 0
    if divides or isinstance(expr, (floor, ceiling, Abs, Min, Max)):
        for argument in expr.args:
            _linear(argument)  # raises where an argument is not exact
        return {expr: Fraction(1)}
    raise _Undecided


def _sum(*forms: Linear) -> Linear:
    total: Linear = {}
    for unknown, coefficient in itertools.chain.from_iterable(form.items() for form in forms):
        total[unknown] = total.get(unknown, Fraction(0)) + coefficient
    return {unknown: coefficient for unknown, coefficient in total.items() if coefficient}


def _negative(form: Linear) -> Linear:
    return {unknown: -coefficient for unknown, coefficient in form.items()}


def _times(a: Linear, b: Linear) -> Linear:
    """Return the expanded product. A product of unknowns becomes an unknown."""
    if len(a) * len(b) > MAX_TERMS:
        raise _Undecided
    return _sum(*({x * y: p * q} for (x, p), (y, q) in itertools.product(a.items(), b.items())))


# Bounds of unknowns


def _bounds(rows: Iterable[Inequality]) -> list[Inequality]:
    """Return the bounds of the unknowns in `rows`, and of the unknowns in these bounds, recursively."""
    found: list[Inequality] = []
    fresh, seen = list(rows), {_ONE}
    while fresh:
        unknowns = {unknown for form, _ in fresh for unknown in form} - seen
        fresh = [row for unknown in unknowns for row in _bounds_of(unknown)]
        found, seen = found + fresh, seen | unknowns
    return found


@lru_cache(maxsize=4096)
def _bounds_of(unknown: Expr) -> tuple[Inequality, ...]:
    least = [(sympy.S.Zero, unknown, False)] if unknown.is_nonnegative else []
    bounds = [*least, *_function_bounds(unknown), *_product_bounds(unknown)]
    return tuple((_sum(_side(low), _negative(_side(high))), strict) for low, high, strict in bounds)


def _function_bounds(unknown: Expr) -> Iterator[tuple[Expr, Expr, bool]]:
    """Yield (low, high, strict) for each low <= high, or low < high if strict, that defines a function."""
    if isinstance(unknown, floor):
        yield from ((unknown, unknown.args[0], False), (unknown.args[0], unknown + 1, True))
    elif isinstance(unknown, ceiling):
        yield from ((unknown.args[0], unknown, False), (unknown, unknown.args[0] + 1, True))
    elif isinstance(unknown, Mod):
        sign = sympy.sign(unknown.args[1])  # the remainder has the sign of the divisor
        yield from ((sympy.S.Zero, sign * unknown, False), (sign * unknown, sign * unknown.args[1], True))
    elif isinstance(unknown, Abs):
        yield from ((sign * unknown.args[0], unknown, False) for sign in (1, -1))
    elif isinstance(unknown, Min):
        yield from ((unknown, argument, False) for argument in unknown.args)
    elif isinstance(unknown, Max):
        yield from ((argument, unknown, False) for argument in unknown.args)


def _product_bounds(unknown: Expr) -> Iterator[tuple[Expr, Expr, bool]]:
    """Yield bounds of a product of symbols. None of them is negative, so the product grows with each factor."""
    factors = unknown.as_powers_dict() if isinstance(unknown, (sympy.Mul, sympy.Pow)) else {}
    if all(isinstance(factor, Symbol) for factor in factors):
        for factor in factors:
            rest = unknown / factor
            yield (_LEAST.get(factor, 0) * rest, unknown, False)
            if factor == progress:
                yield (unknown, rest, False)


# Elimination


def _tightest(rows: Iterable[Inequality], work: Iterator[int]) -> Inequalities:
    """Return the rows scaled to coprime coefficients. Of rows with equal coefficients, keep the tightest."""
    found: Inequalities = {}
    for form, strict in rows:
        if next(work) > MAX_ROWS:
            raise _Undecided
        constant = form.get(_ONE, Fraction(0))
        terms = {unknown: q for unknown, q in form.items() if unknown != _ONE}
        if terms:
            denominator = math.lcm(*(q.denominator for q in terms.values()))
            scale = Fraction(denominator, math.gcd(*(int(q * denominator) for q in terms.values())))
            terms, constant = {unknown: q * scale for unknown, q in terms.items()}, constant * scale
            if all(unknown.is_integer for unknown in terms):  # a sum of integers that is < 5/2 or < 3 is <= 2
                constant, strict = Fraction(math.floor(constant) + 1 if strict else math.ceil(constant)), False
        key = frozenset((unknown, int(q)) for unknown, q in terms.items())
        found[key] = max(found.get(key, (constant, strict)), (constant, strict))
    return found


def _feasible(rows: Inequalities, work: Iterator[int]) -> bool:
    """Return whether some real numbers satisfy all rows. May also return False if no integers satisfy them."""
    while True:
        constant, strict = rows.pop(frozenset(), (Fraction(-1), False))
        if constant > 0 or (constant == 0 and strict):
            return False
        if not rows:
            return True
        rows = _eliminate(rows, work)


def _eliminate(rows: Inequalities, work: Iterator[int]) -> Inequalities:
    """Eliminate the unknown that gives the fewest new rows: combine each upper bound of it with each lower bound."""
    signs = Counter((unknown, q > 0) for terms in rows for unknown, q in terms)
    unknown = min((u for u, _ in signs), key=lambda u: signs[u, True] * signs[u, False])
    kept, sides = list[Inequality](), (list[Inequality](), list[Inequality]())
    for terms, (constant, strict) in rows.items():
        form: Linear = {u: Fraction(q) for u, q in terms} | {_ONE: constant}
        factor = form.get(unknown, Fraction(0))
        if factor:
            sides[factor > 0].append((_times(form, {_ONE: 1 / abs(factor)}), strict))
        else:
            kept.append((form, strict))
    met = ((_sum(low, high), a or b) for (low, a), (high, b) in itertools.product(*sides))
    return _tightest(itertools.chain(kept, met), work)
