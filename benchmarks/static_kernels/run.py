"""Figures of the Triton kernels from the compiler alone: python -m benchmarks.static_kernels [--quick] [--jobs 4]

Every kernel is compiled for Hopper (sm_90), and the main ones for Ampere (sm_80), on any machine; no GPU is needed. The
table gives, for each launch, registers and spills, shared memory, occupancy, the tensor-core and asynchronous copy
instructions of the main loop, and its issue: the instructions that each of a multiprocessor's four schedulers issues
for 128 x 64 scores. The main loop is the one without masks where there are several.

The exit code is 1 if a limit is missed. The limits hold for 16-bit window attention, blockwise attention and entropy
with heads of up to 128 channels on sm_90: no spills, tensor cores, an asynchronous copy in every loop with tensor
cores, and an issue of at most 0.55 of that of the first version of these kernels (`baseline` in the results file). The
kernels without tensor cores, blockwise attention's estimate and the relative change, must not spill.

The full run writes results/static_kernels.json. `--quick` compiles one shape for each kernel for sm_90, in under two
minutes on one core, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import triton

from benchmarks.static_kernels.cases import Case, every
from benchmarks.static_kernels.cases import quick as quick_cases
from benchmarks.static_kernels.compile import Figures, build
from benchmarks.timing import RESULTS

FILE = RESULTS / "static_kernels.json"
ISSUE = 0.55  # largest share of the baseline's issue
COLUMNS = ("kernel", "sm", "registers", "spills", "shared", "occupancy", "tensor", "copies", "issue", "share", "missed")


def chosen(quick: bool) -> list[Case]:
    """Return the cases of a run."""
    return list(quick_cases() if quick else every())


def compiled(quick: bool, job: tuple[int, int]) -> Figures:
    """Compile one case, given by its index, for one compute capability. Runs in a worker."""
    index, capability = job
    return build(chosen(quick)[index].launch(), capability)


def row(case: Case, capability: int, found: Figures, baseline: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the table, with the limits that it misses."""
    main = found.main()
    issue = found.issue(main, case.scores) if main else 0.0
    before = baseline.get(f"{case.kind}, sm_{capability}", {}).get("issue")
    share = issue / before if before else None
    return {
        "kernel": case.name, "sm": capability, "registers": found.registers, "spills": max(found.stack, found.spills),
        "shared": found.shared, "occupancy": found.occupancy, "tensor": main.tensor if main else 0,
        "copies": main.copies if main else 0, "issue": issue, "share": share,
        "missed": missed(case, found, share) if capability == 90 else [], "figures": found.content(),
    }  # fmt: skip


def missed(case: Case, found: Figures, share: float | None) -> list[str]:
    """Return the limits that a case misses."""
    loops = [loop for loop in found.loops if loop.tensor]
    limits = {
        "spills": not found.stack and not found.spills,
        "tensor cores": bool(loops),
        "copies": all(loop.copies for loop in loops),
        "issue": share is None or share <= ISSUE,
    }
    return [name for name in case.limits if not limits[name]]


def show(rows: Iterable[dict[str, Any]]) -> None:
    """Print the table."""
    lines = [COLUMNS, *(tuple(cell(line[name]) for name in COLUMNS) for line in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def cell(value: Any) -> str:
    """Format one cell."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 10 else f"{value:.0f}"
    return ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)


def jobs_of(cases: list[Case], quick: bool) -> list[tuple[int, int]]:
    """Return what to compile: every case for sm_90, and those of a quick run for sm_80, except in a quick run."""
    both = set() if quick else {case.name for case in quick_cases()}
    return [(i, 90) for i in range(len(cases))] + [(i, 80) for i, case in enumerate(cases) if case.name in both]


def measure(quick: bool, jobs: int) -> list[tuple[Case, int, Figures]]:
    """Compile every case, in `jobs` processes if that is more than one."""
    cases = chosen(quick)
    todo = jobs_of(cases, quick)
    work = partial(compiled, quick)
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(work, todo))
    else:
        found = [work(job) for job in todo]
    return [(cases[i], capability, each) for (i, capability), each in zip(todo, found, strict=True)]


def main(given: list[str] | None = None) -> int:
    """Return the exit code: 1 if a limit is missed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.static_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape for each kernel, sm_90 only; writes nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    options = parser.parse_args(given)
    began = time.monotonic()
    before: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    baseline = before.get("baseline", {})
    found = measure(options.quick, options.jobs)
    rows = [row(case, capability, each, baseline) for case, capability, each in found]
    show(rows)
    if not options.quick:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        FILE.write_text(json.dumps({"versions": versions, "baseline": baseline, "rows": rows}, indent=1) + "\n")
    failed = [f"{line['kernel']}: {', '.join(line['missed'])}" for line in rows if line["missed"]]
    print(f"{len(rows)} launches in {time.monotonic() - began:.0f} s; {len(failed)} miss a limit", *failed, sep="\n")
    return 1 if failed else 0
