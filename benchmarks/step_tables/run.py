"""Step tables on paper: what of large models a table could hold: python -m benchmarks.step_tables [--model NAME]

A step table holds what a step computes from its timestep and the conditioning alone (passes/analysis/step_tables.py).
Every model has its published configuration (step_table_models.py) on torch's meta device: no weights, nothing runs.
Writes ``results/step_tables.json`` and ``docs/step_tables.md``.

Few blocks are traced. The blocks between the first and the last of a stack are alike, so every figure is a linear
function of the number of blocks from two on: it is that of two blocks of each stack, and for each further block what
a third one adds. `tests/benchmarks/test_step_tables.py` checks that on deeper stacks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import fx

from benchmarks.step_tables.models import MODELS, PaperModel
from benchmarks.step_tables.report import render
from benchmarks.timing import RESULTS
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.analysis.step_tables import StepTable, step_table
from dit_rewrite.passes.analysis.unbacked import is_unbacked
from dit_rewrite.passes.capture.capture import Captured, Runner, capture, one_graph
from dit_rewrite.runtime.inputs import Reader

PAGE = Path(__file__).parents[2] / "docs" / "step_tables.md"
FEWEST = 2  # blocks of a stack: its first and its last may differ from those between them
SAMPLES = 1  # vectors of a value that has one for each sample

Figures = dict[str, int]


class _Captured(Exception):
    """Stops the call of a compiled model: it is captured, and nothing is to run on the meta device."""


def trace(model: PaperModel, depths: Mapping[str, int]) -> Captured:
    """Capture the model with these numbers of blocks. Raises ValueError if it is not one graph."""
    built, call = model.build(depths), {**model.call(), "return_dict": False}
    inputs = Reader(built.forward).read((), call)
    caught: list[Captured] = []

    def then(captured: Captured) -> Runner:
        caught.append(captured)
        return _stop

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        told = inputs.conditioning, inputs.tensors, inputs.timestep, inputs.number
        return capture(gm, example_inputs, then, *told)

    torch.compiler.reset()
    with torch.no_grad(), one_graph(inputs.number), model.context(), contextlib.suppress(_Captured):
        torch.compile(built, backend=backend, dynamic=False)(**call)
    (captured,) = caught
    if not captured.complete:
        raise ValueError(f"{model.name} is not captured as one graph")
    return captured


def _stop(arguments: list[Any]) -> Sequence[Any]:
    raise _Captured


def tables(captured: Captured) -> dict[str, StepTable]:
    """The step tables by section: of values of the timestep alone and of all, with one vector for each sample; and of
    all values, those with a vector for each token too."""
    graph, held = captured.gm.graph, captured.conditioning
    found = find_sites(captured.gm, captured.static, held)
    reused = [value for site in found.sites for value in site.values]
    chosen: dict[str, tuple[frozenset[int], int | None]] = {
        "timestep": (frozenset(), SAMPLES), "samples": (held, SAMPLES), "tokens": (held, None),
    }  # fmt: skip
    return {
        section: step_table(graph, captured.static, conditioning, captured.step, reused, most)
        for section, (conditioning, most) in chosen.items()
    }


def figures(table: StepTable) -> Figures:
    """The figures of a table that grow with each block."""
    return {
        "values": len(table.values),
        "row_bytes": table.row_bytes,
        "flops": table.flops,
        "released_bytes": table.released_bytes,
        "reuse_values": sum(value.read_in_reuse for value in table.values),
        "reuse_bytes": table.reuse_bytes,
    }


def measured(model: PaperModel, depths: Mapping[str, int]) -> tuple[dict[str, Figures], dict[str, list[str]]]:
    """All figures with these numbers of blocks, and the conditioning that the values of each section depend on."""
    captured = trace(model, depths)
    found = tables(captured)
    known = not any(map(_has_unknown_size, captured.gm.graph.nodes))
    flops = cost.total_flops(captured.gm.graph) if known else 0
    step = {"weight_bytes": found["tokens"].weight_bytes, "flops": flops}
    conditioning = {
        section: sorted({name.removeprefix("kwargs_") for value in table.values for name in value.conditioning})
        for section, table in found.items()
    }
    return {**{section: figures(table) for section, table in found.items()}, "step": step}, conditioning


def _has_unknown_size(node: fx.Node) -> bool:
    """Whether the value has a size that depends on data, so that FLOPs cannot be counted."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and is_unbacked(value)


def row(model: PaperModel) -> dict[str, Any]:
    """The figures of a model with all of its blocks."""
    fewest = dict.fromkeys(model.depths, FEWEST)
    base, conditioning = measured(model, fewest)
    total = base
    for name, count in model.depths.items():
        more, _ = measured(model, {**fewest, name: FEWEST + 1})
        total = combined(total, base, more, count - FEWEST)
    described = {"name": model.name, "class": model.cls, "source": model.source, "depths": dict(model.depths)}
    return {**described, "conditioning": conditioning, **total}


def combined(
    total: dict[str, Figures], base: dict[str, Figures], more: dict[str, Figures], times: int
) -> dict[str, Figures]:
    """`total`, with so many times what `more` has more than `base`."""
    return {
        section: {key: value + times * (more[section][key] - base[section][key]) for key, value in entries.items()}
        for section, entries in total.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.step_tables", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[model.name for model in MODELS], help="print one model, write nothing")
    chosen = parser.parse_args().model
    rows = [row(model) for model in MODELS if chosen in (None, model.name)]
    content = {"torch": torch.__version__, "diffusers": diffusers.__version__, "rows": rows}
    page = render(content)
    print(page)
    if chosen is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "step_tables.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        PAGE.write_text(page)
