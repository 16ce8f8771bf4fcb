"""Dimensions as products of factors, and the equalities between them that the ops of a graph require."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import SymInt, Tensor, fx

FIRST_PRIME = 3000  # data-dependent sizes stand for distinct primes from this one on, which no other size is


@dataclass(frozen=True)
class Factor:
    """A factor of a dimension, and its captured size.

    ``parts`` are the dimensions that were concatenated, in order. ``fixed``: a number that no input changes, since it
    is the width of a weight. Another number may have been computed for the captured size, as a table of positions is.
    """

    expression: sympy.Expr
    size: int
    parts: tuple[Dimension, ...] = ()
    fixed: bool = False


Dimension = tuple[Factor, ...]
Shape = tuple[Dimension, ...]


def size_of(dimension: Dimension) -> int:
    """Return the captured size."""
    return math.prod(factor.size for factor in dimension)


def constant(size: int) -> Dimension:
    """Return a dimension of a fixed size."""
    return () if size == 1 else (Factor(sympy.Integer(size), size),)


def fixed(dimension: Dimension) -> Dimension:
    """Return the dimension of a weight's result: its numbers are fixed."""
    return tuple(replace(factor, fixed=factor.expression.is_number) for factor in dimension)


def product(dimension: Dimension) -> sympy.Expr:
    """Return the size as an expression."""
    return sympy.Mul(*(factor.expression for factor in dimension))


def _aligned(a: Dimension, b: Dimension) -> Iterator[tuple[Dimension, Dimension]]:
    """Yield the smallest successive parts of two equal dimensions that have equal sizes, factors or summands."""
    summands = [factor.parts for factor in (*a, *b)] if len(a) == len(b) == 1 else []
    sizes = [[*map(size_of, parts)] for parts in summands]
    if sizes and sizes[0] == sizes[1] != []:
        yield from zip(*summands, strict=True)
        return
    left, right = list(a), list(b)
    while left or right:
        one, other = [left.pop(0)] if left else [], [right.pop(0)] if right else []
        while size_of(tuple(one)) != size_of(tuple(other)):
            shorter, rest = (one, left) if size_of(tuple(one)) < size_of(tuple(other)) else (other, right)
            shorter.append(rest.pop(0))
        yield tuple(one), tuple(other)


class Sizes:
    """The symbols of a graph's sizes, and the shapes of its tensors.

    ``captured`` has the size of each symbol at capture, None if it depends on data; ``origin`` has the input and the
    dimension that a symbol comes from; ``equated`` has the pairs of different dimensions that ops require to be equal.
    """

    def __init__(self) -> None:
        self.captured: dict[sympy.Symbol, int | None] = {}
        self.origin: dict[sympy.Symbol, tuple[str, int]] = {}
        self.equated: set[tuple[Dimension, Dimension]] = set()
        self.shapes: dict[fx.Node, Any] = {}  # a list of shapes for an op with several results
        self._unexplained: dict[sympy.Symbol, sympy.Expr] = {}  # and the captured sizes
        self._equal: dict[sympy.Symbol, sympy.Expr] = {}
        self._primes: dict[sympy.Symbol, sympy.Integer] = {}
        self._resolved: dict[sympy.Expr, sympy.Expr] = {}  # after the whole graph was followed
        self._of_data: dict[int, sympy.Expr] = {}  # by the number that stands for the size

    def of(self, argument: Any) -> Shape:
        """Return the shape of an argument of an op; a number has none."""
        found: Shape = self.shapes.get(argument, ()) if isinstance(argument, fx.Node) else ()
        return found

    def number(self, size: int | SymInt) -> int:
        """Return a size as a number: the captured one, with a prime for each data-dependent symbol."""
        if isinstance(size, int):
            return size
        if size.node.hint is not None:
            return int(size.node.hint)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols - set(self._primes), key=str):
            self._primes[symbol] = sympy.Integer(sympy.prime(FIRST_PRIME + len(self._primes)))
            self.captured[symbol] = None
        number = int(expression.xreplace(self._primes))
        self._of_data[number] = expression
        return number

    def numbers(self, value: Tensor) -> list[int]:
        """Return the sizes of a tensor as numbers."""
        return [self.number(size) for size in value.shape]

    def input(self, node: fx.Node, sizes: Sequence[int]) -> Shape:
        """Return the shape of an input, with new symbols. A size of 1 is broadcast, so it is fixed, but for a batch."""
        found = []
        for axis, size in enumerate(sizes):
            symbol = sympy.Symbol(f"{node.name}_{axis}", integer=True, positive=True)
            varies = size > 1 or (axis == 0 and len(sizes) > 1)
            if varies:
                self.captured[symbol], self.origin[symbol] = size, (node.name, axis)
            found.append((Factor(symbol, size),) if varies else constant(size))
        return tuple(found)

    def plain(self, size: int) -> Dimension:
        """Return a dimension as it was captured: a number, or an expression of sizes that depend on data."""
        return (Factor(self._of_data[size], size),) if size in self._of_data else constant(size)

    def fresh(self, size: int) -> Dimension:
        """Return a dimension that an equal one may explain later. Otherwise it is as it was captured."""
        if size == 1:
            return ()
        symbol = sympy.Symbol(f"_{len(self._unexplained)}", integer=True, positive=True)
        self._unexplained[symbol] = product(self.plain(size))
        return (Factor(symbol, size),)

    def one_of(self, equal: Sequence[Dimension]) -> Dimension:
        """Return one of several equal dimensions, preferably one that varies, and note that they are equal."""
        best = max(equal, key=self._variety)
        for other in equal:
            self.equate(best, other)
        return best

    def _variety(self, dimension: Dimension) -> tuple[bool, int]:
        symbols = product(dimension).free_symbols
        unexplained = symbols & set(self._unexplained)
        return bool(symbols - unexplained), -len(unexplained)

    def equate(self, a: Dimension, b: Dimension, fixed: bool = False) -> None:
        """Note that two dimensions are equal. `fixed`: if one of them is a number, the other is always that number."""
        if size_of(a) != size_of(b) or size_of(a) == 1:
            return
        if a != b:
            self.equated.add((a, b))
        fixed |= any(factor.fixed for factor in (*a, *b))
        parts = list(_aligned(a, b))
        if len(parts) > 1 or parts != [(a, b)]:
            for one, other in parts:
                self.equate(one, other, fixed)
            return
        left, right = self._reduced(product(a)), self._reduced(product(b))
        pairs = [(name, meaning) for name, meaning in ((left, right), (right, left)) if self._can_mean(name, meaning)]
        for name, meaning in sorted(pairs, key=lambda pair: pair[0] not in self._unexplained):
            if name in self._unexplained or meaning.free_symbols - set(self._unexplained) or fixed:
                self._equal[name] = meaning
                return
        for expression, number in ((left, right), (right, left)):
            if fixed and number.is_number and len(expression.free_symbols) == 1:
                (symbol,) = expression.free_symbols
                size = self.captured.get(symbol)
                self._equal.update({} if size is None else {symbol: sympy.Integer(size)})

    @staticmethod
    def _can_mean(name: sympy.Expr, meaning: sympy.Expr) -> bool:
        return isinstance(name, sympy.Symbol) and name not in meaning.free_symbols

    def _reduced(self, expression: sympy.Expr) -> sympy.Expr:
        while (after := expression.xreplace(self._equal)) != expression:
            expression = after
        return expression

    def resolved(self, expression: sympy.Expr) -> sympy.Expr:
        """Return an expression after all equalities. Sizes that nothing explains are as they were captured."""
        if expression not in self._resolved:
            self._resolved[expression] = sympy.expand(self._reduced(expression).xreplace(self._unexplained))
        return self._resolved[expression]

    def at_capture(self, expression: sympy.Expr) -> sympy.Expr:
        """Return the value of an expression at the captured sizes, with primes for those that depend on data."""
        known = {symbol: sympy.Integer(size) for symbol, size in self.captured.items() if size is not None}
        return expression.xreplace({**known, **self._primes})
