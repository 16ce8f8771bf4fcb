"""`verify` finds deliberate faults and names their place, and refuses inputs that it cannot verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import fx

from dit_rewrite import Policy, RewrittenModule, Rule, Verification, verify
from dit_rewrite.compiler import backend, pipeline
from dit_rewrite.errors import BadArgument, MissReason, NotAPolicy, UnreachedPolicy
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute
from dit_rewrite.passes.rewrite.guarded_graph import GuardedGraph
from dit_rewrite.passes.rewrite.specialise import Variant
from dit_rewrite.policies import FORA, Never
from dit_rewrite.proof.compare import Check, Difference, equal, max_abs_error, rms
from dit_rewrite.runtime.cache import Cache
from dit_rewrite.runtime.session import Call, Session
from dit_rewrite.runtime.streams import Streams
from dit_rewrite.runtime.trajectory import ExplicitTrajectory
from tests.helpers import tiny
from tests.helpers.broken import broken_blocks

aten = torch.ops.aten
ALWAYS = Policy((Rule(sympy.true),), "always")


def verified(policy: Policy | None = None) -> Verification:
    """Verify the tiny model over four steps."""
    return verify(tiny.build(), tiny.calls(4), policy=policy or FORA(3), backend="aot_eager")


def is_seen(found: Verification, step: int, what: str) -> bool:
    """Whether the verification failed and names this step and this comparison."""
    first = found.first_difference
    assert first is not None
    said = str(found)
    assert said.startswith("FAILED") and f"at {first.node}, step {first.step} ({first.what})" in said
    return not found.passed and not found.exact and first.step == step and first.what.startswith(what)


def test_nothing_is_broken() -> None:
    found = verified()
    assert found.passed and found.exact and found.first_difference is None
    assert (found.sites, found.values, found.calls, found.decisions, found.reused) == (4, 4, 4, 16, 8)
    assert found.max_abs_error == 0


def test_two_layers_caches_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Cache.update
    other = {0: 2, 2: 0}  # the attentions of both blocks
    monkeypatch.setattr(Cache, "update", lambda cache, site, *args: store(cache, other.get(site, site), *args))
    found = verified()
    assert found.reuse0.exact
    assert is_seen(found, 0, "replay")


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[[fx.Graph], None], reusing: bool) -> None:
    """Change the graphs of the variants that reuse, or of those that compute."""
    specialise = backend.specialise

    def specialised(guarded: GuardedGraph, row: Sequence[bool], *args: Any) -> Variant:
        variant = specialise(guarded, row, *args)
        if any(row) == reusing:
            change(variant.gm.graph)
            variant.gm.recompile()
        return variant

    monkeypatch.setattr(backend, "specialise", specialised)


def short_circuit(target: Any, argument: int) -> Callable[[fx.Graph], None]:
    """Replace the result of the first call of an op by one of its arguments."""

    def change(graph: fx.Graph) -> None:
        node = graph.find_nodes(op="call_function", target=target)[0]
        node.replace_all_uses_with(node.args[argument])
        graph.erase_node(node)

    return change


@pytest.mark.parametrize("reusing", [True, False], ids=["in reuse", "in compute"])
def test_a_gate_dropped(monkeypatch: pytest.MonkeyPatch, reusing: bool) -> None:
    def drop(graph: fx.Graph) -> None:
        """Remove the first product as large as the stream: `gate * attention`, the first op after the value."""
        products = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        gated = [n for n in products if all(isinstance(a, fx.Node) and a.meta["val"].ndim == 3 for a in n.args)]
        gated[0].replace_all_uses_with(gated[0].args[1])
        graph.erase_node(gated[0])

    broken(monkeypatch, drop, reusing)
    assert is_seen(verified(), *((1, "replay") if reusing else (0, "reuse 0")))


@pytest.mark.parametrize("reusing", [True, False], ids=["in reuse", "in compute"])
def test_an_op_lost_in_dead_code_elimination(monkeypatch: pytest.MonkeyPatch, reusing: bool) -> None:
    """The sum of the stream in the reusing variant, the activation of an MLP in the computing one."""
    broken(monkeypatch, short_circuit(*((aten.add.Tensor, 0) if reusing else (aten.gelu.default, 0))), reusing)
    assert is_seen(verified(), *((1, "replay") if reusing else (0, "reuse 0")))


def test_a_wrong_live_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first MLP is computed from the stream before the attention, not after it."""
    guard = pipeline.insert_guards

    def guarded(*args: Any) -> GuardedGraph:
        result = guard(*args)
        attention, mlp = result.gm.graph.find_nodes(op="call_function", target=cache_or_compute)[:2]
        streams = [
            next(n for n in call.args[3] if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].ndim == 3)
            for call in (attention, mlp)
        ]
        mlp.args = (*mlp.args[:3], tuple(streams[0] if n is streams[1] else n for n in mlp.args[3]))
        result.gm.recompile()
        return result

    monkeypatch.setattr(pipeline, "insert_guards", guarded)
    assert is_seen(verified(), 0, "reuse 0")


def test_a_value_cached_with_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot stores the product with the gate: it is right when computed, stale when reused."""

    def swap(graph: fx.Graph) -> None:
        output = graph.output_node()
        values = list(output.args[0])
        (gated,) = [user for user in values[1].users if user.target is aten.mul.Tensor]
        output.args = ((values[0], gated, *values[2:]),)

    broken(monkeypatch, swap, reusing=False)
    found = verified()
    assert found.reuse0.exact
    assert is_seen(found, 0, "replay")


def test_a_stale_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that survive into the second run: under a rule that is always true, its first step reuses."""
    enter = Session.enter

    def entered(session: Session, *args: Any) -> ExplicitTrajectory:
        trajectory = enter(session, *args)
        trajectory.trajectory.streams = vars(session).setdefault("kept", Streams())
        return trajectory

    assert verified(ALWAYS).exact
    monkeypatch.setattr(Session, "enter", entered)
    found = verified(ALWAYS)
    assert found.reuse0.exact
    assert is_seen(found, 0, "replay: reused, and never computed in this trajectory")


@pytest.mark.parametrize("weights", ["compared", "not compared"])
def test_layers_that_collide_behind_a_break(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """Two blocks share slots. Only the weights in the stamp keep the output right: nothing is reused."""
    enter, fit = Call.enter, Cache.fit

    def first(call: Call, *args: Any) -> Any:
        call._occurrences.clear()
        return enter(call, *args)

    def unchecked(cache: Cache, stamp: Any, weights: Any, ambient: Any, unknown: Any) -> MissReason | None:
        return fit(cache, stamp, (), ambient)

    monkeypatch.setattr(Call, "enter", first)
    if weights == "not compared":
        monkeypatch.setattr(Cache, "fit", unchecked)
    case = broken_blocks(2)
    found = verify(case.build(), case.inputs(4), policy=FORA(3), backend="aot_eager")
    assert found.reuse0.exact
    if weights == "compared":
        assert found.exact
        assert found.reused == 0
    else:
        assert is_seen(found, 1, "replay")
        assert found.reused == 8


# --- verified inputs, and refused ones --------------------------------------------------------------------------------


def test_streams_are_verified_apart(capsys: pytest.CaptureFixture[str]) -> None:
    cond, other = tiny.calls(4), tiny.condition(9)
    inputs = [call for arguments in cond for call in (arguments, {**arguments, "condition": other})]
    names = ["cond", "uncond"] * 4
    found = verify(tiny.build(), inputs, policy=FORA(3), backend="aot_eager", streams=names)
    assert found.exact
    assert (found.calls, found.reused) == (8, 16)
    assert capsys.readouterr().out == (
        "ok: reuse 0 exact (4 sites forced, 4 values exported), replay exact "
        "(8 calls, 16 of 32 decisions reused), max abs error 0\n"
    )


def test_a_rewritten_model_is_verified_as_it_was() -> None:
    """The reference is the model without its rewrite, which stays, and is not called."""
    model = tiny.rewritten(tiny.build(), FORA(2))
    assert verify(model, tiny.calls(4), FORA(3), backend="aot_eager").exact
    assert not model.stats().decisions
    assert isinstance(model, RewrittenModule)


def test_a_policy_that_reaches_no_site_is_refused() -> None:
    for policy in (Never(), FORA(3, kinds=("cross",)), FORA(1), Policy((Rule(sympy.false),), "nothing")):
        with pytest.raises(UnreachedPolicy, match="none of the model's 4 sites.*Check its kinds and guards"):
            verified(policy)


def test_inputs_that_are_no_trajectory_are_refused() -> None:
    model, (call, _) = tiny.build(), tiny.calls(2)
    several: list[tuple[Any, str]] = [
        ([], "verify: inputs=0 .*a list with one mapping"),
        (call, "verify: inputs='dict' .*a list with one mapping of keyword arguments for each call"),
        ("call", "verify: inputs='str'"),
        (call["hidden_states"], "verify: inputs='Tensor'"),
        ([call, "call"], r"verify: inputs\[1\]='str' .*a mapping of keyword arguments"),
        ([{1: 2}], r"verify: inputs\[0\]='dict'"),
    ]
    for inputs, says in several:
        with pytest.raises(BadArgument, match=says) as caught:
            verify(model, inputs, policy=FORA(3), backend="aot_eager")
        assert len(str(caught.value)) < 200, "without the tensors"
    for streams in (["cond"], "co", [1, 2]):
        with pytest.raises(BadArgument, match="verify: streams=.*a list of 2 names"):
            verify(model, [call, call], policy=FORA(3), backend="aot_eager", streams=streams)  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match="verify: model='list'"):
        verify([call], model, policy=FORA(3))  # type: ignore[arg-type]
    with pytest.raises(NotAPolicy, match=r"Call it: `FORA\(interval=3\)`"):
        verify(model, [call], FORA)  # type: ignore[arg-type]


def test_a_policy_may_be_its_text() -> None:
    found = verify(tiny.build(), tiny.calls(4), "fora:interval=3", backend="aot_eager")
    assert found.exact and found.reused == 8


def test_what_the_dump_holds(tmp_path: Path) -> None:
    verify(tiny.build(), tiny.calls(2), policy=FORA(2), backend="aot_eager", dump=tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "graph0/00_captured.py",
        "graph0/01_find_sites.txt",
        "graph0/03_step_tables.txt",
        "graph0/05_insert_guards.diff",
        "graph0/05_insert_guards.py",
        "graph0/06_foresee.txt",
        "graph0/08_partition.txt",
        "graph0/09_variant0_all_reuse.py",
        "graph0/09_variant1_all_compute.py",
        "graph0/09_variant1_all_compute_unmark_attention.diff",
        "graph0/09_variant1_all_compute_unmark_attention.py",
    ]
    assert (tmp_path / "graph0/05_insert_guards.py").read_text().count("cache_or_compute(") == tiny.SITES
    assert (tmp_path / "graph0/06_foresee.txt").read_text().split("\n")[1].split() == ["1", "R" * tiny.SITES]


# --- comparing --------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("a", "b", "same", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, 0.0),
        ([1.0, NAN], [1.0, NAN], True, INF),
        ([1.0, 2.0], [1.0, 2.5], False, 0.5),
        ([1.0, NAN], [1.0, 2.0], False, INF),
        ([1.0, INF], [1.0, 2.0], False, INF),
        ([1.0], [1.0, 1.0], False, INF),
    ],
)
def test_equality_and_error(a: list[float], b: list[float], same: bool, error: float) -> None:
    x, y = torch.tensor(a), torch.tensor(b)
    assert equal(x, y) is same
    if not same or error == 0:
        assert max_abs_error(x, y) == error


def test_equality_is_of_dtypes_too() -> None:
    assert not equal(torch.ones(2), torch.ones(2).double())


def test_a_check_remembers_the_first_difference_and_the_largest_error() -> None:
    check = Check()
    x = torch.zeros(2)
    assert check.compare(x, x, Difference("a", 0, "test"))
    assert not check.compare(x, x + 1, Difference("b", 1, "test"))
    assert not check.compare(x, x + 3, Difference("c", 2, "test"))
    assert check.compare(x, x, Difference("d", 3, "test"))
    assert check == Check(False, False, 3.0, Difference("b", 1, "test"))
    assert (str(check), str(Check()), str(Check(exact=False))) == ("WRONG", "exact", "within rounding")


def test_rms_is_over_all_elements() -> None:
    x, y = [torch.zeros(3), [torch.zeros(1)]], [torch.zeros(3), [torch.full((1,), 4.0)]]
    assert rms(x, y) == 2.0
    assert rms([], []) == 0.0
