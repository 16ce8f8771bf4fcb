"""Print guards in mathematical notation: ``snr > 0.5 ∧ step mod 3 ≠ 0``."""

from __future__ import annotations

import sympy
from sympy.logic.boolalg import Boolean
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from dit_rewrite.passes.guards.tables import numbers, table

SHOWN = 6  # a table with more values is abbreviated
_RELATIONS = {"==": "=", "!=": "≠", "<": "<", "<=": "≤", ">": ">", ">=": "≥"}


def show(guard: Boolean) -> str:
    """Return `guard` as one line of text. To save a guard, use `serialise.guard_text`, which can be parsed again."""
    text: str = _Notation().doprint(guard)
    return text


class _Notation(StrPrinter):
    def _print_Relational(self, expr: sympy.Rel) -> str:
        return f"{self._print(expr.lhs)} {_RELATIONS[expr.rel_op]} {self._print(expr.rhs)}"

    def _join(self, sign: str, expr: Boolean, level: int) -> str:
        parts = sorted(expr.args, key=sympy.default_sort_key)
        return f" {sign} ".join(self.parenthesize(part, level) for part in parts)

    def _print_And(self, expr: Boolean) -> str:
        return self._join("∧", expr, PRECEDENCE["And"])

    def _print_Or(self, expr: Boolean) -> str:
        return self._join("∨", expr, PRECEDENCE["Or"])

    def _print_Not(self, expr: Boolean) -> str:
        return f"¬{self.parenthesize(expr.args[0], PRECEDENCE['Not'])}"

    def _print_BooleanTrue(self, expr: Boolean) -> str:
        return "always"

    def _print_BooleanFalse(self, expr: Boolean) -> str:
        return "never"

    def _print_Mod(self, expr: sympy.Mod) -> str:
        return " mod ".join(self.parenthesize(part, PRECEDENCE["Mul"]) for part in expr.args)

    def _print_floor(self, expr: sympy.floor) -> str:
        return f"⌊{self._print(expr.args[0])}⌋"

    def _print_ceiling(self, expr: sympy.ceiling) -> str:
        return f"⌈{self._print(expr.args[0])}⌉"

    def _print_Abs(self, expr: sympy.Abs) -> str:
        return f"|{self._print(expr.args[0])}|"

    def _print_table(self, expr: table) -> str:
        values, *indices = expr.args
        count = sum(1 for _ in numbers(values.rows))
        shown = repr(values.rows) if count <= SHOWN else f"(… {count} values)"
        return f"table{shown}[{', '.join(map(self._print, indices))}]"

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))
