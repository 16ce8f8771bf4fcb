"""Steps, streams and trajectories over whole runs: which steps compute, and that no run reads another's values.

Every expected output is FORA by module hooks, restarted with each trajectory, or the untouched model's.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite
from dit_rewrite.errors import StreamReason, TrajectoryReason
from dit_rewrite.policies import FORA
from tests.helpers import tiny
from tests.helpers.tiny import calls, condition, fora, outputs, rewritten, row, same

MODES = pytest.mark.parametrize("mode", ["explicit", "inferred"])


def run(model: dit_rewrite.RewrittenModule, inputs: list[dict[str, Any]], mode: str, of: int = 0) -> list[Tensor]:
    """One trajectory; `of` is the declared number of steps, where the run is cut short."""
    with model.trajectory(of or len(inputs)) if mode == "explicit" else contextlib.nullcontext():
        return outputs(model, inputs)


def at(time: float) -> Tensor:
    """A timestep, spread over the batch as in the trajectories."""
    return torch.tensor(int(time)).expand(2)


def interleave(*streams: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls of several streams, step by step."""
    return list(itertools.chain.from_iterable(zip(*streams, strict=True)))


@MODES
def test_two_trajectories_without_recompile_or_break(mode: str) -> None:
    model = tiny.build()
    compiled = rewritten(model)
    first, second = calls(7, seed=1), calls(7, seed=2)
    torch._dynamo.utils.counters.clear()
    assert same(run(compiled, first, mode), fora(model, first))
    assert row(compiled, 7) == "CRRCRRC"
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert same(run(compiled, second, mode), fora(model, second))
    assert row(compiled, 7) == "CRRCRRC"
    assert not torch._dynamo.utils.counters["graph_break"]
    stats = compiled.stats()
    assert (stats.calls, stats.computed, stats.reused) == (14, 6 * tiny.SITES, 8 * tiny.SITES)
    assert (stats.recompiles, stats.graph_breaks, stats.variants, stats.late_variants) == (0, 0, 2, 0)
    assert [(d.step, d.stream, d.occurrence) for d in stats.decisions] == [(i % 7, 0, 0) for i in range(14)]
    assert len({d.trajectory for d in stats.decisions}) == 2
    assert not stats.misses


@MODES
@pytest.mark.parametrize("cut", [7, 3, 1])
@pytest.mark.parametrize("prompt", ["same prompt", "another prompt"])
def test_a_b_a_gives_a_twice(mode: str, cut: int, prompt: str) -> None:
    model = tiny.build()
    compiled = rewritten(model)
    a = calls(7, seed=1)
    b = calls(7, seed=2, given=a[0]["condition"] if prompt == "same prompt" else None)
    expected = fora(model, a)
    assert same(run(compiled, a[:cut], mode, of=7), expected[:cut])
    assert same(run(compiled, b, mode), fora(model, b))
    assert same(run(compiled, a, mode), expected)
    assert row(compiled, 7) == "CRRCRRC"


@MODES
@pytest.mark.parametrize("cut", [7, 3, 1])
def test_b_starts_at_a_lower_timestep_with_the_same_prompt(mode: str, cut: int) -> None:
    """Image to image: the last four of seven steps, from other noise."""
    model = tiny.build()
    compiled = rewritten(model)
    a = calls(7, seed=1)
    b = calls(7, seed=2, given=a[0]["condition"])[3:]
    run(compiled, a[:cut], mode, of=7)
    assert same(run(compiled, b, mode), fora(model, b))
    assert same(run(compiled, a, mode), fora(model, a))


@MODES
@pytest.mark.parametrize("moved", [0, -40, 40])
def test_the_same_noise_again_starts_anew(mode: str, moved: int) -> None:
    """The same seed and prompt, a first run cut after one step, and a schedule that starts at another timestep."""
    model = tiny.build()
    compiled = rewritten(model)
    a = calls(4, seed=1)
    b = [{**arguments, "timestep": at(arguments["timestep"][0] + moved)} for arguments in a]
    run(compiled, a[:1], mode, of=4)
    found = run(compiled, b, mode)
    if mode == "inferred" and not moved:  # the pair may be two calls of one step: the next step computes, to find out
        assert row(compiled, 4) == "CCRC"
        assert same(found[:1] + found[1:3], fora(model, b[:1]) + fora(model, b[1:3]))
        assert compiled.stats().streams == {StreamReason.AMBIGUOUS_STREAM: 1}
    else:
        assert same(found, fora(model, b))
    if mode == "inferred":
        assert compiled.stats().trajectories == {TrajectoryReason.FIRST_CALL: 1, TrajectoryReason.REPEATED: 1}


@MODES
def test_rising_timesteps(mode: str) -> None:
    model = tiny.build()
    compiled = rewritten(model)
    falling = calls(7)
    times = [arguments["timestep"] for arguments in reversed(falling)]
    rising = [{**arguments, "timestep": time} for arguments, time in zip(falling, times, strict=True)]
    for _ in range(2):
        assert same(run(compiled, rising, mode), fora(model, rising))
        assert row(compiled, 7) == "CRRCRRC"


def test_a_timestep_that_turns_starts_anew() -> None:
    model = tiny.build()
    compiled = rewritten(model)
    a = calls(8)
    a[5]["timestep"] = at(a[4]["timestep"][0] + 1)
    outputs(compiled, a)
    assert row(compiled, 8) == "CRRCRCRR"
    assert compiled.stats().trajectories == {TrajectoryReason.FIRST_CALL: 1, TrajectoryReason.TIMESTEP_TURNED: 1}


@MODES
def test_heun_calls_twice_at_a_timestep(mode: str) -> None:
    """999, 666, 666, 333, 333, …: a step is one timestep, with one or two calls."""
    compiled = rewritten(tiny.build())
    heun = calls(7)
    for arguments, time in zip(heun, (999, 666, 666, 333, 333, 100, 100), strict=True):
        arguments["timestep"] = at(time)
    run(compiled, heun, mode)
    assert [decision.step for decision in compiled.stats().decisions] == [0, 1, 1, 2, 2, 3, 3]
    assert row(compiled, 7) == "CRRRRCC"


@MODES
@pytest.mark.parametrize("order", ["cond first", "uncond first"])
def test_guidance_switched_off_midway(mode: str, order: str) -> None:
    """Seven steps, with both streams up to the fourth; each stream equals its own separate run."""
    model = tiny.build()
    compiled = rewritten(model)
    cond, given = calls(7, seed=1), condition(9)
    uncond = [{**arguments, "condition": given} for arguments in cond[:4]]
    for _ in range(2):
        both = interleave(cond[:4], uncond) if order == "cond first" else interleave(uncond, cond[:4])
        found = run(compiled, both + cond[4:], mode, of=7)
        position = 0 if order == "cond first" else 1
        assert same(found[position:8:2] + found[8:], fora(model, cond))
        assert same(found[1 - position : 8 : 2], fora(model, uncond))
        steps = [decision.step for decision in compiled.stats().decisions[-11:]]
        assert steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6]


def test_guidance_that_pauses_keeps_its_steps_when_watched() -> None:
    """The unconditional stream, called first in its step, returns after a step without it."""
    compiled = rewritten(tiny.build())
    cond, given = calls(4, seed=1), condition(9)
    uncond = [{**arguments, "condition": given} for arguments in cond]
    outputs(compiled, [uncond[0], cond[0], uncond[1], cond[1], cond[2], uncond[3], cond[3]])
    assert [decision.step for decision in compiled.stats().decisions] == [0, 0, 1, 1, 2, 3, 3]
    assert compiled.stats().trajectories == {TrajectoryReason.FIRST_CALL: 1}


@MODES
def test_streams_by_identity(mode: str) -> None:
    model = tiny.build()
    compiled = rewritten(model)
    cond, given = calls(7, seed=1), condition(9)
    uncond = [{**arguments, "condition": given} for arguments in cond]
    found = run(compiled, interleave(cond, uncond), mode, of=7)
    assert same(found[::2], fora(model, cond))
    assert same(found[1::2], fora(model, uncond))
    assert {decision.stream for decision in compiled.stats().decisions} == {0, 1}
    assert row(compiled, 14) == "CCRRRRCCRRRRCC"


@MODES
def test_streams_by_name(mode: str) -> None:
    """Both streams pass the same objects, as when a pipeline swaps an adapter in between; only names tell them
    apart."""
    model = tiny.build()
    compiled = rewritten(model)
    cond, uncond = calls(7, seed=1), calls(7, seed=2, given=condition(1))
    cond = [{**arguments, "condition": uncond[0]["condition"]} for arguments in cond]
    if mode == "inferred":  # then there must be one latent
        uncond = [{**theirs, "hidden_states": ours["hidden_states"]} for ours, theirs in zip(cond, uncond, strict=True)]
    found: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    with compiled.trajectory(7) if mode == "explicit" else contextlib.nullcontext():
        for pair in zip(cond, uncond, strict=True):
            for name, arguments in zip(found, pair, strict=True):
                with compiled.cache_context(name):
                    found[name] += outputs(compiled, [arguments])
    assert same(found["cond"], fora(model, cond))
    assert same(found["uncond"], fora(model, uncond))
    assert [decision.stream for decision in compiled.stats().decisions] == ["cond", "uncond"] * 7


@MODES
def test_two_models_of_one_class_interleaved(mode: str) -> None:
    models = [tiny.build(), tiny.build()]
    for parameter in models[1].parameters():
        parameter.neg_()
    compiled = [rewritten(model) for model in models]
    inputs = [calls(7, seed=1), calls(7, seed=2)]
    found: list[list[Tensor]] = [[], []]
    with contextlib.ExitStack() as stack:
        for one in compiled if mode == "explicit" else ():
            stack.enter_context(one.trajectory(7))
        for step, i in itertools.product(range(7), range(2)):
            found[i] += outputs(compiled[i], [inputs[i][step]])
    for i in range(2):
        assert same(found[i], fora(models[i], inputs[i]))
        assert (compiled[i].stats().calls, compiled[i].stats().recompiles) == (7, 0)


def test_two_compilations_of_one_model_share_nothing() -> None:
    model, inputs = tiny.build(), calls(7)
    often, seldom = rewritten(model, FORA(2)), rewritten(model, FORA(3))
    found: dict[int, list[Tensor]] = {2: [], 3: []}
    for arguments in inputs:
        found[2] += outputs(often, [arguments])
        found[3] += outputs(seldom, [arguments])
    assert same(found[2], fora(model, inputs, 2))
    assert same(found[3], fora(model, inputs, 3))


def test_twelve_models_of_one_class_all_stay_compiled() -> None:
    """Dynamo's limit of 8 compilations of one code object would silently run the rest in eager mode."""
    for seed in range(12):
        model, inputs = tiny.build(1), calls(3, seed)
        compiled = rewritten(model)
        assert same(outputs(compiled, inputs), fora(model, inputs))
        assert compiled.stats().reused == 2 * 2


@MODES
def test_reset_forgets(mode: str) -> None:
    """The next call is the first one of a new trajectory, and the old values are freed."""
    compiled = rewritten(tiny.build())
    inputs = calls(5)
    with compiled.trajectory(5) if mode == "explicit" else contextlib.nullcontext():
        outputs(compiled, inputs[:2])
        assert compiled.stats().cache_bytes == tiny.SITES * 2 * 8 * tiny.WIDTH * 4
        cache = weakref.ref(next(iter(_streams(compiled)[0].caches.values())))
        compiled.reset()
        assert cache() is None
        assert compiled.stats().cache_bytes == 0
        outputs(compiled, inputs[2:])
    assert row(compiled, 5) == "CRCRR"
    assert [decision.step for decision in compiled.stats().decisions] == [0, 1, 0, 1, 2]


def test_the_end_of_a_told_trajectory_frees_its_values() -> None:
    compiled = rewritten(tiny.build())
    with compiled.trajectory(3):
        outputs(compiled, calls(2))
        cache = weakref.ref(next(iter(_streams(compiled)[0].caches.values())))
    assert cache() is None
    assert compiled.stats().cache_bytes == 0


def _streams(compiled: dit_rewrite.RewrittenModule) -> list[Any]:
    session = compiled._backend.session
    tracker = session.inferred if session.explicit is None else session.explicit
    return list(tracker.trajectory.streams.all)


@pytest.mark.parametrize(
    ("mode", "conditioning", "tables", "expected"),
    [
        ("explicit", "kept", False, 1),
        ("explicit", "kept", True, 2),
        ("named", "kept", False, 1),
        ("named", "new", False, 5),
        ("explicit", "new", False, 5),
        ("inferred", "kept", False, 5),
    ],
)
def test_reads_of_the_device(
    monkeypatch: pytest.MonkeyPatch, mode: str, conditioning: str, tables: bool, expected: int
) -> None:
    """Explicit: the schedule is read once, and conditioning that is created anew is compared. Inferred: each call reads
    once. A step table compares the content of its weights once in a trajectory."""
    reads: list[str] = []

    def counted(owner: Any, name: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (reads.append(name), method(*args))[1])

    compiled = rewritten(tiny.build(), disable_passes=() if tables else ("step_tables",))
    schedule = torch.linspace(999, 0, 5)
    kept = condition()
    with compiled.trajectory(scheduler=SimpleNamespace(timesteps=schedule)):  # captures, and fills the step table
        for arguments, time in zip(calls(5, given=kept), schedule, strict=True):
            outputs(compiled, [{**arguments, "timestep": time.expand(2)}])
    for name in ("item", "tolist", "equal", "__bool__", "__float__", "__int__"):
        counted(torch.Tensor, name)
    counted(torch, "equal")
    with contextlib.ExitStack() as stack:
        if mode != "inferred":
            stack.enter_context(compiled.trajectory(scheduler=SimpleNamespace(timesteps=schedule)))
        if mode == "named":
            stack.enter_context(compiled.cache_context("cond"))
        for arguments, time in zip(calls(5, seed=1, given=kept), schedule, strict=True):
            given = arguments["condition"].clone() if conditioning == "new" else arguments["condition"]
            outputs(compiled, [{**arguments, "timestep": time.expand(2), "condition": given}])
    assert len(reads) == expected, reads
    assert row(compiled, 5) == "CRRCR"
