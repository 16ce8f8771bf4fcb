"""The benchmark of the kernels: its arithmetic, and every path at toy size, also without a GPU and most packages."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dit_rewrite
from benchmarks import timing
from benchmarks.attention import graphs as attention_graphs
from benchmarks.attention import models as attention_models
from benchmarks.attention import run as attention
from benchmarks.attention.cases import blockwise_attention, kept_pairs, new_state, patterns, roofline, shares
from benchmarks.attention.clock import Bench, Ceilings, HostClock, Run, distance, fastest
from benchmarks.timing import Row, Spread

BARE = """
import sys
sys.modules.update(diffusers=None, rich=None)  # importing them raises
from benchmarks.attention.run import main
sys.exit(main(["--device", "cpu", "--tiny", "--rounds", "2"]))
"""


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def results() -> dict[Path, int]:
    """The result files, with their modification times."""
    return {path: path.stat().st_mtime_ns for path in timing.RESULTS.glob("attention*")}


def test_every_path_runs_on_a_bare_machine() -> None:
    """Without diffusers and rich: all rows, checked results, and no result file."""
    root = Path(attention.__file__).parents[2]
    files = results()
    done = subprocess.run([sys.executable, "-c", BARE], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert results() == files
    rows = done.stdout.partition("\ngoals")[0]
    windows, by_blocks = 3 * 2, 2 * (4 + 6)  # cases of two head sizes; fractions of one block, and of three
    assert rows.count("reuse / SDPA ") == rows.count("refresh / (SDPA + window) ") == windows
    assert rows.count("reuse / FlexAttention") == rows.count("entropy / SDPA ") == windows
    assert rows.count("blockwise, d=") == by_blocks
    assert rows.count("relative_l1, 2 x 8 x 24") == 1
    assert len(rows.splitlines()) == 2 + windows * 9 + by_blocks + 1
    assert "FAILED" not in done.stdout
    assert "left out, as diffusers is not installed: whole models" in done.stdout and "DiT" not in rows


def test_whole_models() -> None:
    """Computed steps equal the plain model's; the other steps differ, since each strategy has an effect."""
    bench = Bench(HostClock(), 2)
    for geometry in attention_models.TINY:
        attention_models.end_to_end(bench, geometry, torch.empty(0), "aot_eager")
    differences = {(run["group"], run["run"]): run["difference"] for run in bench.runs if "difference" in run}
    shared = ["full, residual kept", "WA-RS", "WA-RS+ASC", "ASC", "AST", "full"]
    text = ["full, blocks kept", "blockwise, all kept"]
    dit, pixart = (geometry.title for geometry in attention_models.TINY)
    assert list(differences) == [*((dit, name) for name in shared), *((pixart, name) for name in (*shared, *text))]
    for (_, name), difference in differences.items():
        assert difference < 1e-5 if name.startswith("full") else 1e-5 < difference < 0.5
    assert [row.what for row in bench.rows] == [f"{title}: {name} / plain" for title, name in differences]
    assert bench.failures == {}


def test_trajectories_under_cuda_graphs() -> None:
    """On a CPU nothing is captured, which is an error on a GPU only."""
    bench = Bench(HostClock(), 2)
    for sizes in attention_graphs.TINY:
        attention_graphs.fora(bench, sizes, torch.empty(0), "aot_eager")
    names = ["FORA(3)", "FORA(3) under CUDA graphs"]
    assert [row.what for row in bench.rows] == [
        f"{sizes.title}: {name} / ideal" for sizes in attention_graphs.TINY for name in names
    ]
    assert bench.failures == {}
    model = dit_rewrite.compile(torch.nn.Linear(2, 2), "never", cuda_graphs=True)
    with pytest.raises(ValueError, match="no graph was replayed"):
        attention_graphs.check(model, 0.0, True)
    with pytest.raises(ValueError, match="= 1"):
        attention_graphs.check(model, 1.0, False)


def test_what_is_wrong_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that raises, one with a wrong result and one with a NaN are left out; the others are timed."""
    one = (tensor(3.0, 4.0),)

    def broken() -> None:
        raise RuntimeError("no such kernel")

    bench = Bench(HostClock(), 3)
    samples = bench.measure(
        "a case",
        {
            "right": Run(lambda: one[0] * 1.01, expected=one),
            "wrong": Run(lambda: one[0] * 1.03, expected=one),
            "second result": Run(lambda: (one[0], -one[0]), expected=one * 2),
            "nan": Run(lambda: one[0] * math.nan, expected=one),
            "broken": Run(broken),
        },
    )
    assert list(samples) == ["right"] and len(samples["right"]) == 3
    assert bench.failures["a case: broken"] == "RuntimeError: no such kernel"
    assert "0.03" in bench.failures["a case: wrong"] and "result 1" in bench.failures["a case: second result"]
    assert set(bench.failures) == {f"a case: {name}" for name in ("wrong", "second result", "nan", "broken")}
    assert "no such kernel" in capsys.readouterr().err
    bench.compare("of one that failed", samples, "broken", "right", most=1.0)
    assert bench.rows == []


def test_distance() -> None:
    assert distance(tensor(3.0, 5.0), tensor(3.0, 4.0)) == pytest.approx(1 / 5)
    assert distance(tensor(1.0).half(), tensor(1.0).double()) == 0


def test_before_runs_before_each_call() -> None:
    log: list[str] = []
    run = Run(lambda: log.append("call"), before=lambda: log.append("before"))
    Bench(HostClock(), 2).measure("a case", {"run": run})
    assert log == ["before", "call"] * 3


def test_goals() -> None:
    bench = Bench(HostClock(), 1)
    samples = {"a": [3.0, 1.0, 2.0], "b": [4.0, 4.0, 4.0]}
    assert fastest(samples) == "a"
    bench.compare("most", samples, "a", "b", most=0.5)
    bench.compare("less", samples, "a", "b", most=0.49)
    bench.compare("least", samples, "a", "b", least=0.5)
    bench.compare("more", samples, "a", "b", least=0.51)
    bench.compare("none", samples, "b", "a")
    assert [(row.bound, row.held) for row in bench.rows] == [
        ("<= 0.5", True), ("<= 0.49", False), (">= 0.5", True), (">= 0.51", False), ("", True),
    ]  # fmt: skip
    assert [row.value.median for row in bench.rows] == [0.5] * 4 + [2.0]


def test_rates() -> None:
    """At 100 FLOP/s and 10 bytes/s, 50 FLOPs take half a second at least and 8 bytes 0.8."""
    bench = Bench(HostClock(), 1)
    bench.ceilings = Ceilings(flops=100, bytes=10)
    assert bench.ceilings.floor(Run(lambda: None, 50, 8)) == 0.8
    found = bench._rates("a case", "run", Run(lambda: None, 50, 8), [2.0, 1.0, 4.0])
    assert found["FLOP/s"] == 25 and found["bytes/s"] == 4
    assert found["share of matrix product"] == 0.25 and found["share of copy"] == 0.4
    assert found["time / floor"] == 2.5


def test_the_planted_pairs_are_recomputed() -> None:
    """Exactly the pairs that are not planted, call after call, in each pattern; and the output is attention."""
    q, k, v = torch.randn(1, 2, 160, 16), torch.randn(1, 2, 48, 16), torch.randn(1, 2, 48, 16)
    state = new_state(q, k, v, 16, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    blockwise_attention(q, k, v, state, threshold=math.inf, block=16, bound="sound")
    for kept, whole in patterns(3):
        pairs = kept_pairs((1, 2, 10, 3), kept, whole_tiles=whole)
        assert pairs.sum() == round(kept * 60)
        assert not whole or torch.equal(pairs.any(-1), pairs.all(-1))
        for _ in range(3):
            before = state.counters.clone()
            state.computed.copy_(pairs)
            out, _ = blockwise_attention(q, k, v, state, threshold=math.inf, block=16, bound="sound")
            assert (state.counters - before)[:2].tolist() == [60 - round(kept * 60), 60]
            torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_shares_and_roofline() -> None:
    """Of 4 tiles with 2 blocks each, one is fully reused, two by half and one not at all."""
    pairs = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    assert shares(pairs) == (0.5, 0.25, pytest.approx(1 / 3))
    assert shares(torch.ones(4, 2)) == (1.0, 1.0, 0.0)
    q = torch.randn(1, 1, 64, 16)
    state = new_state(q, q, q, 32, 16)
    # nothing reused and only FLOPs: as attention. All reused and no FLOPs: 2 d s bytes, not 4.
    assert roofline(Ceilings(1, 1e9), state, torch.zeros(4, 2, dtype=torch.bool), q) == pytest.approx(1)
    assert roofline(Ceilings(1e9, 1), state, torch.ones(4, 2, dtype=torch.bool), q) == pytest.approx(0.5)


def test_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    """The rows without a measurement are named, and the command fails."""
    assert attention.main(["--device", "cpu", "--tiny", "--rounds", "1", "--minutes", "0"]) == 1
    printed = capsys.readouterr().out
    assert (
        printed.count("FAILED") == 11 + len(attention_models.TINY) + len(attention_graphs.TINY)
        and "not measured" in printed
    )


def test_one_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(["--device", "cpu", "--tiny", "--rounds", "1", "--part", "change"]) == 0
    printed = capsys.readouterr().out
    assert "relative_l1, 2 x 8 x 24" in printed and "reuse" not in printed and "blockwise" not in printed


def test_parts_of_make_gpu() -> None:
    """Every part of the benchmark, and every file with tests that need a GPU, is in a part of `make gpu`."""
    root = Path(attention.__file__).parents[2]
    makefile = (root / "Makefile").read_text()
    (parts,) = (line.partition(":=")[2].split() for line in makefile.splitlines() if line.startswith("GPU_PARTS"))
    assert set(attention.PARTS) < set(parts)
    files = [path for path in (root / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
    files += (root / "tests" / "kernels").glob("test_*.py")
    named = makefile.replace("$(addprefix tests/kernels/test_blockwise_,", "")
    for path in files:
        name = path.relative_to(root).as_posix()
        assert name in named or name.removeprefix("tests/kernels/test_blockwise_") in named or path == Path(__file__)


@pytest.mark.parametrize("given", [["--device", "cpu"], ["--dtype", "float32"]])
def test_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        attention.main(given)


def test_a_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    rows = [
        Row("reuse / SDPA", Spread(0.25, 0.2, 0.3, 5), "", "<= 0.35", True),
        Row("s", Spread(2, 1, 3, 5), "s", "", False),
    ]
    timing.show("goals", rows)
    assert capsys.readouterr().out.splitlines() == [
        "goals",
        "measured      median  quartiles  bound    held",
        "reuse / SDPA  0.25    0.2 … 0.3  <= 0.35  yes",
        "s             2 s     1 … 3               NO",
    ]
