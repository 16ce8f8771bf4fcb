"""Tables of numbers in guards: ``table((1.0, 0.97, 0.95), step) > 0.96``.

If an index is out of range, the table has no value, and a guard that mentions it does not hold.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy

from dit_rewrite.errors import BadParameter

MAX_VALUES = 4096

Rows = tuple[Any, ...]  # of floats, or of Rows


class Values(sympy.Atom):  # type: ignore[misc]  # sympy has no types
    """The numbers of a table as one leaf of an expression, because sympy walks every node of an expression often."""

    __slots__ = ("rows",)

    def __new__(cls, rows: Rows) -> Values:
        self: Values = sympy.Atom.__new__(cls)
        self.rows = rows
        return self

    def _hashable_content(self) -> tuple[Any, ...]:
        return (self.rows,)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.rows,)

    def _sympystr(self, printer: Any) -> str:
        return repr(self.rows)


class table(sympy.Function):  # type: ignore[misc]  # written like sympy's own functions
    """An element of `values`: ``table((0.1, 0.2), step)``, or ``table(((0.1,), (0.2, 0.3)), step, age - 1)``.

    Rows may have different lengths. If an index is out of range, the guard does not hold. Raises BadParameter unless
    `values` are at most 4096 finite numbers, nested as deep as there are indices, and each index is an integer
    expression.
    """

    is_real = True
    is_commutative = True

    def __new__(cls, values: Any, *indices: Any) -> Any:
        if isinstance(values, Values):  # rebuilt by sympy
            return super().__new__(cls, values, *indices)
        places = [sympy.sympify(index) for index in indices]
        if not places or not all(isinstance(place, sympy.Expr) and place.is_integer for place in places):
            raise BadParameter("table", "indices", indices, "whole numbers, such as `step` or `age - 1`")
        return super().__new__(cls, Values(_rows(values, len(places))), *places)

    @classmethod
    def eval(cls, values: Values, *indices: sympy.Expr) -> sympy.Float | None:
        """Return the element if all indices are numbers within range. None keeps the call unevaluated."""
        if not all(index.is_Integer for index in indices):
            return None
        try:
            return sympy.Float(look_up(values.rows, *map(int, indices)))
        except ValueError:
            return None


def _rows(values: object, depth: int) -> Rows:
    allowed = f"at most {MAX_VALUES} finite numbers, in rows as deep as there are indices"
    budget = iter(range(2 * MAX_VALUES))  # rows count too, because empty rows take memory

    def read(value: Any, level: int) -> Any:
        if next(budget, None) is None:
            raise ValueError
        if level == depth:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError
            return float(value) + 0.0  # adding 0.0 turns -0.0 into 0.0
        if not isinstance(value, tuple | list):
            raise ValueError
        return tuple(read(item, level + 1) for item in value)

    try:
        rows: Rows = read(values, 0)
    except (ValueError, OverflowError):
        rows = ()
    if not 0 < sum(1 for _ in numbers(rows)) <= MAX_VALUES:
        raise BadParameter("table", "values", values if len(repr(values)) < 200 else "…", allowed)
    return rows


def numbers(rows: Rows) -> Iterator[float]:
    """Yield the numbers of a table."""
    for row in rows:
        if isinstance(row, tuple):
            yield from numbers(row)
        else:
            yield row


def look_up(rows: Any, *indices: int) -> float:
    """Return the element at `indices`. Raises ValueError if one is out of range, TypeError if one is not an integer."""
    for index in map(operator.index, indices):
        if not 0 <= index < len(rows):
            raise ValueError(f"the table has no row {index}")
        rows = rows[index]
    return float(rows)


def errors_since(ratios: Sequence[float], reach: int) -> Rows:
    """Return the table of `symbols.accumulated_error`, indexed by step and age - 1.

    Raises BadParameter unless `ratios` are finite numbers and `reach` is a positive integer.
    """
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 1:
        raise BadParameter("accumulated_error", "reach", reach, "a whole number >= 1")
    known = _rows(ratios, 1)
    ends = range(1, len(known) + 1)
    return tuple(tuple(_error(known[i - n : i]) for n in range(1, min(i, reach + 1))) for i in ends)


def _error(ratios: Sequence[float]) -> float:
    """Return the sum of |1 - product of the ratios so far|, in the order of the steps."""
    product, total = 1.0, 0.0
    for ratio in ratios:
        product *= ratio
        total += abs(1.0 - product)
    return total
