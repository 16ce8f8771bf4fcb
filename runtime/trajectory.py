"""Trajectories: which step of which run of the sampler a call belongs to, and which stream of it.

Told (`Told`) by whoever drives the sampler, or watched (`Watched`) when nobody tells. A watched trajectory is
suspicious: what does not fit starts a new one, which forgets every cached value.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.errors import BadTrajectory, Reason
from dit_rewrite.runtime.cache import Bank, version
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.noise import NoiseLevels, noise_levels

CONTINUES = 0.5  # a latent whose relative L2 change is below this continues the last; independent noise has 1.41
MAX_STREAMS = 8

_numbers = itertools.count()


@dataclass
class Stream:
    """What belongs to one stream of a trajectory: its slots, and the sequence of graphs that its last call ran."""

    name: Hashable
    banks: dict[tuple[int, int], Bank] = field(default_factory=dict)
    sequence: tuple[int, ...] | None = None
    num_layers: int | None = None
    conditioning: tuple[Tensor, ...] = ()
    versions: tuple[int | None, ...] = ()
    latent: Tensor | None = None
    timestep: float = float("nan")

    def is_conditioned_by(self, conditioning: tuple[Tensor, ...], by_value: bool = False) -> bool:
        """Whether a call's conditioning is the stream's: the same objects, not changed in place since.

        `by_value` also accepts other objects of equal content, at the price of reading the device.
        """
        if len(self.conditioning) != len(conditioning):
            return False
        return all(
            before == version(a) and (a is b or (by_value and _alike(a, b) and torch.equal(a, b)))
            for a, b, before in zip(self.conditioning, conditioning, self.versions, strict=True)
        )

    def hold(self, conditioning: tuple[Tensor, ...]) -> None:
        """Take this conditioning for the stream's. It is held: the id of a freed tensor could come again."""
        self.conditioning, self.versions = conditioning, tuple(map(version, conditioning))


@dataclass
class Trajectory:
    """One run of the sampler. `why` is the reason that it began; None where it was told."""

    why: Reason | None
    num_steps: int | None = None
    step: int = 0
    levels: NoiseLevels | None = None
    sigma: float | None = None  # of the step that is under way, where a cache_context says it
    streams: dict[Hashable, Stream] = field(default_factory=dict)
    number: int = field(default_factory=lambda: next(_numbers))
    _called: set[Hashable] = field(default_factory=set)

    def stream(self, name: Hashable) -> Stream:
        """The stream of that name, made at its first call. The oldest goes when there are too many."""
        if name not in self.streams and len(self.streams) == MAX_STREAMS:
            self.streams.pop(next(iter(self.streams)))
        return self.streams.setdefault(name, Stream(name))

    def new_name(self) -> int:
        """A name for a stream that nobody named."""
        return next(n for n in itertools.count() if n not in self.streams)

    def noise(self, step: int) -> tuple[float | None, float | None]:
        """Sigma and SNR of a step, as the scheduler says; None where it is not known."""
        return self.levels.at(step) if self.levels is not None else (None, None)

    def enter(self, stream: Stream, step: int | None = None, later: bool = False) -> None:
        """Count a call. One of a stream that was called in this step already begins the next, and so does a `later`."""
        if step is not None:
            self.step = step
        elif later or stream.name in self._called:
            self.step += 1
            self._called.clear()
        self._called.add(stream.name)


@dataclass(frozen=True)
class Named:
    """What `cache_context` says of the calls inside it."""

    name: str | None = None
    step_index: int | None = None
    sigma: float | None = None


class Told:
    """A trajectory that the caller marks: everything called inside its context belongs to it.

    It reads no device, unless the conditioning is made anew at each call and its streams are not named, or `noise` is
    wanted of a scheduler whose schedule lies there: that is read once, at the first call.
    """

    def __init__(self, num_steps: int | None, scheduler: Any, noise: bool = False) -> None:
        if num_steps is not None and num_steps < 1:
            raise BadTrajectory(f"A trajectory of {num_steps} steps has no step.", "Give num_steps >= 1.")
        self.num_steps, self.scheduler, self.noise = num_steps, scheduler, noise
        self.begin()

    def begin(self) -> None:
        """Start at the first step, without any value."""
        self.trajectory = Trajectory(None, self.num_steps)

    def place(self, inputs: Inputs, named: Named) -> tuple[Trajectory, Stream]:
        """The trajectory and stream of a call. A step that was told and lies before the present one starts anew."""
        if named.step_index is not None and named.step_index < self.trajectory.step:
            self.begin()
        trajectory = self.trajectory
        if not trajectory.streams and self.scheduler is not None:
            self._ask_scheduler(trajectory)
        trajectory.sigma = named.sigma
        stream = trajectory.stream(named.name) if named.name is not None else self._match(inputs.conditioning)
        trajectory.enter(stream, named.step_index)
        return trajectory, stream

    def _ask_scheduler(self, trajectory: Trajectory) -> None:
        """What the scheduler knows; at the first call, since pipelines set its timesteps late.

        Image to image enters the schedule at its begin_index. Levels of another number of steps are no proof.
        """
        if trajectory.num_steps is None:
            begin = getattr(self.scheduler, "begin_index", None) or 0
            trajectory.num_steps = len(self.scheduler.timesteps) - begin
        levels = noise_levels(self.scheduler) if self.noise else None
        trajectory.levels = levels if levels is not None and len(levels) == trajectory.num_steps else None

    def _match(self, conditioning: tuple[Tensor, ...]) -> Stream:
        for by_value in (False, True):
            for stream in self.trajectory.streams.values():
                if stream.is_conditioned_by(conditioning, by_value):
                    return stream
        stream = self.trajectory.stream(self.trajectory.new_name())
        stream.hold(conditioning)
        return stream


class Watched:
    """Tells steps, streams and trajectories apart by what the calls look like: one fused read of the device a call."""

    def __init__(self) -> None:
        self.trajectory = Trajectory(Reason.FIRST_CALL)
        self._direction = 0.0
        self._latest: Stream | None = None

    def place(self, inputs: Inputs, named: Named) -> tuple[Trajectory, Stream]:
        """The trajectory and stream of a call; a new trajectory unless everything speaks for the present one."""
        stream = self._find(inputs, named)
        before = stream or self._latest
        timestep, change = _read(inputs, None if before is None else before.latent)
        why = self._misfit(stream, inputs, timestep, change)
        if named.step_index is not None and named.step_index < self.trajectory.step:
            why = why or Reason.TIMESTEP_TURNED
        later = why is None and self._latest is not None and timestep != self._latest.timestep
        if why is not None:
            self.trajectory, self._direction, stream = Trajectory(why), 0.0, None
        elif stream is not None:
            self._direction = self._direction or timestep - stream.timestep
        if stream is None:
            stream = self.trajectory.stream(self.trajectory.new_name() if named.name is None else named.name)
        stream.hold(inputs.conditioning)
        stream.latent = None if inputs.latent is None else inputs.latent.detach().clone()  # may be updated in place
        stream.timestep = timestep
        self._latest = stream
        self.trajectory.enter(stream, named.step_index, later)
        return self.trajectory, stream

    def _find(self, inputs: Inputs, named: Named) -> Stream | None:
        streams = self.trajectory.streams
        if named.name is not None:
            return streams.get(named.name)
        return next((s for s in streams.values() if s.is_conditioned_by(inputs.conditioning)), None)

    def _misfit(self, stream: Stream | None, inputs: Inputs, timestep: float, change: float) -> Reason | None:
        """Why a call does not belong to the present trajectory; None where it does. NaN never fits."""
        if self._latest is None:
            return Reason.FIRST_CALL
        if stream is None:  # another stream of the step that is under way: same latent, same timestep
            joins = change < CONTINUES and timestep == self._latest.timestep
            return None if joins else Reason.NEW_CONDITIONING
        if not stream.is_conditioned_by(inputs.conditioning):
            return Reason.NEW_CONDITIONING
        moved = timestep - stream.timestep
        if change == 0:  # of one noise, whatever the timestep: a sampler that goes on changes its latent
            return Reason.REPEATED
        if not change < CONTINUES:
            return Reason.NEW_LATENT
        return None if moved * self._direction >= 0 else Reason.TIMESTEP_TURNED


def _read(inputs: Inputs, before: Tensor | None) -> tuple[float, float]:
    """The timestep (0 where there is none) and the relative L2 change of the latent, in one read of the device."""
    timestep, latent = inputs.timestep, inputs.latent
    numbers: list[Tensor] = []
    if isinstance(timestep, Tensor):
        numbers.append(timestep.detach().to(torch.float64).mean())
    if latent is not None and before is not None and _alike(latent, before):
        change = torch.linalg.vector_norm(latent.detach() - before, dtype=torch.float32)
        numbers.append((change / torch.linalg.vector_norm(before, dtype=torch.float32)).to(torch.float64))
        read = torch.stack([n.to(latent.device) for n in numbers]).tolist()
    else:
        read = [*(n.item() for n in numbers), float("nan")]
    return (read[0] if isinstance(timestep, Tensor) else float(timestep or 0.0)), read[-1]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
