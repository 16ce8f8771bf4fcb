"""The tables and claims of benchmarks/ditfastattn/run.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.dqar_fidelity.rows import Result
from benchmarks.record import Claim, Record

NEAR_ACCURACY, NEAR_FRECHET = 0.02, 1.1  # the limits of "nearly matches"
HEADINGS = (
    *("FLOPs", "run", "rel. L2", "SSIM", "class", "FD real", "FD unc.", "time", "quartiles", "rows", "pieces"),
    *("compile s", "tried", "work", "search s"),
)


def judge(
    rows: Sequence[Result], plans: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]
) -> list[Claim]:
    """Return the paper's claims about its tables, and whether they hold here."""
    raw, *others = rows
    near = [
        {"row": row.name, "accuracy": row.accuracy, "frechet_data": row.frechet_data,
         "held": row.accuracy >= raw.accuracy - NEAR_ACCURACY and row.frechet_data <= NEAR_FRECHET * raw.frechet_data}
        for row in others if row.name in ("D1", "D2", "D3")
    ]  # fmt: skip
    steps = list(zip(plans, plans[1:], others, others[1:], strict=False))
    fall = [{"row": b.name, "flops": q["flops"], "held": q["flops"] < p["flops"]} for p, q, _, b in steps]
    grow = [{"row": b.name, "error": b.relative_l2, "held": b.relative_l2 > a.relative_l2} for _, _, a, b in steps]
    time = [{"row": row.name, "ratio": row.ratio.median, "held": row.ratio.high < 1} for row in others]
    least = [{**pair, "held": pair["residual"] < pair["none"]} for pair in pairs]
    return [
        Claim.of("Each threshold spends fewer attention FLOPs than the one before", "strictly", fall),
        Claim.of("And its images are further from the uncached ones", "relative L2", grow),
        Claim.of("D1 to D3 nearly match the raw model", "2 points of accuracy, Fréchet distance within 10 %", near),
        Claim.of("A plan saves time", "upper quartile of the ratio below 1", time),
        Claim.of("The residual brings images closer to the uncached ones", "relative L2 at equal FLOPs", least),
    ]


def build_tables(rows: Sequence[Result], plans: Sequence[Mapping[str, Any]], record: Record) -> tuple[Table, Table]:
    """Format tables one and two."""
    one = Table("", *HEADINGS, title="DiTFastAttn, table 1: plans of rising threshold, on the bundled shapes DiT")
    for row, plan in zip(rows, [None, *plans], strict=True):
        name = "raw" if plan is None else row.name
        searched = "" if plan is None else record.sections.get("searches", {}).get(name, {}).get("seconds")
        counts = ("100%", "100%", "", "", "", "", "") if plan is None else (
            f"{plan['flops']:.1%}", f"{plan['flops_run']:.1%}", str(plan["rows"]), str(plan["pieces"]),
            str(plan["evaluations"]), f"{plan['work']:.3f}", "?" if searched is None else f"{searched:.0f}",
        )  # fmt: skip
        one.add_row(
            name, *counts[:2], f"{row.relative_l2:.4f}", f"{row.ssim:.4f}", f"{row.accuracy:.1%}",
            f"{row.frechet_data:.3g}", f"{row.frechet_uncached:.3g}", f"{row.ratio.median:.3f}",
            f"{row.ratio.low:.2f} … {row.ratio.high:.2f}", *counts[2:4], f"{row.compile_seconds:.0f}", *counts[4:],
        )  # fmt: skip
    headings = ("window", "in full every", "FLOPs", "rel. L2 with residual", "without", "without / with")
    two = Table(*headings, title="DiTFastAttn, figure 9, right: window attention with the residual and without")
    for pair in record.sections["residual"].values():
        errors = (f"{pair['residual']:.4f}", f"{pair['none']:.4f}", f"{pair['none'] / pair['residual']:.2f}")
        two.add_row(f"{pair['window']:g}", f"{pair['interval']} steps", f"{pair['flops']:.1%}", *errors)
    return one, two
