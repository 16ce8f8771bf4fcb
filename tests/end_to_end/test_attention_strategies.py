"""Strategies inside attention on named models, against a naive reference of DiTFastAttn; nothing stale is read."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from dit_rewrite import BlockwiseReuse, Policy, Rule, Where, WindowResidual
from dit_rewrite.guards import step
from dit_rewrite.policy.strategies import Strategy
from tests.helpers import tiny
from tests.helpers.attention import QUARTER, TOLERANCE, Small, apart, ops_of, plain, run, scheduled, small_calls
from tests.helpers.broken import broken_blocks
from tests.helpers.models import MODELS
from tests.references.ditfastattn import Paper, band, square

slow = pytest.mark.slow
EVERYTHING = "FWSWXAFX"  # the second W reads the R of S, the last X that of the F before it
GRID = WindowResidual(1, grid=(4, 4))


@pytest.mark.parametrize(
    ("name", "lowering", "window", "seen", "half"),
    [
        pytest.param("dit", "variants", QUARTER, band(4), 0, id="dit-variants"),
        pytest.param("pixart_alpha", "segments", GRID, square(4, 1), 1, id="pixart-segments"),
        pytest.param("dit", "segments", GRID, square(4, 1), 1, id="dit-segments", marks=slow),
        pytest.param("pixart_alpha", "variants", QUARTER, band(4), 0, id="pixart-variants", marks=slow),
        pytest.param("omnigen", "variants", QUARTER, band(5), 1, id="omnigen-mask", marks=slow),
    ],
)
def test_ditfastattn(name: str, lowering: str, window: WindowResidual, seen: Any, half: int) -> None:
    """All strategies in turn on self-attention: equal to the paper's at every step, within fp32 rounding."""
    case = MODELS[name]
    model, inputs = case.build(), case.inputs(len(EVERYTHING))
    expected = Paper(EVERYTHING, seen, half).run(model, inputs)
    found = run(model, inputs, scheduled(EVERYTHING, window, half, ("self",)), lowering)
    assert max(apart(found, expected)) < TOLERANCE
    changed = [error > 0.05 for error in apart(plain(model, inputs), expected)]
    assert changed == [letter != "F" for letter in EVERYTHING]


def test_the_reference_tells_strategies_apart() -> None:
    """Another half, window or schedule, or a residual that ASC does not refresh, differs by far more than the
    tolerance."""
    model, inputs = MODELS["dit"].build(), MODELS["dit"].inputs(8)
    expected = Paper(EVERYTHING, band(4)).run(model, inputs)
    others = [
        Paper(EVERYTHING, band(4), half=1),
        Paper(EVERYTHING, band(5)),
        Paper(EVERYTHING, square(4, 1)),
        Paper(EVERYTHING, band(4), refresh=False),
        Paper(EVERYTHING.replace("W", "X"), band(4)),
        Paper(EVERYTHING.replace("S", "F"), band(4)),
        Paper(EVERYTHING.replace("W", "F"), band(4)),
    ]
    for other in others:
        assert max(apart(other.run(model, inputs), expected)) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "kinds", "seen"),
    [
        pytest.param("flux", ("joint",), band(4, first=6), id="flux-double", marks=slow),
        pytest.param(
            "sd3",
            ("joint",),
            band(4, last=6),
            id="sd3",
        ),
        pytest.param(
            "flux",
            ("joint", "parallel"),
            band(4, first=6),
            id="flux-single",
            marks=slow,
        ),
        pytest.param(
            "cogvideox",
            ("joint",),
            band(8, first=6),
            id="cogvideox",
            marks=slow,
        ),
    ],
)
def test_text_in_joint_attention(name: str, kinds: tuple[str, ...], seen: Any) -> None:
    """Text tokens, before or behind the image's, attend to all tokens and all attend to them; the window is of the
    image."""
    schedule = "FWWFW"
    case = MODELS[name]
    model, inputs = case.build(), case.inputs(len(schedule))
    reference = Paper(schedule, seen, cores=2 if kinds == ("joint",) and name == "flux" else None)
    expected = reference.run(model, inputs)
    found = run(model, inputs, scheduled(schedule, QUARTER, 0, kinds), "variants")
    assert max(apart(found, expected)) < TOLERANCE


def test_the_residual_is_made_where_a_later_step_reads_it() -> None:
    """Two attentions: R = O - W costs one window each. It is not made before a step that computes, nor at the last
    step."""
    schedule = "FFWSXAFAWF"
    found = ops_of(tiny.build(), tiny.calls(10), scheduled(schedule, QUARTER, 0))
    whole, half = {("window_reuse", 2): 2}, {("window_reuse", 1): 2}
    assert found == [{}, whole, whole, half, half, {}, whole, {}, whole, {}]


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "inferred"])
@pytest.mark.parametrize("do", [WindowResidual(0.25), BlockwiseReuse(3.0, 4)], ids=["window", "blockwise"])
def test_nothing_of_one_trajectory_reaches_another(do: Strategy, explicit: bool) -> None:
    """Trajectories A, B cut short, A: both runs of A are equal bit for bit, though a state changes in place; B
    differs."""
    model, policy = Small(), Policy((Rule(step > 0, do),))
    compiled = tiny.rewritten(model, policy)

    def trajectory(seed: int, steps: int) -> list[Tensor]:
        inputs = small_calls(steps, seed=seed)
        if not explicit:
            return tiny.outputs(compiled, inputs)
        with compiled.trajectory(5):
            return tiny.outputs(compiled, inputs)

    first, other, second = trajectory(0, 5), trajectory(1, 3), trajectory(0, 5)
    assert tiny.same(first, second)
    assert tiny.same(other, tiny.outputs(tiny.rewritten(model, policy), small_calls(3, seed=1)))
    assert min(apart(first[:3], other)) > 0.1
    assert max(apart(first, plain(model, small_calls(5)))[1:]) > 10 * TOLERANCE


def test_a_step_that_is_left_out() -> None:
    """The caller gives steps 0, 1, 2 and 4. Step 2 stored nothing for step 4, because step 3 was to compute: 4
    computes."""
    model, inputs = Small(), small_calls(5)
    compiled = tiny.rewritten(model, scheduled("FWFFW", QUARTER, 0))
    found, steps = [], (0, 1, 2, 4)
    with compiled.trajectory(5):
        for i in steps:
            with compiled.cache_context("main", step_index=i):
                found += tiny.outputs(compiled, [inputs[i]])
    expected = Paper("FWFF", band(2)).run(model, [inputs[i] for i in steps])
    assert max(apart(found, expected)) < TOLERANCE


def test_layers_that_become_known_with_the_first_call() -> None:
    """Behind graph breaks a value that a later step may read is stored, though the guard is known only after the
    call."""
    case = broken_blocks(2)
    compiled = tiny.rewritten(case.build(), Policy((Rule(step > 0, QUARTER, Where(fraction=(0, 0.5))),)))
    with compiled.trajectory(3):
        tiny.outputs(compiled, case.inputs(3))
    assert compiled.stats().misses == {}
    assert compiled.stats().reused >= 2
