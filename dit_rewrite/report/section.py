"""A section of the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_rewrite.report.charts import Chart, Fold

Cells = Sequence[object]


@dataclass(frozen=True)
class Section:
    """A part of the page. The template shows the fields that are not empty, in this order.

    The first of ``rows`` is the head of a table. ``pictures`` are captions with data URIs.
    """

    id: str
    name: str
    lines: Sequence[str] = ()
    rows: Sequence[Cells] = ()
    pictures: Sequence[tuple[str, str]] = ()
    text: str = ""
    charts: Sequence[Chart] = ()
    folds: Sequence[Fold] = ()

    @property
    def is_empty(self) -> bool:
        contents = self.lines, self.rows[1:], self.pictures, self.text, self.charts, self.folds
        return not any(contents)
