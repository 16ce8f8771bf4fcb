"""The table of the fidelity benchmark, its page in the docs, and the pictures of the Pareto front."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.fidelity.claims import Cost, Error, best_control, by_flops, by_time
from benchmarks.fidelity.flops import COUNTED
from benchmarks.fidelity.rows import STEPS, Row
from benchmarks.record import VERDICTS, Claim, print_claims
from dit_rewrite.demo.report import print_table
from dit_rewrite.errors import MissingExtra
from dit_rewrite.policy.files import write_whole
from dit_rewrite.search.measurements import geometric_mean

HEADINGS = ("computed", "FLOPs", "time", "quartiles", "to uncached", "typical", "to reference", "KiB held")
ERRORS = {"error": "relative L2 to the uncached images", "reference_error": "relative L2 to the reference"}
PANELS: tuple[tuple[str, Cost, str], ...] = (
    ("time / uncached", by_time, "error"),
    ("FLOPs / uncached", by_flops, "error"),
    ("FLOPs / uncached", by_flops, "reference_error"),
)
MARKERS = "osD^Pv*<>Xph"
LIMITS = (0.52, 0.38, 0.28, 0.22)  # FLOPs of 25, 17, 13 and 10 computed steps of 50, with a warm-up
BEATS = " beats fewer steps at equal "
JUDGES: dict[Error, tuple[str, str]] = {
    "error": ("the uncached images", "A policy"),
    "reference_error": ("the reference", "Judged by the reference, a policy"),
}
INTRODUCTION = """# Policies against fewer steps

Written by `python -m benchmarks.fidelity` from `{file}`: {images} images of {steps} steps of each of the bundled toys,
always from the same noise. A control is the uncached model with fewer steps of one of several solvers; a policy is
judged by the best control that costs as much. `computed` counts the calls of the denoiser at which nothing is reused;
FLOPs and time are over those of the uncached model. FLOPs include the rows of [step tables](step_tables.md), which are
computed for all steps. What is computed once per trajectory counts once, not at each step, so that the computed
calls of a policy may cost less than those of the uncached model. A star marks FLOPs that were counted before there were
step tables. Times are of {timed} images at once, a few rows in turn with the uncached model in one process, the median
of {rounds} runs with its quartiles; they stand where they were measured.

There are two errors, both relative L2: to the uncached images of the same sampler and as many steps, which is what a
policy approximates, and to the reference, which is what all solvers approximate: 500 steps of DDIM, or 400 of Euler.
The toys `class` and `text` are sampled by the DDIM that they were made with, which clips its predictions to [-1, 1].
The other solvers do not clip, so that a part of a control's error to the uncached images is not of fewer steps, and
clipped DDIM does not approach the reference. In `class_unclipped` and `text_unclipped` nothing clips: there both errors
are of one problem, and the comparison with fewer steps is fair.

A few images are so sensitive that any small error changes them. They decide the error of {images} images to a large
part, and which of two similar policies is closer: `typical` is the geometric mean of the errors of the single images to
the uncached ones. Of the plans (`step_mask`), the even ones are set by hand, and the others were searched on other
noise of the class toy; two of them by `python -m benchmarks.fidelity.plans`.

## Where a policy wins, and where it loses

Which side has the smaller error, its error, and that of the other side, at most at the share of the FLOPs in the
heading: 25, 17, 13 and 10 computed calls of 50, with a warm-up. Both sides are the best of their rows, chosen on the
images that they are judged by; the counts behind them have all settings up to a fourfold saving."""


def cells(row: Row) -> tuple[str, ...]:
    """Format the figures of a row in the order of the table's headings."""
    result, timing = row.result, row.timing
    return (
        str(result.computed),
        f"{result.flops:.3f}{'' if row.family == STEPS or result.counted == COUNTED else '*'}",
        "" if timing is None else f"{timing.ratio.median:.3f}",
        "" if timing is None else f"{timing.ratio.low:.3f} … {timing.ratio.high:.3f}",
        f"{result.error:.4f}",
        f"{geometric_mean(result.errors):.4f}",
        f"{result.reference_error:.4f}",
        f"{result.cache_bytes / 1024:.0f}" if result.cache_bytes else "",
    )


def show(rows: Sequence[Row], claims: Sequence[Claim]) -> None:
    """Print a table for each toy, then every claim with the number of its comparisons."""
    for toy in dict.fromkeys(row.toy for row in rows):
        table = Table(title=f"{toy}: FLOPs and time over the uncached model's, errors as relative L2")
        table.add_column("row", no_wrap=True)
        for heading in HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in (r for r in rows if r.toy == toy):
            table.add_row(row.name, *cells(row))
        print_table(table)
    print_claims(claims)


def front(rows: Sequence[Row], cost: Cost, error: str) -> list[Row]:
    """Return the Pareto front: the rows for which no other is as cheap and closer, by increasing cost."""
    found: list[Row] = []
    known = [(at, getattr(row.result, error), i) for i, row in enumerate(rows) if (at := cost(row)) is not None]
    for _, value, i in sorted(known):
        if not found or value < getattr(found[-1].result, error):
            found.append(rows[i])
    return found


def _points(rows: Sequence[Row], cost: Cost, error: str) -> tuple[list[float], list[float]]:
    """Return the points sorted by cost; a cost or error of 0 is left out, as the axes are logarithmic."""
    points = [(at, value) for r in rows if (at := cost(r)) is not None and (value := getattr(r.result, error)) > 0]
    return [x for x, _ in sorted(points)], [y for _, y in sorted(points)]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw a picture for each toy. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "the pictures", "benchmark") from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for toy in dict.fromkeys(row.toy for row in rows):
        figure = Figure(figsize=(15, 5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            _panel(axes, [r for r in rows if r.toy == toy], *panel)
        axes.legend(fontsize="x-small", loc="upper right")
        figure.suptitle(toy)
        paths.append(folder / picture(toy))
        figure.savefig(paths[-1], dpi=100)
    return paths


def _panel(axes: Any, rows: Sequence[Row], label: str, cost: Cost, error: str) -> None:
    """Draw the curves of the solvers, a marker for each policy, and a line along the policies' Pareto front."""
    controls = [r for r in rows if r.family == STEPS]
    policies = [r for r in rows if r.family != STEPS]
    for solver in dict.fromkeys(r.setting("solver") for r in controls):
        own = [r for r in controls if r.setting("solver") == solver]
        axes.plot(*_points(own, cost, error), ".--", linewidth=1, label=f"fewer steps, {solver}")
    for marker, family in zip(MARKERS, dict.fromkeys(r.family for r in policies), strict=False):
        own = [r for r in policies if r.family == family]
        axes.plot(*_points(own, cost, error), marker, linestyle="", alpha=0.6, markersize=5, label=family)
    axes.plot(*_points(front(policies, cost, error), cost, error), "k-", linewidth=1, label="front of the policies")
    axes.set(xlabel=label, ylabel=ERRORS[error], yscale="log")
    axes.grid(visible=True, alpha=0.3)


def write_page(rows: Sequence[Row], claims: Sequence[Claim], how: argparse.Namespace) -> Path:
    """Write the page in the docs from the rows and the claims."""
    path: Path = how.docs / "fidelity.md"
    write_whole(path, render(rows, claims, how))
    return path


def render(rows: Sequence[Row], claims: Sequence[Claim], how: argparse.Namespace) -> str:
    """Render the page. The same rows give the same page."""
    return "\n".join(_page(rows, claims, how)) + "\n"


def picture(toy: str) -> str:
    """The file name of the picture of a toy."""
    return f"fidelity_{toy}.png"


def _page(rows: Sequence[Row], claims: Sequence[Claim], how: argparse.Namespace) -> Iterator[str]:
    yield INTRODUCTION.format(
        file=how.out.name, images=how.images, steps=how.steps, timed=how.timed_images, rounds=how.rounds
    )
    yield from ("", *_verdicts(rows, claims))
    for toy in dict.fromkeys(row.toy for row in rows):
        own = [r for r in rows if r.toy == toy]
        yield from ("", f"## {toy}", "", f"![{toy}: error over time and FLOPs]({picture(toy)})", "")
        of_toy = {c.claim.removeprefix(f"{toy}: "): c for c in claims if c.claim.startswith(f"{toy}: ")}
        yield from (*_families(of_toy), "")
        yield from _claims({name: c for name, c in of_toy.items() if not _of_family(name)})
        yield from ("", "The Pareto front of the policies, by FLOPs and distance to the uncached images:", "")
        yield from _markdown(front([r for r in own if r.family != STEPS], by_flops, "error"))
        yield from ("", "The Pareto front of fewer steps:", "")
        yield from _markdown(front([r for r in own if r.family == STEPS], by_flops, "error"))
        yield from ("", "<details><summary>All rows</summary>", "")
        yield from _markdown(own)
        yield from ("", "</details>")


SUMMARY = {  # headings of the README's table, and the claims that they count
    "forecast": "Forecast beats fewer steps at equal FLOPs",
    "reuse": "Reuse beats fewer steps at equal FLOPs",
    "any policy": "A policy beats fewer steps at equal FLOPs",
    "any policy, by the reference": "Judged by the reference, a policy beats fewer steps at equal FLOPs",
}


def summary(claims: Sequence[Claim]) -> Iterator[str]:
    """Render the README's table: for each toy, in how many comparisons policies beat fewer steps."""
    found = {claim.claim: claim for claim in claims}
    toys = dict.fromkeys(name.partition(": ")[0] for name in found)
    yield f"| toy | {' | '.join(SUMMARY)} |"
    yield f"|---|{'---:|' * len(SUMMARY)}"
    for toy in toys:
        cells = (_count(found[f"{toy}: {name}"]) for name in SUMMARY.values())
        yield f"| {toy} | {' | '.join(cells)} |"


def _count(claim: Claim) -> str:
    held = sum(e["held"] for e in claim.evidence)
    return f"{held} of {len(claim.evidence)}" if claim.evidence else "nothing to compare"


def _markdown(rows: Sequence[Row]) -> Iterator[str]:
    yield f"| row | {' | '.join(HEADINGS)} |"
    yield f"|---|{'---:|' * len(HEADINGS)}"
    for row in rows:
        yield f"| {row.name} | {' | '.join(cells(row))} |"


def _verdicts(rows: Sequence[Row], claims: Sequence[Claim]) -> Iterator[str]:
    """Render which side wins, by toy, judge and cost."""
    found = {claim.claim: claim for claim in claims}
    yield f"| toy | judged by | {' | '.join(map(str, LIMITS))} | policies closer at equal FLOPs | at equal time |"
    yield f"|---|---|{'---|' * len(LIMITS)}---:|---:|"
    for toy in dict.fromkeys(row.toy for row in rows):
        own = [row for row in rows if row.toy == toy]
        for error, (target, name) in JUDGES.items():
            cells = [_winner(own, limit, error) for limit in LIMITS]
            counts = (_count(found[f"{toy}: {name}{BEATS}{cost}"]) for cost in ("FLOPs", "time"))
            yield f"| {toy} | {target} | {' | '.join((*cells, *counts))} |"


def _winner(rows: Sequence[Row], limit: float, error: Error) -> str:
    """Format the side with the smaller error at a cost."""
    policies = [getattr(r.result, error) for r in rows if r.family != STEPS and r.result.flops <= limit]
    control = best_control(rows, by_flops, limit, error)
    if not policies or control is None:
        return ""
    sides = sorted([(min(policies), "policy"), (control[0], "fewer steps")])
    return f"{sides[0][1]}: {sides[0][0]:.4f} against {sides[1][0]:.4f}"


def _of_family(name: str) -> bool:
    """Whether a claim is about one family of policies."""
    family, beats, _ = name.partition(BEATS)
    return bool(beats) and " " not in family


def _families(claims: Mapping[str, Claim]) -> Iterator[str]:
    """Render in how many settings each family is closer to the uncached images than the best of fewer steps."""
    families = dict.fromkeys(name.partition(BEATS)[0] for name in claims if _of_family(name))
    yield "| family | closer at equal FLOPs | closer at equal time |"
    yield "|---|---:|---:|"
    for family in families:
        found = [claims.get(f"{family}{BEATS}{cost}") for cost in ("FLOPs", "time")]
        yield f"| {family} | {' | '.join('' if c is None else _count(c) for c in found)} |"


def _claims(claims: Mapping[str, Claim]) -> Iterator[str]:
    for name, claim in claims.items():
        yield f"- {name}: **{VERDICTS[claim.held].lower()}** ({_count(claim)}; {claim.bound}){_figures(claim)}"


def _figures(claim: Claim) -> str:
    """Format the figures of a claim about a few rows."""
    compared = [e for e in claim.evidence if "bound" in e]
    texts = (f"{e['row']} has {e['error']:.4f}, {e['solver']} {e['fewer_steps']:.4f}" for e in compared)
    return f": {'; '.join(texts)}" if compared else ""
