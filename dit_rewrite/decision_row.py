"""The one type that the passes, the compiler and the run time share: the decisions for all sites of a graph."""

from __future__ import annotations

DecisionRow = tuple[bool, ...]  # for each guarded site, True if it or a site around it is reused
