"""The page of the autopolicy benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import VERDICTS, Claim, Record

Entry = dict[str, Any]

INTRODUCTION = """# A policy from one number

Written by `python -m benchmarks.autopolicy` from `autopolicy.json`.

`dit_rewrite.autopolicy(model, sample, speedup=3)` takes a number and returns a policy. It measures the model: the
values of full runs, and the influence of each step on the final image. From these a dynamic programme places the
computed steps for each possible number of them, with fitted weights for the forecasts between. The best placements run,
and so do evenly spaced ones, as one would set by hand; computed steps are moved while the measured error falls; the
error is measured on held-out seeds; and fewer steps of the best solver at the same cost run as the control, which is
returned where it is better. `max_bytes=` bounds the size of the caches beside another bound: forecasts then read fewer
earlier values, and the certificate has the predicted size and the largest one in a run.

```python
found = dit_rewrite.autopolicy(model, sample, speedup=3, controls={"DPM-Solver++ 2M": fewer_steps})
print(found)  # both errors with their intervals, and the winner
found.save("policy.json")  # the policy with its certificate: dit-rewrite generate --policy policy.json
```

`cost` is in FLOPs over those of a run that computes all 50 steps. Errors are relative L2, to the images of the same
sampler that computes everything: `held out` is the mean over the certificate's seeds with its 95 % interval, `unseen`
the mean over batches of 12 images of seeds that the search never saw, and `same images` the error on the 24 images of
[the fidelity benchmark](fidelity.md). `hand-set` is the front of its hand-set policies on these images, interpolated at
the same FLOPs; the best of about 70 policies on the images that it is judged by has an advantage. `even` is a plan of
as many evenly spaced computed steps with TaylorSeer's forecasts of the output, among the best by hand, on the unseen
images. `fewer steps` is the best solver at the same number of calls, on the held-out seeds. A few images are so
sensitive that any small error changes them, and they decide the mean of a few dozen images by chance. `typical` is the
geometric mean over the unseen images, of the policy and of the even plan; the search compares candidates by it.
"""


def _typical(unseen: Entry | None, even: Entry | None) -> str:
    known = [f"{each['typical']:.4f}" for each in (unseen, even) if each is not None and "typical" in each]
    return ", even ".join(known)


def write_page(record: Record, claims: Sequence[Claim], docs: Path, missing: Sequence[str] = ()) -> Path:
    """Write the page from the rows and the claims. `missing` are the rows that were not measured."""
    lines = [INTRODUCTION]
    for toy in (name for name in record.sections if ", " not in name):
        lines += [f"## {toy}", "", *_claims(toy, claims), "", *_table(toy, record, claims), ""]
    if missing:
        lines += ["## Not measured yet", "", f"{'; '.join(missing)}.", ""]
    path = docs / "autopolicy.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _claims(toy: str, claims: Sequence[Claim]) -> Iterator[str]:
    for claim in (c for c in claims if c.claim.startswith(f"{toy}: ")):
        count = f"{sum(e['held'] for e in claim.evidence)} of {len(claim.evidence)}"
        yield f"- {claim.claim.removeprefix(f'{toy}: ')}: **{VERDICTS[claim.held].lower()}** ({count}; {claim.bound})"


def _table(toy: str, record: Record, claims: Sequence[Claim]) -> Iterator[str]:
    titles = (
        "bound, cost, computed, weights, held out, unseen, even, typical, same images, hand-set, fewer steps, winner, "
        "search"
    )
    yield f"| {titles.replace(', ', ' | ')} |"
    yield "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|"
    best = {e["bound"]: e for c in claims if c.claim.startswith(f"{toy}: against the best hand") for e in c.evidence}
    for bound, found in record.sections[toy].items():
        unseen = record.sections.get(f"{toy}, unseen", {}).get(bound)
        plan = record.sections.get(f"{toy}, even", {}).get(bound)
        yield f"| {' | '.join(_cells(bound, found, unseen, plan, best.get(bound)))} |"
    first = next(iter(record.sections[toy].values()))
    yield ""
    if any("typical" not in found for found in record.sections.get(f"{toy}, unseen", {}).values()):
        yield "Rows without a typical error are of an earlier search, which compared candidates by the mean error."
        yield ""
    yield (
        f"Measuring the model took {first['measuring_seconds']:.0f} s, once; `search` is the time for the bound on one "
        "loaded CPU core. The rank correlation of predicted and measured errors over all runs so far was "
        f"{list(record.sections[toy].values())[-1]['rank_correlation']:.2f}."
    )


def _cells(bound: str, found: Entry, unseen: Entry | None, even: Entry | None, best: Entry | None) -> list[str]:
    control = found["control"]
    return [
        bound,
        f"{found['cost']:.3f}",
        str(len(found["computed"])),
        found["style"],
        f"{found['error']:.4f} ({found['low']:.4f} to {found['high']:.4f})",
        "" if unseen is None else f"{unseen['mean']:.4f} ({unseen['unseen']} images)",
        "" if even is None else f"{even['mean']:.4f}",
        _typical(unseen, even),
        "" if unseen is None else f"{unseen['fidelity']:.4f}",
        "" if best is None else f"{best['hand_set']:.4f} ({best['policy'][:40]})",
        "" if control is None else f"{control['error']:.4f} ({control['solver']}, {control['steps']})",
        found["winner"],
        f"{found['search_seconds']:.0f} s",
    ]
