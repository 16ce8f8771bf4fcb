"""``python -m dit_rewrite explain``: the sites of a model, and the predicted costs of a policy."""

from __future__ import annotations

import argparse
from typing import Any

from dit_rewrite.cli.observe import observed
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.report.explain import Report
from dit_rewrite.report.prediction import Prediction


def as_json(report: Report) -> dict[str, Any]:
    """Return a report in numbers and texts."""
    found = report.prediction
    if isinstance(found, Prediction):
        counts = {str(kind): list(pair) for kind, pair in found.counts.items()}
        predicted: Any = {
            "steps": found.num_steps,
            "speedup": found.speedup,
            "recomputed": found.recomputed_fraction,
            "counts": counts,
            "attention_share": found.attention_share,
            "attention_shares": list(found.attention_shares),
            "flops": found.flops,
            "plain_flops": found.plain_flops,
        }
    else:
        predicted = {"reason": str(found)}
    return {
        "policy": str(report.policy),
        "flops": [str(each.total) for each in report.costs],
        "stream_bytes": report.stream_bytes,
        "peak_bytes": report.peak_bytes,
        "sites": [
            {
                "graph": place.graph,
                "occurrence": place.occurrence,
                "name": place.site.name,
                "kind": str(place.site.kind),
                "layer": place.site.layer,
                "guard": place.guard,
                "reachable": place.reachable,
                "flops": place.site.flops,
                "bytes": place.bytes,
            }
            for place in report.sites
        ],
        "refused": [{"path": r.path, "node": r.node, "reason": str(r.reason)} for r in report.refused],
        "predicted": predicted,
    }


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``python -m dit_rewrite explain``."""
    report = observed(arguments).explain()
    return Outcome(str(report), as_json(report))
