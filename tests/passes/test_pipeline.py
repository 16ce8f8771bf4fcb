"""The pipeline: passes run in order, results are found by class, and errors name the pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import fx

from dit_rewrite.errors import BadArgument, DitRewriteError, PassFailed
from dit_rewrite.passes.pipeline import Context, Pass, PassRun, check_disabled, run_passes


@dataclass(frozen=True)
class Count:
    """The number of nodes that an analysis counted."""

    nodes: int
    refused: tuple[str, ...] = ("a", "b")


class Refused(DitRewriteError):
    template = "No such place."


def graph(calls: int = 2) -> fx.GraphModule:
    made = fx.Graph()
    node = made.placeholder("x")
    for _ in range(calls):
        node = made.call_function(torch.relu, (node,))
    made.output(node)
    return fx.GraphModule({}, made)


def count(gm: fx.GraphModule, ctx: Context) -> Count:
    return Count(len(gm.graph.nodes))


def shorten(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    return graph(ctx[Count].nodes - 3)


def fail(gm: fx.GraphModule, ctx: Context) -> Count:
    raise KeyError("missing")


def refuse(gm: fx.GraphModule, ctx: Context) -> Count:
    raise Refused


def run(
    *passes: Pass, disabled: tuple[str, ...] = ()
) -> tuple[fx.GraphModule, Context, list[PassRun], list[tuple[int, str, int]]]:
    ctx, runs, seen = Context(), list[PassRun](), list[tuple[int, str, int]]()

    def watch(number: int, name: str, gm: fx.GraphModule, result: object) -> None:
        seen.append((number, name, len(gm.graph.nodes)))

    try:
        gm = run_passes(passes, graph(), ctx, runs, disabled, watch)
    except DitRewriteError as error:
        error.args = (*error.args, seen)
        raise
    return gm, ctx, runs, seen


def test_an_analysis_leaves_its_result_and_a_transform_its_graph() -> None:
    gm, ctx, runs, seen = run(Pass("count", count), Pass("shorten", shorten), Pass("again", count))
    assert len(gm.graph.nodes) == 3
    assert ctx[Count] == Count(3), "the last result of a class counts"
    assert [(r.name, r.nodes_before, r.nodes_after, r.refused) for r in runs] == [
        ("count", 4, 4, 2),
        ("shorten", 4, 3, 0),
        ("again", 3, 3, 2),
    ]
    assert seen == [(1, "count", 4), (2, "shorten", 3), (3, "again", 3)]
    assert all(r.seconds >= 0 for r in runs)


def test_a_disabled_pass_does_not_run_and_the_others_keep_their_numbers() -> None:
    _, _, runs, seen = run(Pass("count", count), Pass("shorten", shorten), Pass("again", count), disabled=("shorten",))
    assert [r.name for r in runs] == ["count", "again"]
    assert [number for number, _, _ in seen] == [1, 3]


def test_a_failing_pass_is_named_and_those_before_it_were_shown() -> None:
    with pytest.raises(
        PassFailed, match=r"The pass fail failed \(KeyError: 'missing'\)\. Write the graphs .*compile\(dump="
    ) as caught:
        run(Pass("count", count), Pass("fail", fail), Pass("again", count))
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.args[-1] == [(1, "count", 4)]


def test_an_error_for_users_stays_itself_and_names_its_pass() -> None:
    with pytest.raises(Refused) as caught:
        run_passes([Pass("refuse", refuse)], graph(), Context(), [])
    assert caught.value.during == "refuse"
    assert str(caught.value) == "No such place. (in the pass refuse)"


def test_a_result_that_no_pass_made() -> None:
    assert Context().get(Count) is None
    with pytest.raises(PassFailed, match="no pass before this one made a Count"):
        run(Pass("shorten", shorten))


@pytest.mark.parametrize("names", [("count",), ("nothing",), "count"])
def test_which_passes_can_be_disabled(names: tuple[str, ...] | str) -> None:
    passes = [Pass("count", count), Pass("shorten", shorten, optional=True), Pass("again", count, optional=True)]
    with pytest.raises(BadArgument, match=r"disable_passes=.* is out of range.*again, shorten"):
        check_disabled(names, passes)
    assert check_disabled("shorten", passes) == {"shorten"}
    assert check_disabled(["again", "shorten"], passes) == {"again", "shorten"}
