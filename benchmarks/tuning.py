"""The parameter studies of DQAR and FORA on the class toy, by `dit_rewrite.tune`: python -m benchmarks.tuning

- grid: DQAR's 40 cells (section 4.7): warmup x layer fraction x order.
- thresholds: 30 trials of TPE over the SNR and the entropy threshold (section 4.9), at 10 % warmup and all layers, so
  that the thresholds decide.
- guidance and steps: FORA's interval at several guidance scales (table 4) and numbers of steps (table 3).

The objectives are the relative L2 error to the uncached images of the same sampler, where the papers have FID, and the
FLOPs over those of the uncached model. A study goes on from its journal, which is not versioned.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import Record
from benchmarks.timing import RESULTS, machine
from dit_rewrite.demo.report import console, versions
from dit_rewrite.demo.shapes.data import NUM_CLASSES
from dit_rewrite.demo.shapes.model import load_denoiser
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images
from dit_rewrite.policies import DQAR, FORA
from dit_rewrite.policy.rules import Policy
from dit_rewrite.search.evaluation import Evaluation
from dit_rewrite.search.front import Front
from dit_rewrite.search.tune import Range, Space, tune

STEPS, SEEDS = 50, (20_000,)
GRID: Space = {
    "warmup": [0.1, 0.2, 0.3, 0.4],
    "layer_fraction": [0.33, 0.5, 0.66, 0.75, 1.0],
    "order": ["linear", "linear_reverse"],
}
THRESHOLDS: Space = {"snr_threshold": Range(0.02, 2.0), "entropy_threshold": Range(3.0, 4.2)}  # the maximum is log 64
INTERVALS = {"interval": [2, 3, 5]}
GUIDANCES, LENGTHS = (1.25, 3.0, 4.5), (25, 50, 100)
WANTED = {  # the trials of each study
    "DQAR: warmup, layer fraction, order": 40,
    "DQAR: SNR and entropy": 30,
    **{f"FORA: guidance {guidance}": 3 for guidance in GUIDANCES},
    **{f"FORA: {steps} steps": 3 for steps in LENGTHS},
}
Trial = dict[str, Any]

INTRODUCTION = """# Parameter studies

Written by `python -m benchmarks.tuning` from `tuning.json`: the studies of DQAR and FORA, repeated on the class toy by
`dit_rewrite.tune`. Errors are relative L2, to the uncached images of the same noise ({images} images); the papers have
FID. Costs are FLOPs over those of the uncached model. `share` is the part of the variance of log error that a parameter
explains alone: the variance of its values' means (in quarters of its trials, if it has a range) over the whole.

```python
evaluate = dit_rewrite.Evaluation(model, sample, seeds=(0, 1))
space = {{"warmup": [0.1, 0.4], "layer_fraction": [0.33, 1.0]}}
front = dit_rewrite.tune(policies.DQAR, space, evaluate, sampler="grid")
print(front.table())
front.save("front")  # a policy file for each point, for dit-rewrite generate --policy
```
"""


def dqar(**parameters: Any) -> Policy:
    """DQAR without the SNR condition, unless it is among the parameters."""
    return DQAR(**{"snr_threshold": None, **parameters})


def eager(**parameters: Any) -> Policy:
    """DQAR with most reuse, so that the thresholds decide."""
    return DQAR(warmup=0.1, layer_fraction=1.0, **parameters)


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.denoiser = arguments, load_denoiser()
        settings = {"images": arguments.images, "seeds": SEEDS}
        self.record = Record.open(arguments.out, {"settings": settings, "machine": machine(), "versions": versions()})

    def evaluation(self, steps: int = STEPS, guidance: float = GUIDANCE) -> Evaluation:
        labels = torch.arange(self.arguments.images) % NUM_CLASSES

        def sample(denoiser: nn.Module, seed: int) -> Tensor:
            return sample_images(denoiser, labels, steps=steps, guidance=guidance, seed=seed)

        return Evaluation(self.denoiser, sample, SEEDS, backend="aot_eager")

    def study(self, name: str, make: Callable[..., Policy], space: Space, evaluate: Evaluation, **how: Any) -> None:
        """Run a study, and keep its trials."""

        def run() -> Mapping[str, Any]:
            journal = self.arguments.out.with_suffix(".journal")
            front = tune(
                make,
                space,
                evaluate,
                storage=journal,
                study=name,
                report=self.say,
                timeout=self.arguments.timeout,
                **how,
            )
            return trials_of(front)

        self.record.get("studies", name, run)

    def say(self, line: str) -> None:
        console.print(line, highlight=False)

    def run(self) -> None:
        chosen = self.arguments.studies
        if "grid" in chosen:
            self.study("DQAR: warmup, layer fraction, order", dqar, GRID, self.evaluation(), sampler="grid")
        if "thresholds" in chosen:
            evaluate = self.evaluation()
            self.study("DQAR: SNR and entropy", eager, THRESHOLDS, evaluate, sampler="tpe", trials=30)
        for guidance in GUIDANCES if "guidance" in chosen else ():
            self.study(
                f"FORA: guidance {guidance}", FORA, INTERVALS, self.evaluation(guidance=guidance), sampler="grid"
            )
        for steps in LENGTHS if "steps" in chosen else ():
            self.study(f"FORA: {steps} steps", FORA, INTERVALS, self.evaluation(steps), sampler="grid")


def trials_of(front: Front) -> dict[str, Any]:
    return {"trials": json.loads(front.to_json())["trials"], "pruned": front.pruned}


def shares(trials: Sequence[Trial]) -> dict[str, float]:
    """Return the part of the variance of log error that each parameter explains alone."""
    logs = [math.log(max(trial["values"]["error"], 1e-6)) for trial in trials]
    whole = statistics.pvariance(logs)
    found = {}
    for name in trials[0]["parameters"]:
        values = [trial["parameters"][name] for trial in trials]
        groups: dict[Any, list[float]] = defaultdict(list)
        few = len(set(values)) <= 8
        ranks = {i: rank for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i]))}
        for i, log in enumerate(logs):
            groups[values[i] if few else ranks[i] * 4 // len(values)].append(log)
        mean = statistics.fmean(logs)
        between = sum(len(group) * (statistics.fmean(group) - mean) ** 2 for group in groups.values()) / len(logs)
        found[name] = between / whole if whole > 0 else 0.0
    return found


def page(record: Record, docs: Path) -> Path:
    """Write the page from the studies in the file."""
    lines = [INTRODUCTION.format(images=record.header["settings"]["images"])]
    for name, study in record.sections.get("studies", {}).items():
        trials = study["trials"]
        best = [t for t in trials if t["front"]] if name.startswith("DQAR") else trials
        told = ", ".join(f"`{key}` {share:.2f}" for key, share in shares(trials).items())
        pruned = f", {study['pruned']} pruned" if study["pruned"] else ""
        count = f"{len(trials)} of {WANTED[name]} trials{pruned}"
        what = f"The front of {count}" if name.startswith("DQAR") else count
        lines += [f"## {name}", "", f"{what}; share of the variance: {told}.", "", *_table(best), ""]
    missing = [name for name in WANTED if name not in record.sections.get("studies", {})]
    lines += ["## Not measured yet", "", f"{'; '.join(missing)}.", ""] if missing else []
    path = docs / "tuning.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _table(trials: Sequence[Trial]) -> list[str]:
    names = list(trials[0]["parameters"])
    rows = [f"| {' | '.join(names)} | error | FLOPs |", f"|{'---|' * len(names)}---:|---:|"]
    for trial in sorted(trials, key=lambda t: t["values"]["flops"]):
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial["parameters"].values()]
        rows.append(f"| {' | '.join(cells)} | {trial['values']['error']:.4f} | {trial['values']['flops']:.3f} |")
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["grid", "thresholds", "guidance", "steps"]
    parser.add_argument("--studies", nargs="*", choices=names, default=names)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--timeout", type=float, help="seconds after which a study begins no further trial")
    parser.add_argument("--out", type=Path, default=RESULTS / "tuning.json")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 1000
    bench = Bench(arguments)
    bench.run()
    print(f"wrote {page(bench.record, arguments.docs)}")


if __name__ == "__main__":
    main()
