"""Explicit and inferred trajectories on hand-written call sequences: step, stream, and why a trajectory began."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit_rewrite.errors import BadTrajectory, StreamReason, TrajectoryReason
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.trajectory import Clock, ExplicitTrajectory, InferredTrajectory, Named, Trajectory

NOBODY = Named()
C, U = torch.zeros(3), torch.ones(3)


def latent(turn: float) -> Tensor:
    """Return a point on the unit circle, so that close values of `turn` give close latents."""
    return torch.tensor([math.cos(turn), math.sin(turn)])


def inputs(turn: float, time: Any, *conditioning: Tensor) -> Inputs:
    timestep = torch.tensor(time) if isinstance(time, float) else time
    return Inputs(latent(turn), timestep, conditioning or (C,))


class Seen:
    """Places calls one by one."""

    def __init__(self, place: Any) -> None:
        self.place, self.last = place, None
        self.first: Trajectory | None = None

    def __call__(self, given: Inputs, named: Named = NOBODY) -> tuple[Any, ...]:
        """Return step and stream, preceded by the reason if the call begins a trajectory."""
        place = self.place(given, named)
        trajectory, stream = place.trajectory, place.stream
        begun = () if trajectory is self.last else (trajectory.why,)
        self.last = trajectory
        return (*begun, trajectory.step, stream.name)


# --- explicit trajectories --------------------------------------------------------------------------------------------


def explicit(num_steps: int | None = None, scheduler: Any = None) -> Seen:
    return Seen(ExplicitTrajectory(Clock(num_steps, scheduler)).place)


def test_a_step_is_a_timestep() -> None:
    see = explicit(9)
    assert see(inputs(0, 9.0, C)) == (None, 0, 0)
    assert see(inputs(0, 9.0, U)) == (0, 1)
    assert see(inputs(0.1, 8.0, C)) == (1, 0)
    assert see(inputs(0.1, 8.0, U)) == (1, 1)
    assert see(inputs(0.2, 7.0, C)) == (2, 0)
    assert see(inputs(0.3, 6.0, C)) == (3, 0)
    assert see(inputs(0.4, 6.0, C)) == (3, 0), "the second evaluation of a second-order solver"


def test_steps_are_counted_where_no_timestep_is_known() -> None:
    see = explicit(9)
    assert see(Inputs(latent(0.0), None, (C,))) == (None, 0, 0)
    assert see(Inputs(latent(0.0), None, (U,))) == (0, 1)
    assert see(Inputs(latent(0.1), None, (C,))) == (1, 0)
    assert see(Inputs(latent(0.1), None, (U,))) == (1, 1)


def test_a_timestep_that_goes_back_begins_another_trajectory() -> None:
    see = explicit(9)
    see(inputs(0, 9.0))
    see(inputs(0.1, 8.0))
    assert see(inputs(0, 9.0)) == (TrajectoryReason.TIMESTEP_TURNED, 0, 0)
    assert see(inputs(0.1, 8.0)) == (1, 0)


def test_steps_by_index() -> None:
    see = explicit(9)
    assert see(inputs(0, 9.0), Named("cond", step_index=0)) == (None, 0, "cond")
    assert see(inputs(0, 9.0), Named("cond", step_index=4)) == (4, "cond")
    assert see(inputs(0, 9.0), Named("uncond", step_index=4)) == (4, "uncond")
    assert see(inputs(0, 9.0), Named("cond", step_index=2)) == (TrajectoryReason.TIMESTEP_TURNED, 2, "cond")


def test_the_number_of_steps() -> None:
    scheduler = SimpleNamespace(timesteps=[9.0, 8.0, 8.0, 7.0])
    for explicit, expected in ((None, 3), (5, 5)):
        trajectory = ExplicitTrajectory(Clock(explicit, scheduler)).place(inputs(0, 9.0), NOBODY).trajectory
        assert trajectory.num_steps == expected
    assert ExplicitTrajectory(Clock()).place(inputs(0, 1.0), NOBODY).trajectory.num_steps is None
    named = Named("cond", num_inference_steps=4)
    assert ExplicitTrajectory(Clock()).place(inputs(0, 1.0), named).trajectory.num_steps == 4


@pytest.mark.parametrize("given", [{"num_steps": 0}, {"num_steps": -1}, {"num_steps": True}, {"num_steps": object()}])
def test_invalid_numbers_of_steps(given: dict[str, Any]) -> None:
    with pytest.raises(BadTrajectory, match="num_steps"):
        Clock(**given)


def test_a_scheduler_without_timesteps() -> None:
    with pytest.raises(BadTrajectory, match="has no timesteps"):
        Clock(scheduler=object())


def test_conditioning_by_value() -> None:
    see = explicit(9)
    see(inputs(0, 9.0, C, U))
    assert see(inputs(0, 9.0, U, C)) == (0, 1)
    assert see(inputs(0.1, 8.0, C.clone(), U)) == (1, 0)
    assert see(inputs(0.1, 8.0, U.clone(), C.clone())) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [(C,), (C, C), (C.double(), U), (C.to("meta"), U), (C[:2], U), (torch.full((3,), torch.nan), U)],
    ids=["count", "value", "dtype", "device", "shape", "nan"],
)
def test_conditioning_that_differs(other: tuple[Tensor, ...]) -> None:
    see = explicit(9)
    see(inputs(0, 9.0, C, U))
    assert see(inputs(0, 9.0, *other)) == (0, 1)


def test_modified_conditioning() -> None:
    """A modified tensor does not match the stream's conditioning, nor does another tensor that equals it now."""
    see, given = explicit(9), torch.zeros(3)
    see(inputs(0, 9.0, given))
    given.add_(1)
    assert see(inputs(0, 9.0, torch.ones(3))) == (0, 1)
    assert see(inputs(0.1, 8.0, given)) == (1, 1), "equal to the conditioning of the second stream by value"


def test_conditioning_whose_data_are_replaced() -> None:
    """The object and its version counter stay the same."""
    see, given = explicit(9), torch.zeros(3)
    see(inputs(0, 9.0, given))
    given.data = torch.ones(3)
    assert see(inputs(0.1, 8.0, given)) == (1, 1)


@pytest.mark.parametrize("told", [True, False])
def test_modified_conditioning_without_a_version(told: bool) -> None:
    with torch.inference_mode():
        see, given = explicit(9) if told else Seen(InferredTrajectory().place), torch.zeros(3)
        see(inputs(0, 9.0, given))
        see(inputs(0.1, 8.0, given))
        given.add_(1)
        found = see(inputs(0.2, 7.0, given))
    assert found == ((2, 1) if told else (TrajectoryReason.NEW_CONDITIONING, 0, 0))


def test_without_a_time_new_streams_are_counted() -> None:
    """The time is in an argument that is not read as one: each call is a stream, and the first step never ends."""
    place = ExplicitTrajectory(Clock(9)).place
    calls = [Inputs(latent(0.1 * step), None, (C,), rest=(("time", step),)) for step in range(3)]
    assert [place(call, NOBODY).why for call in calls] == [StreamReason.NEW_STREAM] * 3
    assert ExplicitTrajectory(Clock(9)).place(inputs(0, 9.0, C), NOBODY).why is None


def test_frames_at_several_steps_have_no_noise_of_one() -> None:
    """The trajectory has more steps than the schedule, and is at no entry of it."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6])
    place = ExplicitTrajectory(Clock(scheduler=scheduler, noise=True)).place
    found = []
    for step, entries in enumerate(([0, 0], [1, 0], [2, 1])):
        trajectory = place(inputs(0.1 * step, scheduler.timesteps[entries]), NOBODY).trajectory
        found.append((trajectory.step, trajectory.noise(trajectory.step)[0]))
    assert found == [(0, 1.0), (1, None), (2, None)]
    assert trajectory.num_steps is None


@pytest.mark.parametrize("another", [True, False])
def test_frames_that_part_may_be_another_video(another: bool) -> None:
    """A chunk whose frames are at several steps may follow a finished one; the latent shows whether it continues it."""
    see = explicit(scheduler=(scheduler := SimpleNamespace(timesteps=torch.tensor([900.0, 600.0, 300.0]))))
    for step in range(3):
        see(inputs(0.1 * step, scheduler.timesteps[[step, step]]))
    parted = inputs(2.0 if another else 0.3, scheduler.timesteps[[1, 0]])
    assert see(parted) == ((TrajectoryReason.NEW_LATENT, 0, 0) if another else (3, 0))


def test_frames_that_keep_their_noise_are_conditions() -> None:
    """Given frames stay at a time of their own until the others have reached it: LTX's min(t, 1000 (1 - strength))."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.05])
    place, found = ExplicitTrajectory(Clock(scheduler=scheduler, noise=True)).place, []
    for step in (0, 1, 2, 3, 0):
        time = torch.minimum(scheduler.timesteps[step], torch.tensor([[100.0, 0.0, 1000.0]]))
        trajectory = place(inputs(0.1 * step, time), NOBODY).trajectory
        noise = trajectory.noise(trajectory.step)[0]
        found.append((trajectory.why, trajectory.step, trajectory.num_steps, round(noise or 0, 6)))
    turned = TrajectoryReason.TIMESTEP_TURNED
    assert found == [(None, 0, 4, 1.0), (None, 1, 4, 0.8), (None, 2, 4, 0.6), (None, 3, 4, 0.05), (turned, 0, 4, 1.0)]


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize("form", [lambda t: t.to(torch.bfloat16), lambda t: (t / 1000).to(torch.bfloat16)])
@pytest.mark.parametrize("conditions", [(C,), (C, U)])
def test_timesteps_that_are_rounded_to_one_number(conditions: tuple[Tensor, ...], form: Any, begin: int) -> None:
    """A sampler of one's own does not advance the scheduler's step_index. Some timesteps are equal in bfloat16:
    then a second call of a stream begins the next step."""
    times = torch.tensor([1000.0, 997.1, 994.1, 990.9, 987.6, 984.0])
    assert len(set(times.to(torch.bfloat16).tolist())) < len(times)
    see = explicit(scheduler=SimpleNamespace(timesteps=times))
    calls = [(i, time, c) for i, time in enumerate(times[begin:]) for c in conditions]
    found = [see(inputs(0.01 * step, form(time).expand(2), c))[-2:] for step, time, c in calls]
    assert found == [(step, stream) for step in range(len(times) - begin) for stream in range(len(conditions))]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("times", [(1.0, 9.0), (9.5, 9.0)], ids=["before it in time", "behind it"])
def test_a_warm_up_call_of_another_picture(times: tuple[float, ...], in_place: bool) -> None:
    """Without a schedule, the first change of the time shows no direction yet: the latent must continue the last."""
    see, x = explicit(9), latent(0.0)

    def call(turn: float, time: float) -> Any:
        found = x.copy_(latent(turn)) if in_place else latent(turn)
        return see(Inputs(found, torch.tensor(time), (C,)))

    call(2.0, times[0])
    assert call(0.0, times[1]) == (TrajectoryReason.NEW_LATENT, 0, 0)
    assert call(0.1, 8.0) == (1, 0)
    assert call(2.0, 7.0) == (2, 0), "then the latent is not read any more"


def test_a_time_outside_the_schedule_proves_nothing() -> None:
    scheduler = SimpleNamespace(timesteps=torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]))
    see, t = explicit(scheduler=scheduler), scheduler.timesteps
    see(inputs(2.0, torch.tensor(1.0)))
    assert see(inputs(0.0, t[0])) == (TrajectoryReason.NEW_LATENT, 0, 0)
    assert see(inputs(0.1, t[1])) == (1, 0)
    assert see(inputs(0.2, t[3])) == (3, 0), "an entry is left out, and the latent goes on"
    assert see(inputs(2.0, t[4])) == (4, 0), "the next entry needs no latent"
    assert see(inputs(0.0, t[0])) == (TrajectoryReason.TIMESTEP_TURNED, 0, 0)
    assert see(inputs(2.0, t[2])) == (TrajectoryReason.NEW_LATENT, 0, 0)


def test_a_denoiser_that_joins_late_shares_the_clock() -> None:
    """The second expert of a pipeline starts in the middle of the schedule with an empty cache."""
    scheduler = SimpleNamespace(timesteps=torch.tensor([9.0, 8.0, 7.0, 6.0]))
    clock = Clock(scheduler=scheduler)
    first, second = Seen(ExplicitTrajectory(clock).place), Seen(ExplicitTrajectory(clock).place)
    t = scheduler.timesteps
    assert first(inputs(0, t[0])) == (None, 0, 0)
    assert first(inputs(0.1, t[1])) == (1, 0)
    assert second(inputs(0.2, t[2])) == (None, 2, 0)
    assert second(inputs(0.3, t[3])) == (3, 0)
    assert first(inputs(0.0, t[0])) == (TrajectoryReason.TIMESTEP_TURNED, 0, 0)
    assert second(inputs(0.2, t[2])) == (None, 2, 0)


# --- inferred trajectories --------------------------------------------------------------------------------------------


def inferred() -> Seen:
    return Seen(InferredTrajectory().place)


def test_inferred_falls_and_rises() -> None:
    for times in ((9.0, 8.0, 6.0), (0.0, 0.1, 0.5)):
        see = inferred()
        assert see(inputs(0.0, times[0])) == (TrajectoryReason.FIRST_CALL, 0, 0)
        assert see(inputs(0.1, times[1])) == (1, 0)
        assert see(inputs(0.2, times[2])) == (2, 0)


@pytest.mark.parametrize("timestep", [3, 3.0, torch.tensor([3.0, 3.0]), torch.tensor(3), None], ids=str)
def test_inferred_timesteps_of_any_kind(timestep: Any) -> None:
    """A timestep that never changes proves nothing, because each call may be a trajectory of one step."""
    see = inferred()
    assert see(Inputs(latent(0), timestep, (C,))) == (TrajectoryReason.FIRST_CALL, 0, 0)
    assert see(Inputs(latent(0.1), timestep, (C,))) == (TrajectoryReason.TIMESTEP_STILL, 0, 0)


@pytest.mark.parametrize(
    ("turn", "time", "why"),
    [
        (0.2, 8.5, TrajectoryReason.TIMESTEP_TURNED),
        (0.2, math.nan, TrajectoryReason.TIMESTEP_TURNED),
        (0.1, 8.0, TrajectoryReason.REPEATED),
        (0.1, 7.0, TrajectoryReason.REPEATED),
        (math.pi / 2, 7.0, TrajectoryReason.NEW_LATENT),
        (math.nan, 7.0, TrajectoryReason.NEW_LATENT),
        (0.2, 7.0, None),
    ],
)
def test_inferred_third_call(turn: float, time: float, why: TrajectoryReason | None) -> None:
    see = inferred()
    see(inputs(0.0, 9.0))
    see(inputs(0.1, 8.0))
    assert see(inputs(turn, time)) == ((2, 0) if why is None else (why, 0, 0))


def test_inferred_second_evaluation() -> None:
    """Two calls of a second-order solver at one timestep are one step."""
    see = inferred()
    see(inputs(0.0, 9.0))
    see(inputs(0.1, 8.0))
    assert see(inputs(0.2, 8.0)) == (1, 0)
    assert see(inputs(0.3, 7.0)) == (2, 0)


def test_inferred_conditioning() -> None:
    see, given = inferred(), torch.zeros(3)
    see(inputs(0.0, 9.0, given))
    assert see(inputs(0.1, 8.0, given.clone())) == (1, 0), "equal by value"
    given.add_(1)
    assert see(inputs(0.2, 7.0, given)) == (TrajectoryReason.NEW_CONDITIONING, 0, 0)
    assert see(inputs(0.3, 6.0, given)) == (1, 0)


def test_inferred_latent_of_another_shape() -> None:
    see = inferred()
    see(inputs(0.0, 9.0))
    assert see(Inputs(torch.ones(3), torch.tensor(8.0), (C,))) == (TrajectoryReason.NEW_LATENT, 0, 0)
    assert see(Inputs(1.1 * torch.ones(3), torch.tensor(7.0), (C,))) == (1, 0)
    assert see(Inputs(torch.ones(3).double(), torch.tensor(6.0), (C,))) == (TrajectoryReason.NEW_LATENT, 0, 0)


def test_inferred_latent_of_zeros_proves_nothing() -> None:
    """The change relative to a latent of zeros is 0 / 0."""
    see = inferred()
    see(Inputs(torch.zeros(3), torch.tensor(9.0), (C,)))
    assert see(Inputs(torch.zeros(3), torch.tensor(8.0), (C,))) == (TrajectoryReason.NEW_LATENT, 0, 0)


def test_inferred_streams_share_latent_and_timestep() -> None:
    see = inferred()
    see(inputs(0.0, 9.0, C))
    assert see(inputs(0.0, 9.0, U)) == (0, 1)
    assert see(inputs(0.1, 8.0, C)) == (1, 0)
    assert see(inputs(0.1, 8.0, U)) == (1, 1)
    assert see(inputs(0.1, 7.0, 2 * torch.ones(3))) == (TrajectoryReason.NEW_CONDITIONING, 0, 0), "another timestep"


def test_inferred_stream_of_another_noise_is_a_new_trajectory() -> None:
    see = inferred()
    see(inputs(0.0, 9.0, C))
    assert see(inputs(2.0, 9.0, U)) == (TrajectoryReason.NEW_CONDITIONING, 0, 0)


def test_inferred_stream_that_pauses_keeps_its_step() -> None:
    see = inferred()
    see(inputs(0.0, 9.0, U))
    see(inputs(0.0, 9.0, C))
    assert see(inputs(0.1, 8.0, C)) == (1, 1)
    assert see(inputs(0.2, 7.0, U)) == (2, 0)
    assert see(inputs(0.2, 7.0, C)) == (2, 1)


def test_inferred_streams_by_name() -> None:
    see = inferred()
    assert see(inputs(0.0, 9.0, C), Named("cond")) == (TrajectoryReason.FIRST_CALL, 0, "cond")
    assert see(inputs(0.0, 9.0, C), Named("uncond")) == (0, "uncond")
    assert see(inputs(0.1, 8.0, C), Named("cond")) == (1, "cond")
    assert see(inputs(0.2, 7.0, U), Named("cond")) == (TrajectoryReason.NEW_CONDITIONING, 0, "cond")


def test_inferred_step_that_goes_back_is_another_trajectory() -> None:
    see = inferred()
    see(inputs(0.0, 9.0), Named("cond", step_index=3))
    assert see(inputs(0.1, 8.0), Named("cond", step_index=4)) == (4, "cond")
    assert see(inputs(0.2, 7.0), Named("cond", step_index=0)) == (TrajectoryReason.TIMESTEP_TURNED, 0, "cond")


def test_inferred_keeps_a_copy_of_the_latent() -> None:
    see, x = inferred(), latent(0.0)
    for turn, expected in (
        (0.0, (TrajectoryReason.FIRST_CALL, 0, 0)),
        (0.1, (1, 0)),
        (2.0, (TrajectoryReason.NEW_LATENT, 0, 0)),
    ):
        x.copy_(latent(turn))
        assert see(Inputs(x, torch.tensor(9.0 - turn), (C,))) == expected


def test_inferred_without_any_tensor_never_goes_on() -> None:
    see = inferred()
    assert see(Inputs(None, None, ())) == (TrajectoryReason.FIRST_CALL, 0, 0)
    assert see(Inputs(None, None, ())) == (TrajectoryReason.NEW_LATENT, 0, 0)
