"""The result of `tune`: its trials and their front, as a table, JSON, a plot, and files of policies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_rewrite.errors import MissingExtra
from dit_rewrite.policy.files import write_whole
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.serialise import to_json


@dataclass(frozen=True)
class Point:
    """A trial: its number, its parameters, the values of the objectives, and its policy."""

    number: int
    parameters: dict[str, Any]
    values: dict[str, float]
    policy: Policy

    @property
    def file(self) -> str:
        return f"trial-{self.number:03d}.json"


@dataclass(frozen=True)
class Front:
    """All finished trials of a study over ``objectives``, and the number of pruned ones."""

    objectives: tuple[str, ...]
    points: tuple[Point, ...]
    pruned: int = 0

    @property
    def best(self) -> tuple[Point, ...]:
        """The trials that no other dominates, by the last objective; of equal ones the first."""
        kept = [
            p for i, p in enumerate(self.points) if not any(self._beats(q, j, p, i) for j, q in enumerate(self.points))
        ]
        return tuple(sorted(kept, key=lambda p: p.values[self.objectives[-1]]))

    def _beats(self, one: Point, i: int, other: Point, j: int) -> bool:
        """Return whether a trial is no worse than another in any objective, and better in one or earlier."""
        a, b = ([point.values[name] for name in self.objectives] for point in (one, other))
        return all(x <= y for x, y in zip(a, b, strict=True)) and (a != b or i < j)

    def table(self, points: Sequence[Point] | None = None) -> str:
        """Return the front, or other points, as a Markdown table."""
        points = self.best if points is None else points
        names = list(dict.fromkeys(name for point in points for name in point.parameters))
        lines = [["trial", *names, *self.objectives]]
        for point in points:
            shown = [str(point.parameters.get(name, "")) for name in names]
            shown = [
                f"{float(s):.4g}" if isinstance(point.parameters.get(n), float) else s
                for n, s in zip(names, shown, strict=True)
            ]
            lines.append([str(point.number), *shown, *(f"{point.values[name]:.4g}" for name in self.objectives)])
        rows = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])

    def to_json(self) -> str:
        """Return all trials as JSON, with a mark on those of the front."""
        best = {point.number for point in self.best}
        trials = [
            {"trial": p.number, "parameters": p.parameters, "values": p.values, "front": p.number in best,
             **({"policy": p.file} if p.number in best else {})}
            for p in self.points
        ]  # fmt: skip
        return json.dumps({"objectives": self.objectives, "pruned": self.pruned, "trials": trials}, indent=1)

    def save(self, folder: str | Path) -> Path:
        """Write ``front.json``, ``front.md`` and the policy of each point of the front, for `generate --policy`."""
        folder = Path(folder)
        write_whole(folder / "front.json", self.to_json() + "\n")
        write_whole(folder / "front.md", self.table() + "\n")
        for point in self.best:
            write_whole(folder / point.file, to_json(point.policy) + "\n")
        return folder

    def plot(self, path: str | Path) -> Path:
        """Draw the first two objectives of all trials, and the front. Raises MissingExtra without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtra("matplotlib", "the plot of a front", "benchmark") from error
        across, up = self.objectives[-1], self.objectives[0]
        axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
        axes.scatter([p.values[across] for p in self.points], [p.values[up] for p in self.points], s=12, color="0.6")
        axes.step([p.values[across] for p in self.best], [p.values[up] for p in self.best], "o-", where="post")
        axes.set(xlabel=across, ylabel=up)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return Path(path)
