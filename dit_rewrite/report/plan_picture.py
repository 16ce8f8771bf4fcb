"""Draw a plan: layer by step, with a colour for each choice (like figure 5 of DiTFastAttn, Yuan et al. 2024).

Importing the module needs matplotlib, and raises MissingExtra without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dit_rewrite.errors import MissingExtra
from dit_rewrite.policy.plan import Choice, Plan

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtra("matplotlib", "the picture of a plan", "benchmark") from error

# Okabe and Ito's colours, which colour-blind readers can distinguish; full attention is in the background.
COLOURS: dict[Choice, str] = {
    Choice.FULL: "#dddddd",
    Choice.AST: "#0072b2",
    Choice.ASC: "#e69f00",
    Choice.WA_RS: "#009e73",
    Choice.WA_RS_ASC: "#cc79a7",
}
LEGEND = 1.6  # width in inches of a choice and its share


def panels(columns: Sequence[tuple[str | None, str]]) -> dict[str, list[int]]:
    """Return the indices of the sites of each stream and kind, in graph order.

    Sites whose names differ only in numbers are of one kind: ``blocks.3.attn1`` is a layer of ``blocks.attn1``.
    """
    found: dict[str, list[int]] = {}
    for index, (stream, site) in enumerate(columns):
        name = site.split("#")[0]  # `passes.naming.unique` numbers equal names by a suffix
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        found.setdefault(kind if stream is None else f"{kind}, {stream}", []).append(index)
    return found


def draw(plan: Plan) -> Figure:
    """Draw a panel per stream and kind of site, its layers from the bottom up. The legend has the choices' shares."""
    kinds = panels(plan.columns)
    layers = [len(indices) for indices in kinds.values()]
    height = sum(0.6 + 0.12 * count for count in layers)
    used = [choice for choice, count in plan.counts.items() if count]
    width = max(5.0, LEGEND * len(used), 0.14 * plan.steps)
    figure = Figure(figsize=(width, 1.0 + height), layout="constrained")
    axes = figure.subplots(len(kinds), 1, squeeze=False, sharex=True, height_ratios=layers)[:, 0]
    for panel, (kind, indices) in zip(axes, kinds.items(), strict=True):
        _draw_panel(panel, plan, kind, indices)
    axes[-1].set_xlabel("step")
    patches = [Patch(facecolor=COLOURS[choice], label=f"{choice} {plan.fraction(choice):.1%}") for choice in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(used), fontsize="small")
    share = "" if plan.attention_share is None else f", {plan.attention_share:.1%} of the attention FLOPs"
    scheduler = plan.scheduler.split(":")[0]
    figure.suptitle(f"delta = {plan.delta:g}, {plan.steps} steps{share}, scheduler: {scheduler}")
    return figure


def _draw_panel(axes: Axes, plan: Plan, kind: str, indices: list[int]) -> None:
    numbers = {choice: number for number, choice in enumerate(COLOURS)}
    layers = [[numbers[row[index]] for row in plan.table] for index in indices]
    axes.imshow(
        layers,
        cmap=ListedColormap(list(COLOURS.values())),
        vmin=0,
        vmax=len(COLOURS) - 1,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    axes.set_title(kind, fontsize="small")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def save_picture(plan: Plan, path: Path) -> None:
    """Write the picture of a plan as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(plan).savefig(path, dpi=110, format="png")
