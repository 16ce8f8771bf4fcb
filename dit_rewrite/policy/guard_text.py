"""Guards as text, such as ``(step > 0) & Ne(Mod(step, 3), 0)``. Printing and parsing a guard gives an equal guard.

The parser accepts a whitelist of nodes of Python's syntax tree and never evaluates text. Names are the symbols of
`passes.guards.symbols`; functions are those of `FUNCTIONS` and `CONNECTIVES`; operators are ``+ - * / ** %``,
comparisons (also chained) and ``& | ^ ~`` (or ``and or not``). It refuses everything else by name, and expressions
that could grow too large.
"""

from __future__ import annotations

import ast
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean
from sympy.printing.str import StrPrinter

from dit_rewrite.errors import BadGuardText, ForeignName, UnwritableGuard
from dit_rewrite.passes.guards import symbols
from dit_rewrite.passes.guards.measurements import parse
from dit_rewrite.passes.guards.tables import table

MAX_TEXT = 20_000  # characters of a guard, not counting the values of its tables
MAX_TABLES = 200_000  # characters of the values of all tables
MAX_DEPTH = 48  # nesting depth of operators and functions
MAX_ARGUMENTS = 16  # per function; sympy compares the arguments of Min and Max pairwise
MAX_DEGREE = 64  # of a power; the value has at most three times as many digits

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Mod": sympy.Mod, "Min": sympy.Min, "Max": sympy.Max, "Abs": sympy.Abs,
    "floor": sympy.floor, "ceiling": sympy.ceiling, "sqrt": sympy.sqrt, "log": sympy.log,
    "Eq": sympy.Eq, "Ne": sympy.Ne, "Lt": sympy.Lt, "Le": sympy.Le, "Gt": sympy.Gt, "Ge": sympy.Ge,
}  # fmt: skip
CONNECTIVES: dict[str, Callable[..., Any]] = {
    "And": sympy.And, "Or": sympy.Or, "Not": sympy.Not, "Xor": sympy.Xor,
    "ITE": sympy.ITE, "Implies": sympy.Implies, "Equivalent": sympy.Equivalent,
}  # fmt: skip
COMPARISONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Gt: sympy.Gt, ast.GtE: sympy.Ge, ast.Lt: sympy.Lt, ast.LtE: sympy.Le, ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne,
}  # fmt: skip
JOINED: dict[type[ast.AST], Callable[..., Any]] = {
    ast.BitAnd: sympy.And, ast.BitOr: sympy.Or, ast.BitXor: sympy.Xor, ast.And: sympy.And, ast.Or: sympy.Or,
}  # fmt: skip


_TABLE_VALUES = re.compile(r"\btable\([-+.,e\d\s()\[\]]+")


def guard_text(guard: Boolean) -> str:
    """Return text that `parse_guard` parses to an equal guard. Raises UnwritableGuard if there is no such text."""
    text = _Printer().doprint(guard)
    try:
        again = parse_guard(text)
    except BadGuardText as error:
        raise UnwritableGuard(guard, error) from None
    if again != guard:
        raise UnwritableGuard(guard, f"`{again}`")
    return text


def parse_guard(text: str) -> Boolean:
    """Parse a guard. Raises BadGuardText, or ForeignName for a symbol or function that guards do not have.

    A symbol that simplification removes is an error: a guard may hold only if all symbols that it mentions are known,
    and the simplified guard would no longer mention this one.
    """
    reader = _Reader(text)
    length = len(_TABLE_VALUES.sub("table(", text))
    if length > MAX_TEXT or len(text) > MAX_TEXT + MAX_TABLES:
        reader.refuse(f"it has {length} characters, and {MAX_TEXT} are allowed")
    try:
        guard = reader.condition(ast.parse(text.strip(), mode="eval").body)
    except BadGuardText:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        reader.refuse(str(error) or type(error).__name__)
    gone = sorted(reader.mentioned - symbols.mentions(guard))
    if gone:
        reader.refuse(f"it does not depend on {', '.join(gone)}: it says `{guard}`")
    return guard


class _Reader:
    """Converts a syntax tree to a guard. It converts a chain of one operator at once, because sympy sorts and
    simplifies the chain as a whole."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.mentioned: set[str] = set()
        self.depth = 0

    def refuse(self, problem: str) -> typing.NoReturn:
        raise BadGuardText(self.text, problem, symbols.KNOWN, [*FUNCTIONS, "table", *CONNECTIVES])

    def foreign(self, name: str, kind: str) -> typing.NoReturn:
        raise ForeignName(self.text, name, kind, symbols.KNOWN, [*FUNCTIONS, "table", *CONNECTIVES])

    def condition(self, node: ast.expr) -> Boolean:
        """Convert a node that must be a Boolean expression."""
        value = self.read(node)
        if not isinstance(value, Boolean) or isinstance(value, sympy.Symbol):
            self.refuse(
                f"`{ast.unparse(node)}` is a number where a condition is needed (put comparisons in parentheses)"
            )
        return value

    def number(self, node: ast.expr) -> sympy.Expr:
        """Convert a node that must be a number. Values known to be infinite or not real are refused."""
        value = self.read(node)
        if not isinstance(value, sympy.Expr):
            self.refuse(
                f"`{ast.unparse(node)}` is a condition where a number is needed (put comparisons in parentheses)"
            )
        if value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo, sympy.I):
            self.refuse(f"`{ast.unparse(node)}` is not a real number")
        return value

    def read(self, node: ast.expr) -> Any:
        """Convert a node. Node types without a reader are refused."""
        readers: dict[type[ast.expr], Callable[[Any], Any]] = {
            ast.Constant: self.constant,
            ast.Name: self.name,
            ast.Call: self.call,
            ast.Compare: self.compare,
            ast.UnaryOp: self.unary,
            ast.BinOp: self.binary,
            ast.BoolOp: lambda n: JOINED[type(n.op)](*map(self.condition, n.values)),
        }
        reader = readers.get(type(node))
        if reader is None or self.depth == MAX_DEPTH:
            self.refuse(f"`{ast.unparse(node)}` is {'not allowed' if reader is None else 'nested too deeply'}")
        self.depth += 1
        value = reader(node)
        self.depth -= 1
        return value

    def constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bool):
            return sympy.true if node.value else sympy.false
        if not isinstance(node.value, int | float) or not math.isfinite(node.value):
            self.refuse(f"`{ast.unparse(node)}` is not a finite number")
        return sympy.Integer(node.value) if isinstance(node.value, int) else sympy.Float(node.value)

    def name(self, node: ast.Name) -> Any:
        if node.id in ("true", "false"):
            return sympy.true if node.id == "true" else sympy.false
        if node.id not in symbols.SYMBOLS:
            self.foreign(node.id, "symbol")
        self.mentioned.add(node.id)
        return symbols.SYMBOLS[node.id]

    def call(self, node: ast.Call) -> Any:
        written = ast.unparse(node)
        measured = parse(written)
        if measured is not None:  # a symbol whose name looks like a call
            self.mentioned.add(measured.name)
            return measured.symbol
        if isinstance(node.func, ast.Name) and node.func.id == "table" and node.args and not node.keywords:
            return table(ast.literal_eval(node.args[0]), *map(self.number, node.args[1 : MAX_ARGUMENTS + 1]))
        if not isinstance(node.func, ast.Name):
            self.refuse(f"`{ast.unparse(node.func)}` is not allowed")
        function = FUNCTIONS.get(node.func.id) or CONNECTIVES.get(node.func.id)
        if function is None:
            self.foreign(node.func.id, "function")
        if node.keywords or len(node.args) > MAX_ARGUMENTS:
            self.refuse(f"`{written}` has a keyword argument, or more than {MAX_ARGUMENTS} arguments")
        return function(*map(self.number if node.func.id in FUNCTIONS else self.condition, node.args))

    def compare(self, node: ast.Compare) -> Boolean:
        sides = [self.number(side) for side in (node.left, *node.comparators)]
        if any(type(op) not in COMPARISONS for op in node.ops):
            self.refuse(f"`{ast.unparse(node)}` has a comparison other than < <= > >= == !=")
        return sympy.And(*(COMPARISONS[type(op)](*sides[i : i + 2]) for i, op in enumerate(node.ops)))

    def unary(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Invert | ast.Not):
            return sympy.Not(self.condition(node.operand))
        value = self.number(node.operand)
        return -value if isinstance(node.op, ast.USub) else value

    def binary(self, node: ast.BinOp) -> Any:
        if type(node.op) in JOINED:
            return JOINED[type(node.op)](*(self.condition(part) for _, part in _chain(node, type(node.op))))
        if isinstance(node.op, ast.Add | ast.Sub):
            parts = [(op, self.number(part)) for op, part in _chain(node, ast.Add, ast.Sub)]
            return sympy.Add(*(-part if op is ast.Sub else part for op, part in parts))
        if isinstance(node.op, ast.Mult | ast.Div):
            return sympy.Mul(*self.factors(node))
        if isinstance(node.op, ast.Mod):
            return sympy.Mod(self.number(node.left), self.number(node.right))
        if isinstance(node.op, ast.Pow):
            return self.power(node)
        return self.refuse(f"`{ast.unparse(node)}` uses an operator that is not allowed")

    def factors(self, node: ast.expr, sign: int = 1) -> Iterator[sympy.Expr]:
        """Yield the factors of a product, including those in denominators (``1/(2*x)`` has 1/2 and 1/x)."""
        for op, part in _chain(node, ast.Mult, ast.Div):
            power = -sign if op is ast.Div else sign
            if op is None and isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub):
                yield sympy.Integer(-1)  # sign of the whole product, not of its first factor
                part = part.operand
            if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult | ast.Div):
                yield from self.factors(part, power)
                continue
            value = self.number(part)
            if power < 0 and value.is_zero:
                self.refuse(f"`{ast.unparse(node)}` divides by zero")
            yield value**power

    def power(self, node: ast.BinOp) -> sympy.Expr:
        base, exponent = self.number(node.left), self.number(node.right)
        if base.is_Float and base > 0 and not exponent.is_Number:  # a float overflows instead of growing
            return base**exponent
        if not exponent.is_Number or not _degree(base) * abs(exponent) <= MAX_DEGREE:
            self.refuse(f"the power `{ast.unparse(node)}` could grow too large")
        return base**exponent


def _chain(node: ast.expr, *operators: type[ast.operator]) -> list[tuple[type[ast.operator] | None, ast.expr]]:
    """Return ``a + b - c`` as [(None, a), (Add, b), (Sub, c)], without recursion."""
    parts: list[tuple[type[ast.operator] | None, ast.expr]] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, operators):
        parts.append((type(node.op), node.right))
        node = node.left
    return [(None, node), *reversed(parts)]


def _degree(expression: sympy.Expr) -> float:
    """Return a bound of the expression's magnitude as a power of 1000, assuming symbols of at most 1000."""
    if expression.is_Float:
        return 1.0
    if expression.is_Rational:
        return math.log(max(abs(expression.p), expression.q, 2), 1000)
    if expression.is_Pow and not expression.exp.is_Number:
        return 1.0  # `power` accepts a symbolic exponent only for a float base
    if expression.is_Pow:
        return _degree(expression.base) * abs(float(expression.exp))
    degrees = [_degree(part) for part in expression.args]
    return max(1.0, sum(degrees) if expression.is_Mul else max(degrees, default=1.0))


class _Printer(StrPrinter):
    """sympy's printer, but with all digits of floats."""

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))
