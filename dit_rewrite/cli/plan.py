"""``dit-rewrite plan``: search DiTFastAttn's plan, the choice of each attention at each step, and save it.

dit-rewrite plan --delta D4 --conditional first --out plan.json
dit-rewrite plan --model ./pixart --prompt "a cat" --negative-prompt blurry --conditional second --grid latent
"""

from __future__ import annotations

import argparse
import ast
import json
from functools import partial
from pathlib import Path
from typing import Any

from dit_rewrite.cli.factory import add_model, load
from dit_rewrite.errors import BadOption
from dit_rewrite.policy.plan import SHARED, Choice, Plan
from dit_rewrite.search.metrics import METRICS
from dit_rewrite.search.segment_runner import ALL, DELTAS, greedy_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--negative-prompt", help="what the unconditional half of the guidance gets, for a pipeline")
    parser.add_argument("--delta", default="D4", help=f"threshold: a number, or the paper's {', '.join(DELTAS)}")
    parser.add_argument("--metric", choices=METRICS, default="relative_error", help="of the loss that delta bounds")
    parser.add_argument("--window", default="0.125", help="a fraction, or a fraction or tokens for each axis: 4,4")
    parser.add_argument("--grid", help='of the tokens: H,W or T,H,W, or "latent" for what the graph shows')
    parser.add_argument("--conditional", choices=("first", "second"), help="half of the batch; without it no ASC")
    parser.add_argument("--strategies", nargs="+", choices=sorted(map(str, ALL)), help="candidates, in ascending cost")
    parser.add_argument("--kinds", nargs="+", default=["self", "joint", "parallel"], help="kinds of attention")
    parser.add_argument("--seeds", type=int, default=1, help="number of trajectories, which run side by side")
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="the plan; an interrupted search continues")
    parser.add_argument("--json", action="store_true", help="print the counts and FLOPs as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dit-rewrite plan``; returns the exit code."""
    settings = {
        "window": parse_window(arguments.window),
        "grid": None if arguments.grid is None else parse_grid(arguments.grid),
        "strategies": candidates(arguments),
    }
    delta = DELTAS[arguments.delta] if arguments.delta in DELTAS else _number("delta", arguments.delta)
    loaded = load(arguments)
    plan = greedy_plan(
        loaded.model,
        [partial(_sample, loaded.sample, seed) for seed in range(arguments.seeds)],
        delta,
        steps=arguments.steps,
        conditional=arguments.conditional,
        kinds=tuple(arguments.kinds),
        metric=arguments.metric,
        path=arguments.out,
        backend=arguments.backend,
        **settings,
    )
    print(json.dumps(as_json(plan)) if arguments.json else f"{describe(plan)}\nwrote {arguments.out}")
    return 0


def _sample(sample: Any, seed: int, model: Any) -> object:
    return sample(model, seed)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return what a user asks of a plan first; its file has the choices."""
    counts = {str(choice): count for choice, count in plan.counts.items()}
    shares = {"attention_share": plan.attention_share, "attention_shares": list(plan.attention)}
    return {"delta": plan.delta, "metric": plan.metric, "choices": counts, **shares, "notes": list(plan.notes)}


def describe(plan: Plan) -> str:
    """Return the same in lines of text."""
    counts = ", ".join(f"{choice} {count}" for choice, count in plan.counts.items() if count)
    lines = [f"{plan.steps} steps, {len(plan.sites)} attentions, {plan.metric} below {plan.delta:g}: {counts}"]
    if plan.attention_share is not None:
        steps = ", ".join(f"{100 * share:.3g}" for share in plan.attention)
        lines.append(f"attention FLOPs: {plan.attention_share:.1%} of full; by step, in %: {steps}")
    return "\n".join([*lines, *plan.notes])


def candidates(arguments: argparse.Namespace) -> Any:
    """Return the strategies: a sequence if they were given, else the set of those that need no missing half."""
    if arguments.strategies:
        return [Choice(name) for name in arguments.strategies]
    return ALL if arguments.conditional else ALL - SHARED


def parse_window(text: str) -> Any:
    """Parse ``0.125``, or a size for each axis, as in ``4,4`` or ``0.25,0.25``; ``4`` is a sequence's."""
    sizes = [_number("window", size) for size in text.split(",")]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], float) else tuple(sizes)


def parse_grid(text: str) -> Any:
    """Parse ``H,W``, ``T,H,W`` or ``latent``."""
    return text if text == "latent" else tuple(_number("grid", size) for size in text.split(","))


def _number(option: str, text: str) -> Any:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadOption("plan", option, text, "numbers, separated by commas")
    return value
