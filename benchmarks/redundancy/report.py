"""The page of benchmarks/redundancy/run.py: tables from the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.record import VERDICTS, Claim
from benchmarks.redundancy.claims import STUDIED, TOYS, judge
from dit_rewrite.analysis.compare import VALUE

NAMES = {"class": "class (DiT)", "text": "text (PixArt)", "flow": "flow (SD3)"}

INTRODUCTION = """# Redundancy

Written by `python -m benchmarks.redundancy` from `redundancy.json` (torch {torch}, diffusers {diffusers}).

How much do a model's tensors change from step to step, and does that say which of them may be reused? Sun et al. 2024
measured keys, values and attention outputs of published models and found that the distribution over layers and steps
is particular to a model, and stable over prompts, steps and schedulers. Here are the same measurements on the three
bundled toys, each with {prompts} prompts at 28 steps ({fewer} prompts in comparisons with other steps and schedulers),
and on the study's seven architectures at toy size. `dit_rewrite.analyze` makes them for any model:

```python
import dit_rewrite
from dit_rewrite.analysis import plots

found = dit_rewrite.analyze(pipe, ["a cat", "a dog"], steps=28, path="analysis.safetensors")
plots.draw(found, "plots")
```

Keys and values are measured as the attention op reads them, behind norms and rotations; `keys="projection"` measures
them as they are projected. *L1* is the mean of |x − y| between consecutive steps, *relative L1* its share of the mean
of |y|. A rank correlation is Spearman's, over the steps of a layer, averaged over layers and modalities.
"""

CLAIMS = "## What holds\n"
CHANGES = """## Changes between steps

At 28 steps, averaged over layers, steps and both halves of the guidance.
"""
VARIATION = """## Prompts

The coefficient of variation of the L1 distance over prompts, averaged over layers and steps (the study's table 2), with
its 95 % interval, and the rank correlation over steps between two prompts. The study found 0.10 to 0.15.
"""
STABILITY = """## Steps and schedulers

Rank correlation over progress with the usual schedule at 28 steps. DDIM calls at whole timesteps, of 1000: 56 steps are
17 or 18 timesteps long in turn, which shows in every profile at 56 steps and lowers its correlation.
"""
ERRORS = """## Does redundancy predict the error of reuse?

Each branch was reused once, at one step of 14, and the final images compared with those without reuse (relative L2,
{batch} images in a batch). *Overall* is the rank correlation between a measure and that error over all sites and steps;
*among sites* is that among the sites of one step, which is what a choice of sites needs. The three best of 20 measures,
and all of the value that is reused.
"""
FAMILIES = """## Architectures of the study, with random weights

Toy size and random weights, the latent turned from one noise into another over 14 steps: what differs is the
architecture alone. None of it is a statement about published weights. The sizes of Mochi's attention depend on its text
mask, so that its keys and values are measured as they are projected, and its attention output is not.
"""
PICTURES = """## Layers and steps

Relative L1 of the attention branches of the conditional half, layer by step; and the L1 of attention over progress with
other numbers of steps and another scheduler, each divided by its mean.
"""


def render(content: Mapping[str, Any]) -> str:
    """Return the whole page."""
    sections, versions, settings = content["sections"], content["versions"], content["settings"]
    toys = {name: sections[name] for name in TOYS if "base" in sections.get(name, {})}
    parts = [INTRODUCTION.format(torch=versions["torch"], diffusers=versions["diffusers"], **settings)]
    parts += [CLAIMS, _table(("finding", "bound", "verdict", "numbers"), map(_claim, judge(sections)))]
    parts += [CHANGES, _table(("toy", "quantity", "L1", "relative L1", "cosine", "first, middle, last third of L1"),
                              (row for name, toy in toys.items() for row in _changes(name, toy)))]  # fmt: skip
    pictures = [f"![{NAMES[name]}](redundancy_{name}{kind}.png)" for name in toys for kind in ("", "_stability")]
    parts += [PICTURES, "\n\n".join(pictures) + "\n"]
    parts += [VARIATION, _table(("toy", *(f"{q}: {w}" for q in STUDIED for w in ("variation", "correlation"))),
                                (_variation(name, toy) for name, toy in toys.items()))]  # fmt: skip
    parts += [STABILITY, _table(("toy", "compared with", *STUDIED, "branch", "mlp"),
                                (row for name, toy in toys.items() for row in _stability(name, toy)))]  # fmt: skip
    parts += [ERRORS.format(batch=4), _table(("toy", "quantity", "measure", "overall", "among sites", "pairs"),
              (row for name, toy in toys.items() for row in _predictions(name, toy)))]  # fmt: skip
    parts += [FAMILIES, _table(("model", *(f"{q}: relative L1" for q in STUDIED), "variation of attention",
                                "attention with depth", "branch", "mlp"),
                               map(_family, sections.get("families", {}).values()))]  # fmt: skip
    return "\n".join(parts)


def _claim(claim: Claim) -> tuple[str, ...]:
    by_toy: dict[str, list[str]] = {}
    for evidence in claim.evidence:
        by_toy.setdefault(evidence["toy"], []).append(_number(evidence["value"]))
    numbers = "; ".join(f"{toy} {', '.join(values)}" for toy, values in by_toy.items())
    held = sum(evidence["held"] for evidence in claim.evidence)
    return claim.claim, claim.bound, f"{VERDICTS[claim.held]} ({held} of {len(claim.evidence)})", numbers


def _changes(name: str, toy: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for quantity, each in toy["base"]["quantities"].items():
        thirds = ", ".join(_number(each[f"{third}_third"]) for third in ("first", "middle", "last"))
        yield NAMES[name], quantity, _number(each["l1"]), _number(each["relative_l1"]), f"{each['cosine']:.4f}", thirds
    apart = toy["base"]["guidance"]
    yield NAMES[name], "branch, unconditional against conditional", "", _number(apart["relative_l1"]), "", ""


def _variation(name: str, toy: Mapping[str, Any]) -> tuple[str, ...]:
    cells = [NAMES[name]]
    for quantity in STUDIED:
        each = toy["base"]["quantities"][quantity]
        middle, low, high = each["variation"]
        cells += [f"{_number(middle)} ({_number(low)} to {_number(high)})", _number(each["prompts"][0])]
    return tuple(cells)


def _stability(name: str, toy: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for other, each in toy.items():
        if other not in ("base", "errors"):
            yield NAMES[name], other, *(_number(each[q][0]) for q in (*STUDIED, "branch", "mlp"))


def _predictions(name: str, toy: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    found = toy.get("errors", {}).get("predictions", ())
    for each in (p for i, p in enumerate(found) if i < 3 or p["quantity"] == VALUE):
        numbers = _number(each["overall"]), _number(each["among_sites"]), str(each["pairs"])
        yield NAMES[name], each["quantity"], each["measure"], *numbers


def _family(entry: Mapping[str, Any]) -> tuple[str, ...]:
    quantities = entry["quantities"]

    def of(quantity: str, field: str) -> str:
        value = quantities.get(quantity, {}).get(field)
        return _number(value[0] if isinstance(value, list) else value)

    studied = (of(quantity, "relative_l1") for quantity in STUDIED)
    trends = of("attention", "variation"), of("attention", "with_depth")
    return entry["model"], *studied, *trends, of("branch", "relative_l1"), of("mlp", "relative_l1")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
