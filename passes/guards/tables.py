"""Tables of numbers in guards: ``table((1.0, 0.97, 0.95), step) > 0.96``.

Outside of its rows a table has no value, and a guard that mentions it is not proven there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy

from dit_rewrite.errors import BadParameter

MAX_VALUES = 4096

Rows = tuple[Any, ...]  # of floats, or of further rows


class Values(sympy.Atom):  # type: ignore[misc]  # sympy has no types
    """The numbers of a table, as one leaf of an expression: thousands of nodes would be walked again and again."""

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
    """The number of `values` at a place: ``table((0.1, 0.2), step)``, with rows ``table(((0.1,), (0.2, 0.3)), step,
    age - 1)``. Rows may be of different lengths; outside of them a guard is not proven.

    Raises BadParameter unless the values are at most 4096 finite numbers, in rows as deep as there are indices, and
    each index is a whole number by what it is made of.
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
        """The value at known places; None, which leaves it as it is, elsewhere and outside."""
        if not all(index.is_Integer for index in indices):
            return None
        try:
            return sympy.Float(look_up(values.rows, *map(int, indices)))
        except ValueError:
            return None


def _rows(values: object, depth: int) -> Rows:
    allowed = f"at most {MAX_VALUES} finite numbers, in rows as deep as there are indices"
    budget = iter(range(2 * MAX_VALUES))  # rows count too: none of them is free

    def read(value: Any, level: int) -> Any:
        if next(budget, None) is None:
            raise ValueError
        if level == depth:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError
            return float(value) + 0.0  # -0.0 is 0.0, and is written like it
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
    """All the numbers of a table."""
    for row in rows:
        if isinstance(row, tuple):
            yield from numbers(row)
        else:
            yield row


def look_up(rows: Any, *indices: int) -> float:
    """The number at a place; raises ValueError outside, TypeError for what is no whole number."""
    for index in map(operator.index, indices):
        if not 0 <= index < len(rows):
            raise ValueError(f"the table has no row {index}")
        rows = rows[index]
    return float(rows)


def errors_since(ratios: Sequence[float], reach: int) -> Rows:
    """For each step, and each of the last `reach` steps that may have computed before it: see
    `guards.accumulated_error`."""
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 1:
        raise BadParameter("accumulated_error", "reach", reach, "a whole number >= 1")
    known = _rows(ratios, 1)
    ends = range(1, len(known) + 1)
    return tuple(tuple(_error(known[i - n : i]) for n in range(1, min(i, reach + 1))) for i in ends)


def _error(ratios: Sequence[float]) -> float:
    """Summed in the order in which the steps come."""
    product, total = 1.0, 0.0
    for ratio in ratios:
        product *= ratio
        total += abs(1.0 - product)
    return total
