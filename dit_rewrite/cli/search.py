"""``dit-rewrite search``: search a plan with a choice for each step and attention (DiTFastAttn, Yuan et al. 2024).

dit-rewrite search --delta D4 --conditional first --out plan.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dit_rewrite.cli.factory import add_model, load
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.errors import BadOption
from dit_rewrite.policy.plan import SHARED, Choice, Plan
from dit_rewrite.search.greedy import DELTAS, STRATEGIES
from dit_rewrite.search.segment_runner import greedy_plan
from dit_rewrite.search.trials import Sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model(parser, "steps of a pipeline, or of the factory's sampler")
    parser.add_argument("--delta", default="D4", help="bound on the change of the output: D1 to D6, or a number")
    parser.add_argument(
        "--conditional",
        choices=("first", "second"),
        help="conditional half of the batch; without it, attention is not shared across guidance",
    )
    parser.add_argument("--window", type=float, default=0.125, help="window of attention, as a fraction of the tokens")
    parser.add_argument("--seeds", type=int, default=1, help="number of trajectories that the search samples")
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="output file for the plan")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``dit-rewrite search``; a search that was interrupted is continued. Progress goes to stderr."""
    delta = threshold(arguments.delta)
    if arguments.seeds < 1:
        raise BadOption("search", "seeds", arguments.seeds, "a whole number >= 1")
    loaded = load(arguments)
    plan = greedy_plan(
        loaded.model,
        [_seeded(loaded.sample, seed) for seed in range(arguments.seeds)],
        delta,
        frozenset(choice for choice in STRATEGIES if arguments.conditional or choice not in SHARED),
        steps=arguments.steps,
        window=arguments.window,
        conditional=arguments.conditional,
        path=arguments.out,
        backend=arguments.backend,
        progress=sys.stderr.isatty() and find_spec("rich") is not None,
    )
    return Outcome(as_text(plan, arguments.out), {"file": arguments.out, **as_json(plan)})


def _seeded(sample: Sample, seed: int) -> Callable[[Any], object]:
    return lambda denoiser: sample(denoiser, seed)


def threshold(text: str) -> float:
    """Return the threshold of a name such as D4, or of a number. Raises BadOption."""
    try:
        found = DELTAS[text] if text in DELTAS else float(text)
    except ValueError:
        raise BadOption("search", "delta", text, f"a number, or one of {', '.join(DELTAS)}") from None
    return found


def as_text(plan: Plan, path: Path) -> str:
    """Return the share of each choice, the cost of the search, and the way to use the plan."""
    shares = ", ".join(f"{choice} {plan.fraction(choice):.1%}" for choice in Choice if plan.counts[choice])
    lines = [f"{len(plan.sites)} attentions, {plan.steps} steps, delta {plan.delta:g}: {shares}"]
    lines += [f"{plan.evaluations} candidates tried, {plan.work:.1%} of the work of an exhaustive search", *plan.notes]
    return "\n".join([*lines, f"wrote {path}; use it as the policy ditfastattn:plan={path}"])


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan in numbers, without its table, which is in its file."""
    counts = {str(choice): count for choice, count in plan.counts.items()}
    names = ("model", "steps", "sites", "delta", "evaluations", "work", "notes")
    return {**{name: getattr(plan, name) for name in names}, "choices": counts}
