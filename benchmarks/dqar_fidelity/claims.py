"""Evaluation of DQAR's claims, and of packed codecs, from the measured rows.

The error of a row is its relative L2 distance to the uncached images. Two rows are compared batch by batch, with the
same noise: one is better if the mean difference exceeds twice its standard error. A claim holds if all its comparisons
do; without any comparison it is open.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.dqar_fidelity.rows import Result
from benchmarks.record import Claim, Evidence

NEAR_REUSE = 0.1  # largest relative difference of two reuse ratios that are compared
NEAR_ERROR = 0.1  # errors that differ by less than this share count as equal


def beyond_noise(a: Result, b: Result) -> float:
    """Return the mean difference of a's and b's errors over batches, in standard errors.

    If the difference is the same in all batches, the result is a signed infinity, or 0.
    """
    differences = [x - y for x, y in zip(a.relative_l2_by_batch, b.relative_l2_by_batch, strict=True)]
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / spread


def better(a: Result, b: Result) -> bool:
    """Return whether a's error is significantly smaller."""
    return beyond_noise(a, b) < -2


def same_images(a: Result, b: Result) -> bool:
    """Return whether two rows have identical errors, so that their policies made the same decisions."""
    return a.relative_l2_by_batch == b.relative_l2_by_batch


def relative_change(a: Result, b: Result) -> float:
    """Return the relative excess of a's error over b's; 0 if both are 0."""
    if b.relative_l2 == 0:
        return 0.0 if a.relative_l2 == 0 else math.inf
    return a.relative_l2 / b.relative_l2 - 1


def compare(a: Result, b: Result, held: bool) -> Evidence:
    """Return the figures of two rows as evidence."""
    return {
        "row": a.name,
        "against": b.name,
        "reuse": [a.reuse, b.reuse],
        "time": [a.ratio.median, b.ratio.median],
        "relative_l2": [a.relative_l2, b.relative_l2],
        "frechet_uncached": [a.frechet_uncached, b.frechet_uncached],
        "frechet_data": [a.frechet_data, b.frechet_data],
        "standard_errors": beyond_noise(a, b),
        "held": held,
    }


def nearest(row: Result, others: Sequence[Result]) -> Result | None:
    """Return the row with the nearest reuse ratio within NEAR_REUSE, or None; of several, that of smallest error."""
    near = [other for other in others if abs(other.reuse - row.reuse) <= NEAR_REUSE * row.reuse]
    return min(near, key=lambda other: (round(abs(other.reuse - row.reuse), 4), other.relative_l2), default=None)


def _plain_dqar(rows: Sequence[Result]) -> list[Result]:
    """Return the rows of DQAR as published: first layers first, nothing packed, outputs cached."""
    found = [r for r in rows if r.family == "DQAR" and r.key["store"] is None and not r.key["kv"]]
    return [r for r in found if r.setting("order") == "linear"]


def _gates(rows: Sequence[Result], *, snr: bool | None, entropy: bool) -> list[Result]:
    """Return the published DQAR rows with or without (None: either) an SNR gate, and with or without entropy gate."""
    found = [r for r in _plain_dqar(rows) if (r.setting("entropy_threshold") is not None) == entropy]
    return [r for r in found if snr is None or (r.setting("snr_threshold") is not None) == snr]


def _matched(
    rows: Sequence[Result], others: Sequence[Result], held: Callable[[Result, Result], bool]
) -> list[Evidence]:
    """Compare each row with the one of the nearest reuse ratio, if there is one."""
    pairs = [(row, nearest(row, others)) for row in rows]
    return [compare(row, other, held(row, other)) for row, other in pairs if other is not None]


def _same_but(rows: Sequence[Result], name: str, other: Any) -> list[tuple[Result, Result]]:
    """Return the pairs of rows that differ only in one setting, in which the second has the value `other`."""
    pairs = []
    for b in (r for r in rows if r.setting(name) == other):
        for a in rows:
            apart = {k for k in a.key["settings"] if a.setting(k) != b.setting(k)}
            alike = (a.family, a.key["store"], a.key["kv"]) == (b.family, b.key["store"], b.key["kv"])
            if alike and apart == {name}:
                pairs.append((a, b))
    return pairs


def snr_gate(rows: Sequence[Result]) -> Claim:
    static = _gates(rows, snr=False, entropy=False)
    gated = [r for r in _gates(rows, snr=True, entropy=False) if not any(same_images(r, other) for other in static)]
    bound = f"less error than the static schedule of the nearest reuse ratio (within {NEAR_REUSE:.0%})"
    evidence = _matched(gated, static, better)
    return Claim.of("An SNR gate beats a static schedule of the same reuse ratio", bound, evidence)


def snr_gate_alone(rows: Sequence[Result]) -> Claim:
    pairs = _same_but(_gates(rows, snr=None, entropy=False), "snr_threshold", None)
    evidence = [compare(a, b, better(a, b)) for a, b in pairs if not same_images(a, b)]
    bound = "less error than the same schedule without the gate, which reuses more"
    return Claim.of("An SNR gate added to a schedule reduces its error (DQAR, table 10)", bound, evidence)


def warmup(rows: Sequence[Result]) -> Claim:
    """Compare along each axis of the static grid how fast log error falls with decreasing log reuse."""
    static = _gates(rows, snr=False, entropy=False)
    slopes = {name: _slopes(static, name) for name in ("warmup", "layer_fraction")}
    evidence: list[Evidence] = []
    if all(slopes.values()):
        means = {name: statistics.fmean(e["slope"] for e in found) for name, found in slopes.items()}
        evidence = [{"slopes": means, "held": means["warmup"] > means["layer_fraction"], "pairs": slopes}]
    bound = "d log(error) / d log(reuse) is greater along warm-up than along the layer fraction, in the mean"
    return Claim.of("Warm-up dominates quality (DQAR, table 8)", bound, evidence)


def _slopes(rows: Sequence[Result], axis: str) -> list[Evidence]:
    """Return, for each value of the other settings, the slope between the two rows farthest apart along an axis."""
    ends: dict[tuple[Any, ...], tuple[Result, Result]] = {}
    for a in rows:
        for b in rows:
            apart = {k for k in a.key["settings"] if a.setting(k) != b.setting(k)}
            if apart == {axis} and a.reuse > b.reuse > 0 and b.relative_l2 > 0:
                fixed = tuple(v for k, v in sorted(a.key["settings"].items()) if k != axis)
                if fixed not in ends or a.reuse / b.reuse > ends[fixed][0].reuse / ends[fixed][1].reuse:
                    ends[fixed] = (a, b)
    return [
        {
            **compare(a, b, better(b, a)),
            "error_ratio": a.relative_l2 / b.relative_l2,
            "slope": math.log(a.relative_l2 / b.relative_l2) / math.log(a.reuse / b.reuse),
        }
        for a, b in ends.values()
    ]


def order(rows: Sequence[Result]) -> Claim:
    evidence = [
        compare(b, a, abs(relative_change(b, a)) <= NEAR_ERROR) for a, b in _same_but(rows, "order", "linear_reverse")
    ]
    bound = f"errors within {NEAR_ERROR:.0%} of each other"
    return Claim.of("The order of the layers hardly matters (DQAR, section 4.7.2)", bound, evidence)


def entropy(rows: Sequence[Result]) -> Claim:
    def no_better(a: Result, b: Result) -> bool:
        return not (better(a, b) and relative_change(a, b) < -NEAR_ERROR)

    evidence = _matched(_gates(rows, snr=None, entropy=True), _gates(rows, snr=True, entropy=False), no_better)
    bound = f"not less error, by {NEAR_ERROR:.0%} and beyond noise, than SNR alone at the nearest reuse ratio"
    return Claim.of("An entropy gate adds nothing to SNR (DQAR, section 4.9)", bound, evidence)


def keys_values(rows: Sequence[Result]) -> Claim:
    outputs = {_schedule(r): r for r in rows if not r.key["kv"]}
    pairs = [(r, outputs[_schedule(r)]) for r in rows if r.key["kv"] and _schedule(r) in outputs]
    evidence = [compare(kv, output, better(output, kv)) for kv, output in pairs]
    bound = "more error than output caching at the same schedule"
    return Claim.of("K/V caching is worse than output caching (DQAR, section 3.1)", bound, evidence)


def _schedule(row: Result) -> tuple[Any, ...]:
    return row.family, str(sorted(row.key["settings"].items())), row.key["store"]


def stores(rows: Sequence[Result]) -> Claim:
    full = {_schedule(r): r for r in rows if r.key["store"] is None and not r.key["kv"]}
    packed = [(r, full.get((*_schedule(r)[:2], None))) for r in rows if r.key["store"] is not None]
    evidence = [compare(a, b, relative_change(a, b) <= NEAR_ERROR) for a, b in packed if b is not None]
    bound = f"at most {NEAR_ERROR:.0%} more error than with a cache that holds the values as they are"
    return Claim.of("int8 and fp8 caches cost no fidelity", bound, evidence)


def judge(rows: Sequence[Result]) -> list[Claim]:
    """Return all claims, evaluated on the available rows."""
    claims = (snr_gate, snr_gate_alone, warmup, order, entropy, keys_values, stores)
    return [claim(rows) for claim in claims]
