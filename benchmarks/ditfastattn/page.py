"""The page and the pictures of benchmarks/ditfastattn/figures.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

WINDOWS = ("sequence", "rows and columns")
RESIDUAL = {"window": "window attention", "window residual": "residual to full attention"}
INTRODUCTION = """# DiTFastAttn

Written by `python -m benchmarks.ditfastattn.figures` from `ditfastattn_figures.json` (torch {torch}). The plans of the
paper's six thresholds, their times and their images are under [Benchmarks](benchmarks.md#ditfastattn). Here are its
figures 3 and 9 and its appendices A.7 and A.8, small: the bundled shapes DiT (8 layers, 64 tokens), {images} images and
{steps} steps. Errors are those of the images that the search itself sampled, against the uncached ones of the same
noise, so on other images they are larger. One small model, one set of noise: read trends, not digits.

## Attention maps

Figure 3a of the paper, left: the attention map of layer {layer}, mean over heads, steps and images, and how much of the
attention of each layer lies within a window of an eighth of the tokens along the sequence ({sequence_pairs:.0%} of all
pairs), and within two tokens along rows and columns ({grid_pairs:.0%}). Per pair, rows and columns hold more of it in
{better} of {layers} layers: `window=(2, 2), grid="latent"` asks for such a window.

![attention map, and attention inside windows](ditfastattn_maps.png)

## Windows and residuals

Figure 3a, right: how much window attention changes from one step to the next, and how much its residual to full
attention does (mean squared difference, mean over {layers} layers and both halves of the guidance, {residual_steps}
steps). A residual is worth keeping if it changes less than the window. Here it does so at {calm} of
{changes} steps, and its change is {ratio:.2f} of the window's on average.

![change of window attention and of its residual by step](ditfastattn_residual.png)

"""
METHODS = """## One strategy alone

Figure 9, left: at each threshold the search with all strategies, and with one alone. Attention FLOPs are all FLOPs of
the attention branches, projections and residuals included, as a share of those without caching. With 64 tokens the
projections are most of them, so that a window saves little here. `work` has the runs of the search as a share of |S|
|M| full ones a step.

"""
STEPS = """
## Other numbers of steps

Figure 9, middle: the same thresholds with other numbers of steps; the paper finds that more steps can be compressed
further.

"""
METRICS = """
![attention FLOPs against the error of the images](ditfastattn_ablation.png)

The choices of each layer at each step, at D4 and 20 steps (figure 5):

![the plan of D4](plan.png)

## Other metrics

Appendix A.7: the search bounds another loss of the model's output. `ssim` is 1 − SSIM; the paper needs about a tenth of
the usual threshold for it. LPIPS needs weights, and may be given as a function that decodes the latents
(`greedy_plan(…, metric=my_function)`).

"""
NEGATIVE = """
## Negative prompts

Appendix A.8: the text-to-shapes model at a guidance of {text_guidance:g}, with the negative caption "{negative}" in the
unconditional half, and with an empty one. It moves the images by {size:.2f} (relative L2). Plans at {text_delta} are
calibrated without it, with it, or with both trajectories side by side. The last column is the cosine between what the
negative caption changes in the images under the plan, and what it changes without caching: 1 is an effect that is kept.
Here it is {least:.2f} to {most:.2f}; the error with the negative caption is least for the plan calibrated {best}.

"""
COLUMNS = ("attention FLOPs", "relative L2", "SSIM", "full", "AST", "ASC", "WA-RS", "WA-RS+ASC", "work")


def render(content: Mapping[str, Any]) -> str:
    """Return the whole page."""
    sections, settings = content["sections"], content["settings"]
    residual, maps = sections["residual"]["class"], sections["maps"]["class"]
    pairs = list(zip(*(residual[quantity] for quantity in RESIDUAL), strict=True))
    inside = list(zip(*(maps[window]["inside"] for window in WINDOWS), strict=True))
    facts = {
        "layers": residual["rows"] // 2, "residual_steps": residual["steps"], "changes": len(pairs),
        "calm": sum(kept < window for window, kept in pairs), "torch": content["versions"]["torch"],
        "ratio": sum(kept for _, kept in pairs) / sum(window for window, _ in pairs),
        "layer": maps["layer"], "sequence_pairs": maps["sequence"]["pairs"],
        "grid_pairs": maps["rows and columns"]["pairs"],
        "better": sum(b / maps["rows and columns"]["pairs"] > a / maps["sequence"]["pairs"] for a, b in inside),
        **_kept(sections["negative"], settings["negative"]), "size": next(iter(sections["negative"].values()))["size"],
    }  # fmt: skip
    parts = [
        INTRODUCTION.format(**settings, **facts),
        METHODS,
        _plans(("strategies", "threshold"), sections["methods"]),
    ]
    parts += [STEPS, _plans(("steps", "threshold"), by_steps(content))]
    parts += [METRICS, _plans(("metric", "threshold"), sections["metrics"])]
    parts += [NEGATIVE.format(**settings, **facts), _negative(sections["negative"], settings["negative"])]
    return "".join(parts)


def _kept(rows: Mapping[str, Mapping[str, Any]], caption: str) -> dict[str, Any]:
    """Return the range of the effects that are kept, and which plan has the least error with the negative caption."""
    effects = [row["effect"] for row in rows.values()]
    best = min(rows, key=lambda name: rows[name]["error"][caption])
    names = {"without": "without it", "with": "with it", "both": "with both"}
    return {"least": min(effects), "most": max(effects), "best": names[best]}


def by_steps(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plans with all strategies by number of steps and threshold."""
    sections, steps = content["sections"], content["settings"]["steps"]
    usual = {
        name.replace("all", str(steps)): row for name, row in sections["methods"].items() if name.startswith("all")
    }
    found = {**usual, **sections["steps"]}
    return dict(sorted(found.items(), key=lambda pair: (int(pair[0].split()[0]), pair[0])))


def _plans(names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    return _table((*names, *COLUMNS), ((*name.split(), *_plan(row)) for name, row in rows.items()))


def _plan(row: Mapping[str, Any]) -> Iterable[str]:
    yield from (f"{row['attention']:.1%}", f"{row['relative_l2']:.4f}", f"{row['ssim']:.3f}")
    yield from (str(row["choices"][choice]) for choice in COLUMNS[3:8])
    yield f"{row['work']:.2f}"


def _negative(rows: Mapping[str, Mapping[str, Any]], caption: str) -> str:
    headings = ("calibrated", "attention FLOPs", "full", "AST", "ASC", "WA-RS", "WA-RS+ASC", "relative L2, empty",
                "relative L2, negative", "effect kept")  # fmt: skip
    lines = []
    for name, row in rows.items():
        choices = (str(row["choices"][choice]) for choice in COLUMNS[3:8])
        errors = (f"{row['error'][each]:.4f}" for each in ("None", caption))
        lines.append((name, f"{row['attention']:.1%}", *choices, *errors, f"{row['effect']:.3f}"))
    return _table(headings, lines)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(content: Mapping[str, Any], folder: Path) -> None:
    """Draw figure 3a, and figure 9 with the metrics."""
    from matplotlib.figure import Figure

    residual = content["sections"]["residual"]["class"]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for quantity, label in RESIDUAL.items():
        axes.plot(range(1, residual["steps"]), residual[quantity], marker=".", label=label)
    axes.set(xlabel="step", ylabel="mean squared change", yscale="log", xticks=range(1, residual["steps"], 3))
    axes.legend()
    figure.savefig(folder / "ditfastattn_residual.png", dpi=110)
    maps = content["sections"]["maps"]["class"]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(maps["map"], cmap="magma")
    left.set(xlabel="key", ylabel="query", title=f"layer {maps['layer']}")
    for name in WINDOWS:
        right.plot(maps[name]["inside"], marker="o", label=f"{name}: {maps[name]['pairs']:.0%} of the pairs")
    right.set(xlabel="layer", ylabel="attention inside the window", ylim=(0, 1))
    right.legend(fontsize="small")
    figure.savefig(folder / "ditfastattn_maps.png", dpi=110)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    sections = content["sections"]
    usual = {name.replace("all", "relative_error"): row for name, row in sections["methods"].items() if "all" in name}
    panels = {"strategies": sections["methods"], "steps": by_steps(content), "metric": {**usual, **sections["metrics"]}}
    for panel, (title, rows) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        _curves(panel, rows)
        panel.set(xlabel="attention FLOPs, % of full", title=title)
        panel.legend(fontsize="small")
    figure.axes[0].set_ylabel("relative L2 of the images")
    figure.savefig(folder / "ditfastattn_ablation.png", dpi=110)


def _curves(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a curve for each first word of the names."""
    for first in dict.fromkeys(name.split()[0] for name in rows):
        points = sorted(
            (100 * row["attention"], row["relative_l2"]) for name, row in rows.items() if name.split()[0] == first
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=first)
