"""Changes in the middle of a run (shapes, conditioning, modes, threads, failures) never give a wrong output."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite import Policy, Rule
from dit_rewrite.errors import DecisionReason, MissReason, TrajectoryReason
from dit_rewrite.guards import num_steps, progress, step
from dit_rewrite.policies import FORA
from tests.helpers import tiny
from tests.helpers.tiny import calls, condition, fora, outputs, rewritten, row, same

MODES = pytest.mark.parametrize("mode", ["explicit", "inferred"])


def trajectory_of(model: Any, mode: str, of: int) -> Any:
    """The context manager of a run."""
    return model.trajectory(of) if mode == "explicit" else contextlib.nullcontext()


@MODES
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reuse", ["reuse 0", "FORA"])
def test_resolution_changed_midway(mode: str, dynamic: bool, reuse: str) -> None:
    """Three steps of 8 tokens, three of 12, then 8 again: each part computes its first step, like a separate run."""
    model = tiny.build()
    compiled = rewritten(model, FORA(1 if reuse == "reuse 0" else 10), dynamic=dynamic)
    given = condition(1)
    parts = [calls(3, 1, given), calls(3, 2, given, tokens=12), calls(3, 3, given)]
    for earlier, part in enumerate(parts):
        for arguments, like in zip(part, calls(9)[3 * earlier :], strict=False):
            arguments["timestep"] = like["timestep"]
    with trajectory_of(compiled, mode, 9):
        found = [outputs(compiled, part) for part in parts]
    for part, result in zip(parts, found, strict=True):
        assert same(result, fora(model, part, 1 if reuse == "reuse 0" else 10))
    stats = compiled.stats()
    if reuse == "FORA":
        assert row(compiled, 9) == "CRRCRRCRR"
        lost = MissReason.CHANGED_INPUT if dynamic else MissReason.CHANGED_GRAPH
        assert stats.misses == ({lost: 2 * tiny.SITES} if mode == "explicit" else {})
    if mode == "inferred":
        assert stats.trajectories == {TrajectoryReason.FIRST_CALL: 1, TrajectoryReason.NEW_LATENT: 2}
    assert stats.recompiles == (0 if dynamic else 1)


@MODES
def test_batch_size_changed_midway(mode: str) -> None:
    """The second sample is dropped: its conditioning is a new tensor, so the next calls are another stream or run."""
    model = tiny.build()
    compiled = rewritten(model, dynamic=True)
    inputs = calls(6)
    given = inputs[0]["condition"][:1]
    for arguments in inputs[3:]:
        arguments.update(hidden_states=arguments["hidden_states"][:1], timestep=arguments["timestep"][:1])
        arguments["condition"] = given
    with trajectory_of(compiled, mode, 6):
        found = outputs(compiled, inputs)
    assert same(found[:3], fora(model, inputs[:3]))
    assert torch.equal(found[3], fora(model, inputs[3:])[0])
    assert all(torch.isfinite(result).all() for result in found)
    assert [len(result) for result in found] == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("dynamic", [None, True], ids=["second run dynamic", "dynamic"])
def test_timesteps_that_are_views_of_the_schedule(dynamic: bool | None) -> None:
    """Where sizes are dynamic, Dynamo passes the place of each timestep in the schedule too, which differs at every
    step. No op reads it. Image to image begins in the middle of the schedule; here, the second run with one sample."""
    compiled = rewritten(tiny.build(), dynamic=dynamic)
    schedule = SimpleNamespace(timesteps=torch.linspace(900, 100, 9).to(torch.int64))
    for samples in (2, 1):
        given, latents = condition()[:samples], [call["hidden_states"][:samples] for call in calls(6)]
        with compiled.trajectory(scheduler=schedule):
            for time, latent in zip(schedule.timesteps[3:], latents, strict=True):
                arguments = {"hidden_states": latent, "timestep": time.expand(samples), "condition": given}
                outputs(compiled, [arguments])
        assert row(compiled, 6) == "CRRCRR"
    assert compiled.stats().misses == {}


@MODES
def test_other_dtype_midway(mode: str) -> None:
    """A latent in float64: another graph, a recorded miss, and the model's own output."""
    model = tiny.build()
    compiled = rewritten(model, FORA(10))
    inputs = calls(3)
    model.double()
    for name in ("hidden_states", "condition"):
        inputs[2][name] = inputs[2][name].double()
    with torch.no_grad():
        expected = model(**inputs[2])
    model.float()
    with trajectory_of(compiled, mode, 3):
        found = outputs(compiled, inputs[:2])
        model.double()
        last = outputs(compiled, inputs[2:])[0]
    model.float()
    assert same(found, fora(model, inputs[:2], 10))
    assert torch.equal(last, expected)
    assert row(compiled, 3) == "CRC"


@MODES
def test_other_device_midway(mode: str) -> None:
    """Meta tensors represent another device: no value of the first device is used, and nothing raises."""
    model = tiny.build()
    compiled = rewritten(model, FORA(10))
    inputs = calls(3)
    with trajectory_of(compiled, mode, 3):
        outputs(compiled, inputs[:2])
        compiled.to("meta")
        moved = {name: value.to("meta") for name, value in inputs[2].items()}
        unread = contextlib.nullcontext() if mode == "explicit" else pytest.raises(RuntimeError, match="meta")
        with unread, torch.no_grad():  # inferred: the timestep is read, and meta tensors hold none
            assert compiled(**moved).device.type == "meta"
    assert row(compiled, 3) == ("CRC" if mode == "explicit" else "CR")


def test_latent_updated_in_place() -> None:
    """Samplers that write into one latent; in an inferred trajectory the latent is compared with a copy."""
    model = tiny.build()
    compiled = rewritten(model)
    inputs, latent = calls(7), torch.empty(2, 8, tiny.CHANNELS)
    found = []
    for _ in range(2):
        for arguments in inputs:
            latent.copy_(arguments["hidden_states"])
            found += outputs(compiled, [{**arguments, "hidden_states": latent}])
    assert same(found, 2 * fora(model, inputs))
    assert row(compiled, 14) == "CRRCRRCCRRCRRC"


@MODES
def test_conditioning_changed_in_place(mode: str) -> None:
    """The same object with other content is another stream (explicit) or another trajectory (inferred)."""
    model = tiny.build()
    compiled = rewritten(model)
    inputs, given = calls(4), condition(1)
    with trajectory_of(compiled, mode, 4):
        found = outputs(compiled, [{**arguments, "condition": given} for arguments in inputs[:2]])
        given.neg_()
        found += outputs(compiled, [{**arguments, "condition": given} for arguments in inputs[2:]])
    assert row(compiled, 4)[2] == "C"
    with torch.no_grad():
        assert torch.equal(found[2], model(**{**inputs[2], "condition": given}))
    if mode == "inferred":
        assert compiled.stats().trajectories == {TrajectoryReason.FIRST_CALL: 1, TrajectoryReason.NEW_CONDITIONING: 1}


@MODES
def test_conditioning_made_anew_at_each_call(mode: str) -> None:
    """Streams are matched by value."""
    model = tiny.build()
    compiled = rewritten(model)
    cond, other = calls(7), condition(9)
    both = []
    for arguments in cond:
        both += [{**arguments, "condition": arguments["condition"].clone()}, {**arguments, "condition": other.clone()}]
    with trajectory_of(compiled, mode, 7):
        found = outputs(compiled, both)
    assert same(found[::2], fora(model, cond))
    assert same(found[1::2], fora(model, both[1::2]))
    assert row(compiled, 14) == "CCRRRRCCRRRRCC"


@MODES
def test_conditioning_of_another_dtype_is_another_stream(mode: str) -> None:
    """Equal in value, as a mask in bool and then in float: no value is reused across them, and nothing raises."""
    compiled = rewritten(tiny.build())
    inputs = calls(2, given=torch.ones(2, tiny.WIDTH))
    inputs[1]["condition"] = torch.ones(2, tiny.WIDTH, dtype=torch.int64)
    with trajectory_of(compiled, mode, 2):
        outputs(compiled, inputs)
    assert row(compiled, 2) == "CC"


def test_failure_in_the_middle_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of a graph fails after it stored some values: they are not used, and the next call works."""
    model = tiny.build()
    compiled = rewritten(model, FORA(10))
    inputs = calls(5)
    with compiled.trajectory(5):
        found = outputs(compiled, inputs[:2])
        with monkeypatch.context() as patch:
            patch.setattr(compiled._backend.stats, "count", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                outputs(compiled, inputs[2:3])
        found += outputs(compiled, inputs[3:])
    assert same(found[:2], fora(model, inputs[:2], 10))
    assert same(found[2:], fora(model, inputs[3:], 10))
    assert row(compiled, 4) == "CRCR"
    assert compiled.stats().calls == 4


def test_threads_have_trajectories_of_their_own() -> None:
    """A call from another thread, inside an explicit trajectory, starts an inferred one at its first step."""
    model = tiny.build()
    compiled = rewritten(model)
    mine, theirs = calls(7, seed=1), calls(7, seed=2)
    other: list[Tensor] = []
    with compiled.trajectory(7):
        found = outputs(compiled, mine[:2])
        thread = threading.Thread(target=lambda: other.extend(outputs(compiled, theirs)))
        thread.start()
        thread.join()
        found += outputs(compiled, mine[2:])
    assert same(found, fora(model, mine))
    assert same(other, fora(model, theirs))


def test_threads_that_compile_at_once() -> None:
    """Both threads make the first call at once: each gets its own values, and reuses at every step that may."""
    model = tiny.build()
    compiled = rewritten(model)
    inputs = [calls(7, seed=seed) for seed in (1, 2)]
    found: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def run(i: int) -> None:
        start.wait()
        with compiled.trajectory(7):
            found[i] = outputs(compiled, inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert same(found[i], fora(model, inputs[i]))
    stats = compiled.stats()
    assert (stats.calls, stats.computed, stats.reused) == (14, 6 * tiny.SITES, 8 * tiny.SITES)
    assert not stats.misses


def test_number_of_steps_is_read_late_from_a_scheduler() -> None:
    """Pipelines set the timesteps after the trajectory began."""
    model, inputs = tiny.build(), calls(5)
    compiled = rewritten(model, Policy((Rule(step >= num_steps - 2),)))
    scheduler = SimpleNamespace(timesteps=torch.arange(1000))
    with compiled.trajectory(scheduler=scheduler):
        scheduler.timesteps = torch.arange(5)
        outputs(compiled, inputs)
    assert row(compiled, 5) == "CCCRR"


def test_calls_beyond_the_end_compute() -> None:
    model, inputs = tiny.build(), calls(5)
    compiled = rewritten(model, FORA(10))
    with compiled.trajectory(3):
        found = outputs(compiled, inputs)
    assert row(compiled, 5) == "CRRCC"
    assert same(found[3:], outputs(model, inputs[3:]))
    assert compiled.stats().misses == {MissReason.BEYOND_END: 2 * tiny.SITES}
    assert set(compiled.stats().decisions[-1].reasons.values()) == {MissReason.BEYOND_END}


@pytest.mark.parametrize("guard", [step < num_steps, progress >= 0], ids=str)
def test_guards_on_totals_are_false_while_watched(guard: Any) -> None:
    compiled = rewritten(tiny.build(), Policy((Rule(guard),)))
    outputs(compiled, calls(3))
    assert row(compiled, 3) == "CCC"
    assert {r for d in compiled.stats().decisions for r in d.reasons.values()} == {DecisionReason.TOTAL_UNKNOWN}
    with compiled.trajectory(3):
        outputs(compiled, calls(3))
    assert row(compiled, 3) == "CRR"


@pytest.mark.parametrize("name", ["hidden_states", "timestep"])
def test_nan_never_reuses_while_watched(name: str) -> None:
    model = tiny.build()
    compiled = rewritten(model, FORA(10))
    inputs = [{**arguments, "timestep": arguments["timestep"].float()} for arguments in calls(6)]
    inputs[3][name] = torch.full_like(inputs[3][name], torch.nan)
    found = outputs(compiled, inputs)
    assert row(compiled, 6) == "CRRCCR"
    expected = outputs(model, inputs)
    assert torch.equal(found[4], expected[4])
    assert torch.equal(found[3].isnan(), expected[3].isnan())


@MODES
def test_inference_mode_and_no_grad_mixed(mode: str) -> None:
    """Each mode has its own graph, so a call after one in another mode computes; a miss where a rule applied."""
    model, inputs = tiny.build(), calls(7)
    compiled = rewritten(model)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    expected = outputs(model, inputs)
    for _ in range(2):
        found = []
        with trajectory_of(compiled, mode, 7):
            for i, arguments in enumerate(inputs):
                with modes[i % 3]():
                    found.append(compiled(**arguments).clone())
        with torch.no_grad():
            assert same(found, expected)
    assert compiled.stats().misses == {MissReason.CHANGED_GRAPH: 2 * 4 * tiny.SITES}
    assert compiled.stats().recompiles == 2


@MODES
def test_inference_mode_throughout(mode: str) -> None:
    model, inputs = tiny.build(), calls(7)
    compiled = rewritten(model)
    with torch.inference_mode(), trajectory_of(compiled, mode, 7):
        found = [compiled(**arguments).clone() for arguments in inputs]
    assert same(found, fora(model, inputs))
    assert row(compiled, 7) == "CRRCRRC"
