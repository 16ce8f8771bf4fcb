"""Whether a guard can hold at all: linear arithmetic over its symbols, in exact numbers.

The disjunctive normal form of a guard is a list of conjunctions of linear inequalities. With what holds of the symbols
themselves, each is decided by eliminating one unknown after the other (Fourier-Motzkin elimination; Schrijver, "Theory
of Linear and Integer Programming", 1986, section 12.2). What is not linear (floor, Mod, products, ...) is an unknown of
its own, of which only bounds are kept: that can hide a contradiction, but never make one up. A comparison of which
Python's arithmetic could round or raise is not looked into.

sympy's `satisfiable(..., use_lra_theory=True)` decides the same, but more slowly, and without a limit.
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

MAX_NODES = 200  # of a guard's expression
MAX_CUBES = 32  # conjunctions of its normal form
MAX_TERMS = 64  # of a sum that is multiplied out
MAX_ROWS = 4000  # inequalities looked at for one verdict, some 10 us each

Linear = dict[Expr, Fraction]  # unknown -> coefficient; that of 1 is the constant
Row = tuple[Linear, bool]  # (form, strict): form <= 0, or < 0
Rows = dict[frozenset[tuple[Expr, int]], tuple[Fraction, bool]]  # terms -> (c, strict): their sum + c <= 0, or < 0

_ONE = sympy.S.One
_EXACT = frozenset({step, num_steps, progress, layer, num_layers, age, streak})
_LEAST: dict[Expr, int] = {step: 1, num_steps: 2, num_layers: 1, age: 1}  # of the others 0
_SCHEDULE = (step >= 1, step < num_steps, progress > 0, progress <= 1, Eq(num_steps * progress - progress, step))
_TIME = (*_SCHEDULE, age >= 1, age <= step, streak < age)
_PLACE = (layer < num_layers,)


class Verdict(str, Enum):
    """What is certain of a guard before anything runs."""

    NEVER = "no schedule can make it true"
    ALWAYS = "it is true wherever it is asked"

    def __str__(self) -> str:
        return self.value


class _Undecided(Exception):
    """Linear arithmetic cannot tell, or not in time."""


def verdict(guard: Boolean, known: Mapping[str, symbols.Value] = MappingProxyType({})) -> Verdict | None:
    """What is certain of `guard` (that `symbols.check` passes) with what is `known` put in; None: nothing.

    It speaks of `Predicate.of(guard, known)` where a slot holds a value, and where all symbols that the guard mentions
    are known and finite. These hold there: 1 <= step < num_steps; progress = step / (num_steps - 1); 0 <= layer <
    num_layers; 1 <= age <= step, since each step asks once; 0 <= streak < age, since each step after the computation
    reuses at most once, and a covered one does not count; sigma, snr and changes are >= 0. A guard that could hold
    at step 0 alone is NEVER: no slot holds a value there. `known` must agree with all of this. Who tells one step_index
    twice asks a step twice, at age 0: for that this is no proof, so that NEVER may make a site compute, which is always
    right, and ALWAYS is for reports.

    Sound, not complete: None where the guard is too large, and often where it is not linear. Raises nothing
    for a guard that `symbols.check` passes.
    """
    if any(True for _ in itertools.islice(sympy.preorder_traversal(guard), MAX_NODES, None)):
        return None
    try:
        left = symbols.partially_evaluate(guard, known)
        groups = [group for group in (_TIME, _PLACE) if any(f.free_symbols & left.free_symbols for f in group)]
        facts = tuple(symbols.partially_evaluate(fact, known) for group in groups for fact in group)
        return _verdict(left, facts)
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return None  # sympy's own limits, such as a comparison with what is not a number


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
    """Whether the guard may be true (or, unless it `holds`, anything but true). Raises _Undecided."""
    work = itertools.count(1)
    given = [_cubes(fact, True, lenient=True) for fact in facts]
    for cubes in itertools.product(*given, _cubes(guard, holds, lenient=holds)):
        rows = list(itertools.chain(*cubes))
        if _feasible(_tightest([*rows, *_bounds(rows)], work), work):
            return True
    return False


# Conjunctions


def _cubes(formula: Boolean, holds: bool, lenient: bool) -> list[list[Row]]:
    """The disjunctive normal form of `formula`, or of its negation unless it `holds`.

    A part that is not understood may hold where `lenient`. Else it raises _Undecided: where Python raises in evaluating
    such a part neither it nor its negation holds, nor does the guard around it.
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


def _comparison(formula: Boolean, holds: bool) -> list[list[Row]]:
    """A comparison, or its negation, as conjunctions of inequalities; "other than" has two. Raises _Undecided."""
    if not isinstance(formula, Relational):
        raise _Undecided
    relation = formula if holds else formula.negated
    under = _sum(_side(relation.lhs), _negative(_side(relation.rhs)))
    over = _negative(under)
    cubes: dict[type[Relational], list[list[Row]]] = {
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
    """One side of a comparison. Python compares a float with an int, a Fraction or a float exactly, but rounds what it
    computes of floats: they are understood only where they stand alone."""
    if isinstance(side, Symbol) and side not in _EXACT:
        return {side: Fraction(1)}
    if isinstance(side, sympy.Float):
        return {_ONE: Fraction(float(side))}
    return _linear(side)


def _linear(expr: Expr) -> Linear:
    """An expression that Python evaluates in exact numbers, without fail. Raises _Undecided for any other."""
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
    """The product, multiplied out; a product of unknowns is an unknown."""
    if len(a) * len(b) > MAX_TERMS:
        raise _Undecided
    return _sum(*({x * y: p * q} for (x, p), (y, q) in itertools.product(a.items(), b.items())))


# What holds of unknowns


def _bounds(rows: Iterable[Row]) -> list[Row]:
    """The bounds of the unknowns in `rows`, of those in these bounds, and so on."""
    found: list[Row] = []
    fresh, seen = list(rows), {_ONE}
    while fresh:
        unknowns = {unknown for form, _ in fresh for unknown in form} - seen
        fresh = [row for unknown in unknowns for row in _bounds_of(unknown)]
        found, seen = found + fresh, seen | unknowns
    return found


@lru_cache(maxsize=4096)
def _bounds_of(unknown: Expr) -> tuple[Row, ...]:
    least = [(sympy.S.Zero, unknown, False)] if unknown.is_nonnegative else []
    bounds = [*least, *_function_bounds(unknown), *_product_bounds(unknown)]
    return tuple((_sum(_side(low), _negative(_side(high))), strict) for low, high, strict in bounds)


def _function_bounds(unknown: Expr) -> Iterator[tuple[Expr, Expr, bool]]:
    """(low, high, strict) for each low <= high, or low < high, that a function's definition implies."""
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
    """A product of symbols, none of which is negative: it grows with each of them."""
    factors = unknown.as_powers_dict() if isinstance(unknown, (sympy.Mul, sympy.Pow)) else {}
    if all(isinstance(factor, Symbol) for factor in factors):
        for factor in factors:
            rest = unknown / factor
            yield (_LEAST.get(factor, 0) * rest, unknown, False)
            if factor == progress:
                yield (unknown, rest, False)


# Elimination


def _tightest(rows: Iterable[Row], work: Iterator[int]) -> Rows:
    """The rows scaled to coprime coefficients, of those with equal ones the tightest."""
    found: Rows = {}
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


def _feasible(rows: Rows, work: Iterator[int]) -> bool:
    """Whether some real numbers meet all rows; False is also proven where only integers would not."""
    while True:
        constant, strict = rows.pop(frozenset(), (Fraction(-1), False))
        if constant > 0 or (constant == 0 and strict):
            return False
        if not rows:
            return True
        rows = _eliminate(rows, work)


def _eliminate(rows: Rows, work: Iterator[int]) -> Rows:
    """The rows that are left without the unknown that makes the fewest: each upper bound of it meets each lower one."""
    signs = Counter((unknown, q > 0) for terms in rows for unknown, q in terms)
    unknown = min((u for u, _ in signs), key=lambda u: signs[u, True] * signs[u, False])
    kept, sides = list[Row](), (list[Row](), list[Row]())
    for terms, (constant, strict) in rows.items():
        form: Linear = {u: Fraction(q) for u, q in terms} | {_ONE: constant}
        factor = form.get(unknown, Fraction(0))
        if factor:
            sides[factor > 0].append((_times(form, {_ONE: 1 / abs(factor)}), strict))
        else:
            kept.append((form, strict))
    met = ((_sum(low, high), a or b) for (low, a), (high, b) in itertools.product(*sides))
    return _tightest(itertools.chain(kept, met), work)
