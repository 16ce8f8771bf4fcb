"""The sites of each named model: python -m benchmarks.models

The models are diffusers' classes at toy size with random weights; only the structure matters. The table has the sites
by kind, their share of the FLOPs, and the number of ops of a computing and of a fully reusing variant.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dit_rewrite
from benchmarks.timing import RESULTS, machine
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.rewrite import printing
from tests.helpers.models import MODELS, Case

KINDS = ("self", "cross", "joint", "parallel", "mlp")


def inspect(case: Case) -> dict[str, Any]:
    """Compile one model with FORA, call it twice, and return its row."""
    torch._dynamo.reset()
    model = dit_rewrite.compile(case.build(), dit_rewrite.policies.FORA(2), backend="aot_eager")
    with torch.no_grad(), model.trajectory(num_steps=2):
        for kwargs in case.inputs(2):
            model(**kwargs)
    report = model.explain()
    total = sum(cost.total_flops(r.captured.gm.graph) for r in report.rewritten)
    ops = [[printing.op_counts(v.gm).total() for v in r.variants.values()] for r in report.rewritten]
    return {
        "graphs": len(report.rewritten),
        "sites": dict(Counter(str(place.site.kind) for place in report.sites)),
        "flops_in_sites": sum(place.site.flops for place in report.sites) / total,
        "ops_computing": sum(max(counts) for counts in ops),
        "ops_reusing": sum(min(counts) for counts in ops),
    }


def main() -> None:
    found = {name: inspect(case) for name, case in MODELS.items()}
    table = Table(title="sites found, no adapter")
    for column in ("model", "graphs", *KINDS, "FLOPs in sites", "ops: computing", "reusing"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in found.items():
        kinds = (str(row["sites"].get(kind, "")) for kind in KINDS)
        share = f"{row['flops_in_sites']:.0%}"
        table.add_row(name, str(row["graphs"]), *kinds, share, str(row["ops_computing"]), str(row["ops_reusing"]))
    Console(width=120).print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "models.json").write_text(json.dumps({"machine": machine(), "models": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
