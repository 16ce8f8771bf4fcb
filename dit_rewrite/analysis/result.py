"""The result of an analysis: statistics over prompts, the profiles of the first prompts, and reuse errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.analysis import store
from dit_rewrite.analysis.statistics import MEASURES, Row, Table
from dit_rewrite.errors import BadAnalysis, BadArgument, OtherAnalysis, OverlappingAnalyses

KEPT = 16  # prompts whose profiles are kept one by one, to compare prompts with each other


@dataclass
class ReuseErrors:
    """The error that reusing one site at one step alone causes in the final image: the relative L2 distance from the
    image without reuse, as the mean over prompts, (sites, steps). NaN where it was not measured."""

    sites: list[str]
    values: Tensor
    prompts: int

    def of(self, site: str) -> Tensor:
        """Return the errors of a site by step."""
        return self.values[self.sites.index(site)]


@dataclass
class Analysis:
    """How much the tensors of a model change between steps; see `analyze`.

    ``model`` is the model's fingerprint and ``name`` its class. ``settings`` are those of the measurement; "keys" says
    where keys and values were tapped. ``table`` has the statistics over the prompts with the numbers ``prompts``.
    ``profiles`` has the measures of each of the first prompts alone, as tensors (rows, steps, measures). ``refused``
    names the tensors that were not measured, with the reasons.
    """

    model: str
    name: str
    settings: dict[str, Any]
    table: Table = field(default_factory=Table)
    prompts: list[int] = field(default_factory=list)
    profiles: dict[int, Tensor] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    errors: ReuseErrors | None = None

    @property
    def steps(self) -> int:
        return self.table.steps

    def rows(self, **conditions: Any) -> list[Row]:
        """Return the rows whose fields equal `conditions`: ``rows(quantity="keys", modality="image", head=None)``.

        Without a condition on them, only rows of distance 1 and of all heads together are returned.
        """
        wanted = {"distance": 1, "head": None, **conditions}
        unknown = wanted.keys() - set(Row._fields)
        if unknown:
            raise BadArgument(
                "Analysis.rows", min(unknown), conditions[min(unknown)], f"one of {', '.join(Row._fields)}"
            )
        return [row for row in self.table.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    def mean(self, row: Row, measure: str = "l1") -> Tensor:
        """Return the mean of a measure over the prompts, by step; NaN where there is none."""
        return self.table.means[self.table.index(row), :, _number(measure)]

    def overall(self, quantity: str, measure: str = "l1") -> float:
        """Return the mean of a measure of a quantity over its rows, the steps and the prompts."""
        return float(torch.stack([self.mean(row, measure) for row in self.rows(quantity=str(quantity))]).nanmean())

    def deviation(self, row: Row, measure: str = "l1") -> Tensor:
        """Return the standard deviation of a measure over the prompts, by step."""
        return self.table.deviations[self.table.index(row), :, _number(measure)]

    def profile(self, prompt: int, row: Row, measure: str = "l1") -> Tensor:
        """Return a measure of one of the kept prompts, by step."""
        return self._profile(prompt)[self.table.index(row), :, _number(measure)]

    def _profile(self, prompt: int) -> Tensor:
        kept = self.profiles[prompt]
        wide = torch.full((len(self.table.rows), self.steps, len(MEASURES)), math.nan, dtype=torch.float64)
        wide[: kept.shape[0], : kept.shape[1]] = kept
        return wide

    def add(self, prompt: int, profiles: Sequence[Mapping[Row, Tensor]]) -> None:
        """Add the trajectories of one prompt. The profile of the first is kept, if it is among the first prompts."""
        for profile in profiles:
            self.table.add(profile)
        alone = Table.of(profiles[0])
        self.prompts = sorted([*self.prompts, prompt])
        self.profiles[prompt] = _arranged(alone.means, alone, self.table)
        self._forget()

    def _forget(self) -> None:
        for prompt in sorted(self.profiles)[KEPT:]:
            del self.profiles[prompt]

    @property
    def key(self) -> dict[str, Any]:
        """The model and the settings, which must be equal in analyses that are continued or merged."""
        return {"model": self.model, **self.settings}

    def check(self, other: Mapping[str, Any], what: object) -> None:
        """Raise OtherAnalysis unless `other` is the key of this analysis."""
        own = self.key
        differing = sorted(name for name in {*own, *other} if own.get(name) != other.get(name))
        if differing:
            raise OtherAnalysis(
                what, "; ".join(f"{n}: {own.get(n)!r:.40}, not {other.get(n)!r:.40}" for n in differing)
            )

    def save(self, path: str | Path) -> None:
        """Write the analysis as safetensors, atomically."""
        tensors = {"count": self.table.count, "mean": self.table.mean, "squares": self.table.squares}
        tensors |= {f"profile.{prompt}": self._profile(prompt) for prompt in self.profiles}
        header: dict[str, Any] = {"model": self.model, "name": self.name, "settings": self.settings}
        header |= {"rows": self.table.rows, "prompts": self.prompts, "refused": self.refused, "errors": {}}
        if self.errors is not None:
            header["errors"] = {"sites": self.errors.sites, "prompts": self.errors.prompts}
            tensors["errors"] = self.errors.values
        store.write(Path(path), header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        """Load a file that `save` wrote. Raises BadAnalysis for any other content, OSError if it cannot be read."""
        path = Path(path)
        header, tensors = store.read(path, _FIELDS)
        try:
            rows = [Row(*row) for row in header["rows"]]
            table = Table(rows, *(tensors[name] for name in ("count", "mean", "squares")))
            profiles = {int(n.partition(".")[2]): value for n, value in tensors.items() if n.startswith("profile.")}
            errors = None
            if header["errors"]:
                errors = ReuseErrors(header["errors"]["sites"], tensors["errors"], header["errors"]["prompts"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadAnalysis(path, f"its parts do not fit together ({error!r})") from None
        if len(set(rows)) != table.count.shape[0]:
            raise BadAnalysis(path, f"it has {len(rows)} rows, and statistics of {table.count.shape[0]}")
        named = header["prompts"], profiles, header["refused"]
        return cls(header["model"], header["name"], header["settings"], table, *named, errors)

    @staticmethod
    def merge(analyses: Sequence[Analysis]) -> Analysis:
        """Merge the analyses of different prompts, such as those of several processes. Reuse errors are left out.

        Raises BadArgument if there are none, OtherAnalysis or OverlappingAnalyses if they do not belong together.
        """
        if not analyses:
            raise BadArgument("Analysis.merge", "analyses", analyses, "at least one Analysis")
        return reduce(Analysis.merged, analyses)

    def merged(self, other: Analysis) -> Analysis:
        """Return the analysis of the prompts of both. Raises OtherAnalysis or OverlappingAnalyses."""
        self.check(other.key, f"the analysis of {other.name}")
        both = set(self.prompts) & set(other.prompts)
        if both:
            raise OverlappingAnalyses(min(both))
        table = Table()
        table.merge(self.table)
        table.merge(other.table)
        profiles = {p: _arranged(a._profile(p), a.table, table) for a in (self, other) for p in a.profiles}
        refused = list(dict.fromkeys([*self.refused, *other.refused]))
        prompts = sorted([*self.prompts, *other.prompts])
        found = Analysis(self.model, self.name, dict(self.settings), table, prompts, profiles, refused)
        found._forget()
        return found

    def __repr__(self) -> str:
        return f"Analysis of {self.name}: {len(self.prompts)} prompts, {self.steps} steps, {len(self.table.rows)} rows"


_FIELDS: Mapping[str, Any] = {
    "model": str, "name": str, "settings": dict, "rows": list, "prompts": list, "refused": list, "errors": dict,
}  # fmt: skip


def _number(measure: str) -> int:
    if measure not in MEASURES:
        raise BadArgument("Analysis", "measure", measure, f"one of {', '.join(MEASURES)}")
    return MEASURES.index(measure)


def _arranged(values: Tensor, own: Table, target: Table) -> Tensor:
    """Return values (rows, steps, measures) of one table in the order of another."""
    wide = torch.full((len(target.rows), target.steps, len(MEASURES)), math.nan, dtype=torch.float64)
    wide[target.select(own.rows), : own.steps] = values
    return wide
