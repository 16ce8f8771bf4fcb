"""``dit-rewrite tune``: search the parameters of a policy by a grid, TPE or NSGA-II.

dit-rewrite tune --policy fora --space "interval=2|3|4" "anchor=start|paper" --sampler grid
dit-rewrite tune --policy dqar --space "warmup=0.0..0.4" "layer_fraction=0.25..1.0" --trials 30 --storage dqar.journal
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_rewrite.cli.factory import add_model, load
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.errors import BadOption
from dit_rewrite.policies import parse
from dit_rewrite.policy.rules import Policy
from dit_rewrite.search.evaluation import Evaluation
from dit_rewrite.search.tune import Range, tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model(parser)
    parser.add_argument(
        "--policy", required=True, help="a policy with its fixed parameters, such as dqar:layer_fraction=0.5"
    )
    parser.add_argument(
        "--space",
        nargs="+",
        required=True,
        help="the other parameters: name=a|b|c, name=low..high, or name=low..high:log",
    )
    parser.add_argument("--sampler", choices=("grid", "tpe", "nsga2"), default="tpe", help="how parameters are chosen")
    parser.add_argument("--trials", type=int, help="number of trials; a grid needs none")
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=("error", "flops", "time"),
        default=["error", "flops"],
        help="measurements to minimise, relative to a run that computes everything",
    )
    parser.add_argument("--storage", help="a journal file, or the URL of a database; several processes may share it")
    parser.add_argument("--study", default="dit_rewrite", help="name of the study in the storage")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds that each trial runs")
    parser.add_argument(
        "--no-prune",
        action="store_true",
        help="also finish trials that are much worse than others after their first seeds",
    )
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    parser.add_argument("--out", type=Path, default=Path("front"), help="folder for the front and its policies")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``dit-rewrite tune``. Progress goes to stderr."""
    space = dict(map(parse_values, arguments.space))
    if len(space) < len(arguments.space):
        raise BadOption("tune", "space", " ".join(arguments.space), "each parameter once")
    arguments.out.mkdir(parents=True, exist_ok=True)  # raises before the search if it is a file
    loaded = load(arguments)
    wants_time = "time" in arguments.objectives
    evaluate = Evaluation(
        loaded.model, loaded.sample, range(arguments.seeds), time=wants_time, backend=arguments.backend
    )
    front = tune(
        maker(arguments.policy),
        space,
        evaluate,
        objectives=arguments.objectives,
        sampler=arguments.sampler,
        trials=arguments.trials,
        storage=arguments.storage,
        study=arguments.study,
        prune=not arguments.no_prune,
        report=lambda line: print(line, file=sys.stderr),
    )
    folder = front.save(arguments.out)
    return Outcome(f"{front.table()}\nwrote {folder}", {"folder": folder, **json.loads(front.to_json())})


def maker(text: str) -> Callable[..., Policy]:
    """Return a function of further parameters of the policy `text`."""

    def make(**parameters: Any) -> Policy:
        items = ",".join(f"{name}={value}" for name, value in parameters.items())
        return parse(f"{text}{',' if ':' in text else ':'}{items}")

    make.__qualname__ = text  # the study is known by it
    return make


def parse_values(text: str) -> tuple[str, Sequence[Any] | Range]:
    """Parse ``name=a|b|c`` or ``name=low..high``, with ``:log`` for a logarithmic range. Raises BadOption."""
    name, equals, values = text.partition("=")
    allowed = "name=a|b|c, name=low..high, or name=low..high:log"
    if not equals or not name or not values:
        raise BadOption("tune", "space", text, allowed)
    if ".." not in values:
        return name, [_literal(value) for value in values.split("|")]
    bounds, _, scale = values.partition(":")
    low, high = map(_literal, bounds.split("..", 1))
    if not all(isinstance(end, int | float) for end in (low, high)) or not low < high or scale not in ("", "log"):
        raise BadOption("tune", "space", text, allowed)
    return name, Range(low, high, scale == "log")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
