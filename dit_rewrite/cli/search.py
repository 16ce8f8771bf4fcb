"""``dit-rewrite search``: search a plan with a choice for each step and attention (DiTFastAttn, Yuan et al. 2024).

dit-rewrite search --delta D4 --conditional first --out plan.json
dit-rewrite search --model ./pixart --prompt "a cat" --negative-prompt blurry --conditional second --grid latent
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from dit_rewrite.cli.factory import add_model, load
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.cli.paths import add_output
from dit_rewrite.errors import BadOption
from dit_rewrite.policy.plan import SHARED, Choice, Plan
from dit_rewrite.proof.callers import calling
from dit_rewrite.search.metrics import METRICS
from dit_rewrite.search.segment_runner import ALL, DELTAS, greedy_plan
from dit_rewrite.search.trials import Sample

NEEDED = {
    "delta": f"a number, or one of {', '.join(DELTAS)}",
    "window": "a number, or one for each axis of the grid, separated by commas",
    "grid": 'whole numbers, separated by commas, or "latent"',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model(parser, "steps of a pipeline, or of the factory's sampler")
    parser.add_argument("--negative-prompt", help="prompt of the unconditional half of a pipeline's batch")
    parser.add_argument("--delta", default="D4", help="bound on the change of the output: D1 to D6, or a number")
    parser.add_argument(
        "--metric", choices=METRICS, default="relative_error", help="measure of the change of the output"
    )
    parser.add_argument(
        "--conditional",
        choices=("first", "second"),
        help="conditional half of the batch; without it, attention is not shared across guidance",
    )
    parser.add_argument(
        "--window", default="0.125", help="window of attention: a fraction of the tokens, or one for each axis, as 4,4"
    )
    parser.add_argument("--grid", help='axes of the tokens: H,W or T,H,W, or "latent" for those that the graph shows')
    parser.add_argument("--strategies", nargs="+", choices=sorted(map(str, ALL)), help="candidates, in ascending cost")
    parser.add_argument("--kinds", nargs="+", default=["self", "joint", "parallel"], help="kinds of attention")
    parser.add_argument("--seeds", type=int, default=1, help="number of trajectories that the search samples")
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    add_output(parser, "--out", default=Path("plan.json"), help="output file for the plan")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``dit-rewrite search``; a search that was interrupted is continued. Progress goes to stderr."""
    delta = DELTAS[arguments.delta] if arguments.delta in DELTAS else _numbers("delta", arguments.delta, 1)[0]
    if arguments.seeds < 1:
        raise BadOption("search", "seeds", arguments.seeds, "a whole number >= 1")
    window, grid = window_of(arguments.window), grid_of(arguments.grid)
    loaded = load(arguments)
    if isinstance(loaded.model, nn.ModuleDict):
        raise BadOption("search", "model", arguments.model, "a pipeline with one denoiser")
    plan = greedy_plan(
        loaded.model,
        [partial(_sampled, loaded.sample, seed) for seed in range(arguments.seeds)],
        delta,
        candidates(arguments.strategies, arguments.conditional),
        steps=arguments.steps,
        window=window,
        grid=grid,
        conditional=arguments.conditional,
        kinds=tuple(arguments.kinds),
        metric=arguments.metric,
        path=arguments.out,
        backend=arguments.backend,
        progress=sys.stderr.isatty() and find_spec("rich") is not None,
    )
    return Outcome(as_text(plan, arguments.out), {"file": arguments.out, **as_json(plan)})


def _sampled(sample: Sample, seed: int, denoiser: Any) -> object:
    with calling(sample, f"with seed {seed}"):
        return sample(denoiser, seed)


def as_text(plan: Plan, path: Path) -> str:
    """Return the share of each choice, attention's FLOPs, the cost of the search, and the way to use the plan."""
    shares = ", ".join(f"{choice} {plan.fraction(choice):.1%}" for choice in Choice if plan.counts[choice])
    lines = [f"{len(plan.sites)} attentions, {plan.steps} steps, {plan.metric} below {plan.delta:g}: {shares}"]
    if plan.attention_share is not None:
        steps = ", ".join(f"{100 * share:.3g}" for share in plan.attention)
        lines.append(f"attention FLOPs: {plan.attention_share:.1%} of full; by step, in %: {steps}")
    lines += [f"{plan.evaluations} candidates tried, {plan.work:.1%} of the work of an exhaustive search", *plan.notes]
    return "\n".join([*lines, f"wrote {path}; use it as the policy ditfastattn:plan={path}"])


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan in numbers, without its table, which is in its file."""
    counts = {str(choice): count for choice, count in plan.counts.items()}
    names = ("model", "steps", "sites", "delta", "metric", "evaluations", "work", "notes")
    shares = {"attention_share": plan.attention_share, "attention_shares": list(plan.attention)}
    return {**{name: getattr(plan, name) for name in names}, "choices": counts, **shares}


def candidates(names: Sequence[str] | None, conditional: str | None) -> Any:
    """Return the candidates of the search: those named, in their order, or all that need no missing half."""
    if names:
        return [Choice(name) for name in names]
    return ALL if conditional else ALL - SHARED


def window_of(text: str) -> float | tuple[float, ...]:
    """Return the window of ``0.125``, or of ``4,4`` or ``0.25,0.25``: a size for each axis. Raises BadOption."""
    sizes = _numbers("window", text)
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], float) else sizes


def grid_of(text: str | None) -> Any:
    """Return the grid of ``H,W``, ``T,H,W`` or ``latent``. Raises BadOption."""
    return text if text in (None, "latent") else _numbers("grid", text)


def _numbers(option: str, text: str, count: int | None = None) -> tuple[Any, ...]:
    """Return the numbers of a text that separates them with commas. Raises BadOption unless there are `count`."""
    try:
        found = tuple(ast.literal_eval(part.strip()) for part in text.split(","))
    except (ValueError, SyntaxError):
        found = (None,)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)
    if not numbers or count not in (None, len(found)):
        raise BadOption("search", option, text, NEEDED[option])
    return found
