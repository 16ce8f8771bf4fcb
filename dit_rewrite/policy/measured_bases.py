"""Bases whose weights follow from what a probe shows at this very step, and not from the places alone.

Such a basis has `measures`, the names of the symbols that it needs (`dit_rewrite.guards`), and its `weights` are given
their values behind the order. Where one is not known or not finite there is no forecast: the site computes. They are
asked for where the order is above 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.guards.symbols import advance
from dit_rewrite.policy.bases import KINDS
from dit_rewrite.policy.strategies import is_number


@dataclass(frozen=True)
class Aligned:
    """DiCache (arXiv 2508.17356): as far along the line through the last two computed values as a probe has gone on its
    own (`guards.advance`), within `least` and `most`.

    At 1 that is the newest value, at 0 the one before. The order does not matter above 0. Raises BadParameter.
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
        """The symbol of how far the probe has gone."""
        return (advance(self.probe).name,)

    def history(self, order: int) -> int:
        return 2 if order else 1

    def weights(self, places: Sequence[float], place: float, order: int, *measured: float) -> list[float]:
        if order == 0:
            return [1.0]
        (gone,) = measured
        share = min(max(gone, self.least), self.most)
        return [share, 1 - share]


MEASURED_KINDS: dict[str, type] = {**KINDS, "aligned": Aligned}  # the bases that can be saved
