"""Measurements that guards may use, and their symbols.

The name of a symbol is the text of its measurement, such as ``drift(modulated_input, rescale=(1.5, 0.0))``. Each
determines the other, so no table of symbols is needed.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import sympy

from dit_rewrite.errors import BadParameter

PROBES = ("first_block", "behind_first_block", "modulated_input", "self", "latent", "output")
ERRORS = ("verified", "self")  # the probes of forecast_error
ERROR: Final = "forecast_error"
CHANGES = ("similarity", "drift")
STATISTICS = (*CHANGES, "advance", ERROR)
_FIRST_BLOCKS = re.compile(r"(behind_)?first_(?:([2-9]|[1-9]\d{1,3})_blocks|block)")
MAX_COEFFICIENTS = 16  # of a polynomial

RATE: Final = "rate"
Filter = Literal["sea"]

Rescale = tuple[float, ...] | Literal["rate"]


@dataclass(frozen=True)
class Measurement:
    """A ``statistic`` of a ``probe``.

    ``rescale`` is applied to each change: the coefficients of a polynomial, highest power first, or "rate", which
    multiplies the change by the ratio of the output's change to the probe's change between the last two computed steps.
    ``filter`` is applied to the probe before. ``elementwise`` selects the mean of ratios instead of the ratio of means
    for a forecast error.
    """

    statistic: str
    probe: str
    rescale: Rescale | None = None
    filter: Filter | None = None
    elementwise: bool = False

    @classmethod
    def of(
        cls, statistic: str, probe: object, rescale: object = None, filter: object = None, elementwise: object = False
    ) -> Measurement:
        """Return a measurement. Raises BadParameter unless `statistic` has this probe and these options."""
        _check_probe(statistic, probe)
        allowed = {"rescale": statistic in CHANGES, "filter": statistic in CHANGES, "elementwise": statistic == ERROR}
        for name, value in (("rescale", rescale), ("filter", filter), ("elementwise", elementwise)):
            if value not in (None, False) and not allowed[name]:
                raise BadParameter(statistic, name, value, f"none: {statistic} has no such option")
        if not isinstance(elementwise, bool):
            raise BadParameter(statistic, "elementwise", elementwise, "True or False")
        if statistic in ("drift", "advance") and probe == "output":
            raise BadParameter(statistic, "probe", probe, "another probe: reused steps have no output to measure")
        if rescale == RATE and probe == "output":
            raise BadParameter(statistic, "rescale", rescale, "a polynomial, or None: the probe is the output itself")
        if filter not in (None, "sea"):
            raise BadParameter(statistic, "filter", filter, '"sea", or None')
        return cls(statistic, probe, _rescale(statistic, rescale), filter, elementwise)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The text that `parse` reads. Two measurements are equal if and only if their names are equal."""
        rescale = self.rescale if self.rescale == RATE else repr(self.rescale)
        options = [] if self.filter is None else [f"filter={self.filter}"]
        options += [] if self.rescale is None else [f"rescale={rescale}"]
        options += ["elementwise=True"] if self.elementwise else []
        return f"{self.statistic}({', '.join([self.probe, *options])})"

    @property
    def symbol(self) -> sympy.Symbol:
        assumptions = {"real": True} if self.may_be_negative else {"nonnegative": True}
        return sympy.Symbol(self.name, **assumptions)

    @property
    def reads_output(self) -> bool:
        """Whether the measurement reads outputs of the model at earlier steps."""
        return self.probe == "output" or self.rescale == RATE

    @property
    def may_be_negative(self) -> bool:
        """Whether the value may be negative. A change is never negative, but a polynomial of it may be."""
        return isinstance(self.rescale, tuple)


def _check_probe(statistic: str, probe: object) -> None:
    """Raise BadParameter unless `probe` is a probe of `statistic`."""
    if statistic == ERROR and probe not in ERRORS:
        raise BadParameter(statistic, "probe", probe, f"one of {', '.join(ERRORS)}")
    if statistic != ERROR and (not isinstance(probe, str) or not (probe in PROBES or blocks(probe))):
        raise BadParameter(statistic, "probe", probe, f"one of {', '.join(PROBES)}, or such as first_8_blocks")


def blocks(probe: str) -> tuple[int, bool] | None:
    """Return (number of first blocks, whether the name starts with ``behind_``) for a probe of the first blocks.

    Returns None for any other probe.
    """
    found = _FIRST_BLOCKS.fullmatch(probe)
    return None if found is None else (int(found[2] or 1), found[1] is not None)


def _rescale(statistic: str, value: object) -> Rescale | None:
    if value is None:
        return None
    if isinstance(value, str) and value == RATE:
        return RATE
    numbers = value if isinstance(value, tuple | list) and 0 < len(value) <= MAX_COEFFICIENTS else (None,)
    if not all(_is_finite(number) for number in numbers):
        allowed = f'up to {MAX_COEFFICIENTS} coefficients of a polynomial, highest power first, or "rate", or None'
        raise BadParameter(statistic, "rescale", value, allowed)
    return tuple(float(number) + 0.0 for number in numbers)  # adding 0.0 turns -0.0 into 0.0, so that names are equal


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


@lru_cache(maxsize=4096)
def parse(text: str) -> Measurement | None:
    """Return the measurement that `text` names, in any spelling, or None."""
    try:
        node = ast.parse(text, mode="eval").body
        return _read(node) if isinstance(node, ast.Call) else None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _read(node: ast.Call) -> Measurement | None:
    """Read a call such as ``similarity(self, rescale=(2.0, 0.0))``. Raises ValueError if an option is not valid."""
    if not isinstance(node.func, ast.Name) or node.func.id not in STATISTICS or len(node.args) != 1:
        return None
    options = {keyword.arg: _option(keyword.value) for keyword in node.keywords}
    return Measurement.of(node.func.id, _option(node.args[0]), **options)  # type: ignore[arg-type]


def _option(node: ast.expr) -> object:
    """Read a name or a literal."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


@lru_cache(maxsize=4096)
def measurement(name: str) -> Measurement | None:
    """Return the measurement whose symbol is called exactly `name`, or None."""
    found = parse(name)
    return found if found is not None and found.name == name else None
