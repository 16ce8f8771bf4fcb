"""Trajectories (runs of the sampler), and the trajectory, step and stream of each call of the denoiser.

A trajectory is explicit if the caller marks it, and otherwise inferred from the calls. Inference is conservative: a
call that does not clearly continue the trajectory starts a new one with an empty cache.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dit_rewrite.errors import StreamReason, TrajectoryReason
from dit_rewrite.runtime.clock import Clock, Named
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.stream import Stream
from dit_rewrite.runtime.streams import CONTINUES, Differing, Streams
from dit_rewrite.runtime.tensors import alike, relative_change

__all__ = ["Clock", "ExplicitTrajectory", "InferredTrajectory", "Named", "Place", "Stream", "Trajectory"]

_numbers = itertools.count()


@dataclass
class Trajectory:
    """One run of the sampler. `why` is the reason for which it was begun; None means the caller began it."""

    why: TrajectoryReason | None
    clock: Clock | None = None
    step: int = 0
    first_step: int = 0
    sigma: float | None = None
    streams: Streams = field(default_factory=Streams)
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def num_steps(self) -> int | None:
        """The number of steps; None means unknown."""
        return self.clock.num_steps if self.clock is not None else None

    def noise(self, step: int) -> tuple[float | None, float | None]:
        """Return sigma and SNR of a step; None means unknown."""
        if self.clock is not None:
            return self.clock.noise_at(step)
        return (self.sigma if step == self.step else None), None


class Place(NamedTuple):
    """The trajectory and stream of a call.

    why: a specific reason why the stream has no values yet, if there is one. lapsed: how many streams gave their
    memory back in this call (see `Streams.lapse`).
    """

    trajectory: Trajectory
    stream: Stream
    why: StreamReason | None = None
    lapsed: int = 0


class ExplicitTrajectory:
    """The trajectories that the caller marks for one denoiser. All calls in the context belong to one trajectory until
    time goes back, which begins the next one.

    It synchronises with the device only to read a schedule on the device (once), to compare conditioning tensors that
    are created anew in each call, to tell several calls with one conditioning in a step apart, to compare the latent
    where the time does not show that a call follows the last one, and to read a timestep on a GPU that cannot be
    matched with a scheduler.
    """

    def __init__(self, clock: Clock, of_run: bool = False, outer: ExplicitTrajectory | None = None) -> None:
        """`of_run`: a pipeline's run opened it, and not the user. `outer`: the one that it interrupts."""
        self.clock, self.of_run, self.outer = clock, of_run, outer
        self.is_open = True
        self.trajectory = Trajectory(None, clock)
        self._run = clock.run

    def close(self) -> None:
        """End it and drop its cache."""
        self.is_open = False
        self.trajectory = Trajectory(None, self.clock)

    def begin(self) -> None:
        """Begin another trajectory with an empty cache."""
        self.clock.begin()
        self._follow_clock(None)

    def place(self, inputs: Inputs, named: Named) -> Place:
        """Return the trajectory and stream of a call, and advance the clock."""
        clock = self.clock
        reading = clock.read(inputs.timestep, named)
        restart = reading.restart
        if restart is None and not reading.follows and not self.trajectory.streams.are_continued(inputs):
            restart = TrajectoryReason.NEW_LATENT
        if restart is not None:
            clock.begin()
            reading = clock.read(inputs.timestep, named)
            self._follow_clock(restart)
        elif clock.run != self._run:
            self._follow_clock(None)
        trajectory = self.trajectory
        streams, step = trajectory.streams, clock.step_of(reading, named)
        first = not streams.all or step == trajectory.first_step
        stream, why = streams.match(inputs, named.name, reading, step, first)
        clock.enter(reading, inputs.timestep, named, (id(self), id(stream)))
        if not streams.all or stream.calls == 0 and len(streams.all) == 1:
            trajectory.first_step = clock.step
        before, trajectory.step = trajectory.step, clock.step
        stream.note(inputs, clock.step, reading.entry)
        lapsed = streams.lapse(clock.step) if clock.step != before else []
        expected = first and stream in streams.all and why is not StreamReason.MOVED_ONCE and _is_timed(inputs, named)
        return Place(trajectory, stream, None if expected else why, len(lapsed))

    def _follow_clock(self, why: TrajectoryReason | None) -> None:
        self._run = self.clock.run
        self.trajectory = Trajectory(why, self.clock)


def _is_timed(inputs: Inputs, named: Named) -> bool:
    """Return whether a call has a time. Without one, the first step may never end."""
    return any(time is not None for time in (inputs.timestep, named.timestep, named.step_index))


class InferredTrajectory:
    """Infers steps, streams and trajectories from the inputs of the calls, with one device read per call, and a second
    one to compare conditioning tensors that are created anew.

    Streams are distinguished by name or conditioning only. Several calls with one conditioning in a step are taken for
    the second evaluation of a solver; samplers that call more often must use an explicit trajectory. Two identical
    calls are either the same noise sampled again or two calls of each step: their values are used only if the next
    step has no such pair.
    """

    def __init__(self) -> None:
        self.trajectory = Trajectory(TrajectoryReason.FIRST_CALL)
        self._direction = 0.0
        self._latest: Stream | None = None
        self._crowded = False  # the trajectory began at the timestep of the last one: a step may have several calls

    def place(self, inputs: Inputs, named: Named) -> Place:
        """Return the trajectory and stream of a call. Begins a new trajectory if it does not continue the last."""
        streams = self.trajectory.streams
        differing = streams.differing(streams.alike(inputs, named.name), inputs, told=False)
        stream = next((s for s, places in differing.items() if not places), None)
        moved = self._that_moved(differing, named) if stream is None and not self._crowded else None
        before = stream or moved or self._latest
        timestep, change = _read(inputs, None if before is None else before.latent)
        once = None
        if moved is not None and 0 < change < CONTINUES and self._may_move(moved, timestep, differing[moved]):
            once = moved.moves(inputs, differing[moved], timestep == moved.timestep, proven=False)
            stream = moved
        why = self._misfit(stream, inputs, timestep, change)
        if named.step_index is not None and named.step_index < self.trajectory.step:
            why = why or TrajectoryReason.TIMESTEP_TURNED
        later = why is None and self._latest is not None and timestep != self._latest.timestep
        again = why is TrajectoryReason.REPEATED and stream is not None and timestep == stream.timestep
        twin = why is None and stream is not None and stream.repeats
        if why is not None:
            self._crowded = self._latest is not None and timestep == self._latest.timestep
            self.trajectory, self._direction, stream = Trajectory(why), 0.0, None
        elif stream is not None:
            self._direction = self._direction or timestep - stream.timestep
        if stream is None or twin:
            stream = self.trajectory.streams.renew(stream, named.name)
        stream.repeats = again
        self._note(stream, inputs, named, timestep, later)
        return Place(self.trajectory, stream, StreamReason.AMBIGUOUS_STREAM if twin else once if why is None else None)

    def _note(self, stream: Stream, inputs: Inputs, named: Named, timestep: float, later: bool) -> None:
        trajectory = self.trajectory
        if named.step_index is not None:
            trajectory.step = named.step_index
        elif later:
            trajectory.step += 1
        trajectory.sigma = named.sigma
        latent = None if inputs.latent is None else inputs.latent.detach().clone()  # may be updated in place
        stream.note(inputs._replace(latent=latent), trajectory.step)
        stream.timestep = timestep
        self._latest = stream

    @staticmethod
    def _that_moved(differing: Differing, named: Named) -> Stream | None:
        """Return the only stream that a call may continue with changed conditioning tensors, or None."""
        following = [s for s, places in differing.items() if Streams.follows(s, places, named.name is not None)]
        return following[0] if len(following) == 1 else None

    @staticmethod
    def _may_move(stream: Stream, timestep: float, places: list[int]) -> bool:
        """Return whether a call may continue a stream although its tensors at `places` differ: at another timestep, or
        as a second evaluation, if the first one of this step moved them too."""
        conditioning = stream.conditioning
        return timestep != stream.timestep or (
            conditioning is not None and conditioning.have_moved(places, stream.calls + 1)
        )

    def _misfit(self, stream: Stream | None, inputs: Inputs, timestep: float, change: float) -> TrajectoryReason | None:
        """Return why a call does not belong to the current trajectory, or None if it does. NaN never belongs."""
        if self._latest is None:
            return TrajectoryReason.FIRST_CALL
        if inputs.opaque:
            return TrajectoryReason.UNREADABLE_INPUT
        if stream is None:  # another stream of the current step has the same latent and timestep
            joins = change < CONTINUES and timestep == self._latest.timestep
            return None if joins else TrajectoryReason.NEW_CONDITIONING
        if change == 0:  # the same noise again, whatever the timestep: a sampler changes its latent between steps
            return TrajectoryReason.REPEATED
        if not change < CONTINUES:
            return TrajectoryReason.NEW_LATENT
        ahead = timestep - stream.timestep
        if ahead == 0 and not self._direction:
            return TrajectoryReason.TIMESTEP_STILL
        return None if ahead * self._direction >= 0 else TrajectoryReason.TIMESTEP_TURNED


def _read(inputs: Inputs, before: Tensor | None) -> tuple[float, float]:
    """Return the timestep (0 if there is none) and the relative L2 change of the latent, with one device read."""
    timestep, latent = inputs.timestep, inputs.latent
    numbers: list[Tensor] = []
    if isinstance(timestep, Tensor):
        numbers.append(timestep.detach().to(torch.float64).mean())
    if latent is not None and before is not None and alike(latent, before):
        numbers.append(relative_change(latent, before))
        read = torch.stack([n.to(latent.device) for n in numbers]).tolist()
    else:
        read = [*(n.item() for n in numbers), float("nan")]
    return (read[0] if isinstance(timestep, Tensor) else float(timestep or 0.0)), read[-1]
