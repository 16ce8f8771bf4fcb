"""The folder that `compile(dump=...)` writes: each graph after each pass, and its diff to the graph before the pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import fx

from dit_rewrite.compiler.pipeline import PASSES
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.pipeline import Watch
from dit_rewrite.passes.rewrite.printing import Snapshot


@dataclass(frozen=True)
class Dump:
    """Writes a folder for each captured graph: ``graph0/00_captured.py``, ``graph0/01_find_sites.txt`` and so on.

    A file is written as soon as its pass ends, so that the files are also there if a later pass fails. If a pass does
    not change the graph, no graph is written.
    """

    folder: Path

    def begin(self, graph: int, captured: Captured) -> Watch:
        """Write the captured graph. The callback writes the results of the passes."""
        folder = self.folder / f"graph{graph}"
        folder.mkdir(parents=True, exist_ok=True)
        return _Steps(folder, "00_captured", captured.gm, "{number:02d}_{name}")

    def lowering(self, graph: int, name: str, gm: fx.GraphModule) -> Watch:
        """Write a straight-line graph. The callback writes the results of the passes before lowering."""
        stem = f"{len(PASSES) + 1:02d}_{name}"
        return _Steps(self.folder / f"graph{graph}", stem, gm, stem + "_{name}")


class _Steps:
    """Writes the initial graph, and the results of the passes over it. `names` formats the file name of a pass."""

    def __init__(self, folder: Path, stem: str, gm: fx.GraphModule, names: str) -> None:
        self.folder, self.names, self.last = folder, names, stem
        self.before = Snapshot.of(gm)
        (folder / f"{stem}.py").write_text(self.before.text + "\n")

    def __call__(self, number: int, name: str, gm: fx.GraphModule, result: object) -> None:
        stem = self.names.format(number=number, name=name)
        described = getattr(result, "describe", None)
        if described is not None:
            (self.folder / f"{stem}.txt").write_text("\n".join(described()) + "\n")
        now = Snapshot.of(gm)
        if now != self.before:
            (self.folder / f"{stem}.py").write_text(now.text + "\n")
            (self.folder / f"{stem}.diff").write_text(self.before.diff(now, (self.last, stem)))
            self.before, self.last = now, stem
