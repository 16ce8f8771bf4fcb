"""Bases whose weights depend on a probe at the current step, and not on the places alone.

Such a basis has an attribute `measures`, the names of the symbols that it needs (`dit_rewrite.guards`). `weights` takes
their values after `order`. If a value is unknown or not finite, the site computes. Order 0 needs no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.guards.symbols import advance
from dit_rewrite.policy.bases import KINDS
from dit_rewrite.policy.core_strategies import is_number
from dit_rewrite.policy.fitted import Fitted


@dataclass(frozen=True)
class Aligned:
    """DiCache (arXiv 2508.17356): extrapolates the last two computed values linearly, as far as a probe has advanced
    along the line through its own two values (`guards.advance`), clamped to [`least`, `most`].

    An advance of 1 gives the newest value, 0 the one before. All orders above 0 are equal. Raises BadParameter.
    """

    probe: str = "first_block"
    least: float = 1.0
    most: float = 1.5

    def __post_init__(self) -> None:
        advance(self.probe)
        for name, least in (("least", -math.inf), ("most", self.least)):
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value) or value < least:
                raise BadParameter("Aligned", name, value, "a finite number; least <= most")

    @property
    def measures(self) -> tuple[str, ...]:
        """The symbol of the probe's advance."""
        return (advance(self.probe).name,)

    def history(self, order: int) -> int:
        return 2 if order else 1

    def weights(self, places: Sequence[float], place: float, order: int, *measured: float) -> list[float]:
        if order == 0:
            return [1.0]
        (gone,) = measured
        share = min(max(gone, self.least), self.most)
        return [share, 1 - share]


MEASURED_KINDS: dict[str, type] = {**KINDS, "aligned": Aligned, "fitted": Fitted}  # the bases that can be saved
