"""``python -m dit_rewrite report``: write one HTML page about a model under a policy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dit_rewrite.analysis.charts import sections
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.cli.observe import observed
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.errors import BadOption
from dit_rewrite.policy.plan import Plan
from dit_rewrite.report.section import Section
from dit_rewrite.search.certificate import AutoPolicy, check_writable

PICTURES = (".png", ".svg")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``python -m dit_rewrite report``."""
    from dit_rewrite.report.page import Page  # needs the extra

    analysis = read_analyses(arguments.analysis)
    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    front = [] if arguments.front is None else read_front(arguments.front)
    figures = {} if arguments.figures is None else read_pictures(pictures_in(arguments.figures))
    images = read_pictures(arguments.images)
    check_writable(arguments.out)
    model: Any = observed(arguments, runs=2, timing=True)  # the first trajectory compiles
    page = Page(
        model.explain(),
        f"{type(model).__name__} under {arguments.policy}",
        described(model, arguments),
        model.stats().decisions,
        analysis,
        figures,
        plan,
        front,
        images,
        read_certificate(arguments.policy),
    )
    page.save(arguments.out)
    return Outcome(f"wrote {arguments.out}", {"file": arguments.out, "sections": [each.id for each in page.sections]})


def described(model: nn.Module, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the facts about the model that the page shows."""
    parameters = list(model.parameters())
    return {
        "model": arguments.model,
        "class": type(model).__name__,
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "dtypes": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        "device": str(parameters[0].device) if parameters else "",
        "steps": arguments.steps,
        "backend": arguments.backend,
    }


def read_analyses(paths: Sequence[Path]) -> list[Section]:
    """Return the sections of the page about analyses of one model. Raises BadAnalysis, OtherAnalysis or OSError."""
    if not paths:
        return []
    return list(sections({name: Analysis.load(path) for name, path in named(paths).items()}))


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Return files by their names without folder and suffix, or by their paths if some of these are equal."""
    stems = [path.stem for path in paths]
    return dict(zip(stems if len(set(stems)) == len(stems) else map(str, paths), paths, strict=True))


def pictures_in(folder: Path) -> list[Path]:
    """Return the PNG and SVG files of a folder in the order of their names. Raises BadOption."""
    if not folder.is_dir():
        raise BadOption("report", "figures", str(folder), "a folder with PNG or SVG files")
    return sorted(path for path in folder.iterdir() if path.suffix in PICTURES)


def read_certificate(policy: str) -> dict[str, str]:
    """Return the certificate of a policy's file as texts by name; other policies have none. Raises BadCertificate."""
    if not policy.endswith(".json") or "certificate" not in json.loads(Path(policy).read_text(encoding="utf-8")):
        return {}
    return AutoPolicy.load(policy).described()


def read_pictures(paths: Sequence[Path]) -> dict[str, bytes | str]:
    """Return pictures by the names of their files. Raises BadOption."""
    for path in paths:
        if path.suffix not in PICTURES:
            raise BadOption("report", "pictures", str(path), "PNG or SVG files")
    try:
        return {
            name: path.read_text(encoding="utf-8") if path.suffix == ".svg" else path.read_bytes()
            for name, path in named(paths).items()
        }
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption("report", "pictures", str(error), "PNG or SVG files that can be read") from error


def read_front(path: Path) -> list[Mapping[str, object]]:
    """Return the points of a front from the file of `tune`, or another JSON list of objects. Raises BadOption.

    An object with such a list is also read. Values that are objects are merged into their point.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadOption("report", "front", str(path), f"a JSON file with a list of points ({error})") from error
    lists = [content] if isinstance(content, list) else [*content.values()] if isinstance(content, dict) else []
    points: list[Any] = next((each for each in lists if isinstance(each, list) and each and _are_objects(each)), [])
    if not points:
        raise BadOption("report", "front", str(path), "a JSON file with a list of points, each an object")
    return [_flat(point) for point in points]


def _are_objects(values: Sequence[object]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _flat(point: Mapping[str, Any]) -> dict[str, object]:
    """Return the values of a point, first the objectives of `tune`, the last of them first: it is drawn across."""
    values = point.get("values")
    ordered = dict(reversed(values.items())) if isinstance(values, dict) else {}
    for name, value in point.items():
        ordered |= value if isinstance(value, dict) else {name: value}
    return ordered
