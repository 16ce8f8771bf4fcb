"""The static figures of the kernels: read from machine code, judged by limits, and those of the kernels themselves."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.static_kernels import run
from benchmarks.static_kernels.cases import LIMITS, Case, every, quick
from benchmarks.static_kernels.compile import Figures, Launch, Loop, figures, innermost_loops, instructions, resident

pytest.importorskip("triton")

USAGE = "Function kernel:\n  REG:120 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:640\n"
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;
        /*0040*/                   MUFU.EX2 R5, R4 ;
        /*0050*/                   STL [R1], R5 ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0080*/              @!P1 BRA 0x70 ;
        /*0090*/               @P2 BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
"""
LOOP = Loop(5, 1, 1, 0, 1, 1)


def test_figures_of_machine_code() -> None:
    """Innermost loops alone, the endless branch behind the end is none, and padding does not count."""
    found = figures(USAGE, CODE, 4, 32 * 1024, 90)
    assert list(innermost_loops(instructions(CODE))) == [LOOP, Loop(2, 0, 0, 1, 0)] == list(found.loops)
    assert (found.registers, found.stack, found.spills, found.instructions) == (120, 8, 1, 12)
    assert (found.tensor, found.copies, found.wide_loads, found.narrow_loads) == (1, 1, 1, 1)
    assert found.main() == LOOP and found.issue(LOOP, 64 * 64) == 5 * 1 * 2


def test_how_many_programs_fit() -> None:
    assert resident(128, 8, 0, 90) == 2  # 128 x 256 registers each
    assert resident(32, 4, 75 * 1024, 90) == 3 and resident(32, 4, 75 * 1024, 80) == 2
    assert resident(32, 8, 0, 90) == 8  # 64 warps


def good(**changes: object) -> Figures:
    found = Figures(100, 0, 0, 0, 8, 2, 0.25, 1, 1, 1, 0, 100, (LOOP,))
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "baseline", "missed"),
    [
        ({}, 20, []),
        ({}, 18, ["issue"]),
        ({"stack": 8}, 20, ["spills"]),
        ({"spills": 1}, 20, ["spills"]),
        ({"loops": ()}, 20, ["tensor cores"]),
        ({"loops": (LOOP, Loop(9, 1, 0, 4, 0))}, 20, ["copies"]),
    ],
)
def test_limits(changes: dict[str, object], baseline: int, missed: list[str]) -> None:
    """The issue of the loop is 10, which 0.55 of 20 allows and 0.55 of 18 does not."""
    case = Case("a window", lambda: Launch(None, (), {}), 128 * 64, "window reuse, d=64", LIMITS)
    before = {"window reuse, d=64, sm_90": {"issue": baseline}}
    assert run.row(case, 90, good(**changes), before)["missed"] == missed
    assert run.row(case, 80, good(**changes), before)["missed"] == []
    spills = dataclasses.replace(case, limits=("spills",))
    assert run.row(spills, 90, good(**changes), before)["missed"] == missed[: "spills" in missed]


def test_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {case.name: case for case in quick()}
    case = next(case for name, case in cases.items() if name.startswith("window reuse, d=64"))
    for spilled in (0, 1):
        monkeypatch.setattr(run, "measure", lambda *_, n=spilled: [(case, 90, good(spills=n))])
        assert run.main(["--quick"]) == spilled
    assert "spills" in capsys.readouterr().out


def test_results_cover_every_case() -> None:
    """The results file has a row for each case and capability, and the figures of the first version."""
    content = json.loads(run.FILE.read_text())
    cases = list(every())
    wanted = {(cases[i].name, sm) for i, sm in run.jobs_of(cases, quick=False)}
    assert {(row["kernel"], row["sm"]) for row in content["rows"]} == wanted
    assert {case.name for case in quick()} == {name for name, sm in wanted if sm == 80}
    assert not any(row["missed"] for row in content["rows"])
    assert {case.kind for case in quick()} == {name.rpartition(", ")[0] for name in content["baseline"]}


def test_a_kernel_is_compiled_without_a_gpu() -> None:
    (case,) = [case for case in quick() if case.name.startswith("relative_l1")]
    assert not torch.cuda.is_available() or case.launch().args[0].is_meta
    found = run.build(case.launch(), 90)
    assert found.registers > 0 and not found.spills and not found.tensor and len(found.loops) == 1
