"""``python -m dit_rewrite report``: write one HTML page about a model under a policy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dit_rewrite.cli.observe import observed
from dit_rewrite.errors import BadOption
from dit_rewrite.policy.plan import Plan

PICTURES = (".png", ".svg")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m dit_rewrite report``; returns the exit code."""
    from dit_rewrite.report.page import Page  # needs the extra

    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    front = [] if arguments.front is None else read_front(arguments.front)
    figures = {} if arguments.figures is None else read_pictures(sorted(arguments.figures.iterdir()))
    images = read_pictures(arguments.images)
    model: Any = observed(arguments, runs=2, timing=True)  # the first trajectory compiles
    page = Page(
        model.explain(),
        f"{type(model).__name__} under {arguments.policy}",
        described(model, arguments),
        model.stats().decisions,
        figures,
        plan,
        front,
        images,
    )
    page.save(arguments.out)
    print(f"wrote {arguments.out}")
    return 0


def described(model: nn.Module, arguments: argparse.Namespace) -> dict[str, object]:
    """Return what the page says about the model."""
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


def read_pictures(paths: Sequence[Path]) -> dict[str, bytes | str]:
    """Return pictures by the names of their files. Files of other formats are left out. Raises BadOption."""
    try:
        return {
            path.stem: path.read_text(encoding="utf-8") if path.suffix == ".svg" else path.read_bytes()
            for path in paths
            if path.suffix in PICTURES
        }
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption("report", "pictures", str(error), "PNG or SVG files that can be read") from error


def read_front(path: Path) -> list[Mapping[str, object]]:
    """Return the points of a front: a JSON list of objects, or an object with such a list. Raises BadOption."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadOption("report", "front", str(path), f"a JSON file with a list of points ({error})") from error
    lists = [content] if isinstance(content, list) else [*content.values()] if isinstance(content, dict) else []
    points = next((each for each in lists if isinstance(each, list) and each), [])
    if not points or not all(isinstance(point, dict) for point in points):
        raise BadOption("report", "front", str(path), "a JSON file with a list of points, each an object")
    return points
