"""The page of the overhead benchmark, rendered from its results: python -m benchmarks.overhead.report"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS
from dit_rewrite.policy.files import write_whole

PAGE = Path("docs") / "overhead.md"
INTRODUCTION = """# What it costs

Written by `python -m benchmarks.overhead` from `overhead.json`.

- The model: {model}.
- The machine: {where}, {threads} threads, Python {python}, torch {torch}.

Ratios are those of alternating runs in one process. The A/A row, plain torch.compile against itself, says how far a
ratio can be trusted. First calls are timed with empty caches. *Reuse 0* is the rewritten model with every site stored
and every decision forced to compute; a *reusing step* reuses every site. Rows of single steps alternate between models,
so that each finds its values evicted from the CPU's caches by the other models; rows *in a trajectory* time the steps
where they run, behind the step that filled the slots. A *page fault* is the first use of memory that the system has
provided anew; each one interrupts the step."""
EXPLANATION = """## Where the time goes

- **A reusing step** is short enough for its Python to count; the rows have its shares. The compiled code reads every
  slot once, here twelve tensors of 0.8 MB. The entry is that of every compiled model: Dynamo's guards look at each
  module and each weight in each call, and so does the bytecode that hands the weights on. All of it finds the CPU's
  caches full of a computing step's tensors, and takes longer than in the loop that measures *host time*. Whoever
  changes nothing of a model between two steps may run it under `torch.compiler.set_stance(skip_guard_eval_unsafe=True)`
  after a first run; torch calls this unsafe because it does not notice a change.
- **A step of a forecast** is bound by memory: one of order n reads n + 1 values of each slot. Forecasting the output
  alone (`span="output"`) reads n + 1 small tensors.
- **The first trajectory of a conditioning** computes the rows of its step table, all steps in one batched call. The
  class is in this DiT's modulation, so its rows belong to a conditioning. Rows that depend on the timestep alone are
  computed once for all trajectories.
- **The first call** of FORA(3) lowers two graphs instead of one. Kernels of the first are built while the second is
  lowered. Garbage is collected once, at the end; a compilation keeps most objects until then.
- **The first call of a deep model by segments** compiles five segments instead of one graph of 28 blocks, and builds
  their kernels at the same time. Dynamo and AOTAutograd trace all blocks either way.
- **Host time** is Python. Decisions are kept from one trajectory to the next. What is left is telling calls apart,
  checking inputs, and handing a hundred tensors on."""


def render(content: Mapping[str, Any]) -> str:
    """Render the page from the content of ``overhead.json``."""
    machine = content["machine"]
    where = machine["gpu"] or machine["cpu"]
    head = INTRODUCTION.format(model=content["model"], where=where, **machine)
    return "\n".join([head, "", *table(content["rows"]), "", EXPLANATION]) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Render the rows of a results file that `timing.report` wrote."""
    yield "| measured | median | quartiles | aim | held |"
    yield "|---|---:|---:|---:|---|"
    for row in rows:
        value, bound = row["value"], row["bound"]
        spread = "" if value["runs"] == 1 else f"{value['low']:.4g} … {value['high']:.4g}"
        judged = bound.startswith(("<", ">")) or "within" in bound
        held = ("yes" if row["held"] else "no") if judged else ""
        yield f"| {row['what']} | {value['median']:.4g} {row['unit']}".rstrip() + f" | {spread} | {bound} | {held} |"


def write_page(page: Path = PAGE) -> None:
    """Write the page from the committed results."""
    write_whole(page, render(json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    write_page()
