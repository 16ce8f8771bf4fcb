"""``python -m dit_rewrite analyze``: measure how much the tensors of a model change between steps."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from dit_rewrite.analysis import plots
from dit_rewrite.analysis.analyze import analyze
from dit_rewrite.analysis.compare import coefficient_of_variation, predictions, prompt_stability, summary
from dit_rewrite.analysis.result import Analysis
from dit_rewrite.cli.generate import load_pipeline
from dit_rewrite.cli.modules import factory_of
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.cli.paths import add_output
from dit_rewrite.cli.pipeline_call import add_call, parsed_call, refuse_for_factory
from dit_rewrite.errors import BadOption

BUNDLED = "dit_rewrite.demo.shapes.calls:build"
FILE = "analysis.safetensors"
KEYS = "where keys and values are measured: as the attention reads them, or as projected, before norms and rotations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--model",
        default=BUNDLED,
        help="a pipeline's folder or hub id, or module:factory, where factory(steps, seed) returns (model, calls)",
    )
    parser.add_argument(
        "--prompts", default="4", help="number of seeds of a factory, or a text file with a prompt on each line"
    )
    parser.add_argument("--steps", type=int, default=28, help="number of steps of each trajectory")
    add_call(parser)
    parser.add_argument(
        "--distances", type=int, nargs="+", default=[1], help="distances in steps of the compared tensors"
    )
    parser.add_argument("--keys", choices=("core", "projection"), default="core", help=KEYS)
    parser.add_argument("--heads", action="store_true", help="also measure each attention head")
    parser.add_argument("--window", type=float, help="also measure window attention with this fraction of the tokens")
    parser.add_argument(
        "--conditional",
        help="conditional half of the batch (first or second) or stream, to compare with the unconditional one",
    )
    parser.add_argument(
        "--backend", default="aot_eager", help="backend that compiles the graphs: aot_eager or inductor"
    )
    add_output(parser, "--out", folder=True, default=Path("analysis"), help="output folder for the analysis and plots")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="write no plots")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="merge these analyses instead of making one",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``python -m dit_rewrite analyze``; an analysis that was interrupted is continued."""
    path = arguments.out / FILE
    if arguments.merge:
        found = Analysis.merge([Analysis.load(each) for each in arguments.merge])
        found.save(path)
    else:
        found = _analyze(arguments, path)
    pictures = plots.draw(found, arguments.out) if arguments.plots else []
    text = "\n".join([summary(found), *(f"wrote {written}" for written in (path, *pictures))])
    return Outcome(text, {"file": path, "plots": pictures, **as_json(found)})


def as_json(found: Analysis) -> dict[str, Any]:
    """Return the numbers of an analysis: for each quantity its mean relative L1 change, and its stability."""
    known = dict.fromkeys(row.quantity for row in found.rows())
    quantities = {
        name: {
            "relative_l1": found.overall(name, "relative_l1"),
            "variation": coefficient_of_variation(found, name)._asdict(),
            "prompt_correlation": prompt_stability(found, name)._asdict(),
        }
        for name in known
    }
    predictors = [each._asdict() for each in predictions(found)]
    return {
        "model": found.name,
        "prompts": found.prompts,
        "steps": found.steps,
        "settings": found.settings,
        "quantities": quantities,
        "predictors": predictors,
        "refused": found.refused,
    }


def _analyze(arguments: argparse.Namespace, path: Path) -> Analysis:
    if arguments.steps < 2:
        raise BadOption("analyze", "steps", arguments.steps, "a whole number >= 2")
    model: Any
    sample: Any
    prompts: Sequence[int] | None
    if ":" in arguments.model:
        refuse_for_factory(arguments.model, call=arguments.call)
        model, sample, prompts = _from_factory(arguments.model, arguments.prompts, arguments.steps)
    else:
        model, sample, prompts = _from_pipeline(arguments.model, arguments.prompts, arguments.call)
    print(f"analyzing {len(sample if prompts is None else prompts)} prompts", file=sys.stderr)
    return analyze(
        model,
        sample,
        prompts,
        steps=arguments.steps,
        distances=arguments.distances,
        keys=arguments.keys,
        heads=arguments.heads,
        window=arguments.window,
        conditional=arguments.conditional,
        backend=arguments.backend,
        path=path,
        progress=lambda number: print(f"prompt {number + 1}", file=sys.stderr),
    )


def _from_factory(text: str, prompts: str, steps: int) -> tuple[Any, Callable[[Any, Any], None], Sequence[int]]:
    """Call the factory ``module:factory`` with the steps and each seed. Raises BadModel, or BadOption."""
    with factory_of(text) as factory:
        takes = len(inspect.signature(factory).parameters)
        model, calls, *_ = factory(steps, 0) if takes > 1 else factory(steps)
        list(calls)
    count = _number(prompts)
    if takes < 2 and count > 1:
        raise BadOption("analyze", "prompts", prompts, f"1, or let {text} take (steps, seed)")

    @wraps(factory)
    def sample(ours: Any, seed: int) -> None:
        _, calls, *rest = factory(steps, seed) if takes > 1 else factory(steps)
        with ours.trajectory(steps, *rest):
            for call in list(calls)[:steps]:
                ours(**call)

    return model, sample, range(count)


def _number(prompts: str) -> int:
    if not prompts.isdigit() or int(prompts) < 1:
        raise BadOption("analyze", "prompts", prompts, "the number of seeds, for a factory")
    return int(prompts)


def _read(path: Path, kind: type) -> list[Any]:
    """Return the lines of a file as prompts or class numbers. Raises BadOption for any other content."""
    try:
        found = [kind(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError:  # not UTF-8, or not a number
        found = []
    if not found:
        allowed = "a text file in UTF-8 with a prompt, or for this pipeline a class number, on each line"
        raise BadOption("analyze", "prompts", str(path), allowed)
    return found


def _from_pipeline(model: str, prompts: str, call: Sequence[str]) -> tuple[Any, list[Any], None]:
    """Load a pipeline from a folder or hub id. Its prompts are the lines of a file, or the first classes."""
    import torch

    pipeline: Any = load_pipeline(model, torch.float32)
    labels = "class_labels" in inspect.signature(pipeline.__call__).parameters
    path = Path(prompts)
    if path.is_file():
        given: list[Any] = _read(path, int if labels else str)
    elif labels:
        given = list(range(_number(prompts)))
    else:
        raise BadOption("analyze", "prompts", prompts, "a text file with a prompt on each line, for a pipeline")
    pipeline.set_progress_bar_config(disable=True)
    more = parsed_call(pipeline, call)
    if more:
        given = [{"class_labels": [each]} | more if labels else {"prompt": each} | more for each in given]
    return pipeline, given, None
