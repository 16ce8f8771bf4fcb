"""The step of a call in an explicit trajectory.

Evidence, strongest first: the step that `cache_context` gives; the entry of the timestep in the scheduler's schedule; a
timestep that differs from that of the last call. If none of these is known (no scheduler, timesteps on a GPU, a new
tensor in each call), steps are counted: a second call of a stream begins the next step.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_rewrite.errors import NoSteps, NoTimesteps, NumStepsNotWhole, TrajectoryReason
from dit_rewrite.runtime.schedule import SEVERAL, OnHost, Schedule, numbers, on_host
from dit_rewrite.runtime.tensors import version


@dataclass(frozen=True)
class Named:
    """The arguments of `cache_context` for the calls inside it; the fields are those of diffusers' CacheContext."""

    name: str | None = None
    step_index: int | None = None
    sigma: float | None = None
    num_inference_steps: int | None = None
    timestep: Tensor | float | None = None


class Reading(NamedTuple):
    """The time of a call as far as it is known before its stream is.

    entry: index in the schedule. value: the timestep, if there is no entry and reading it does not synchronise.
    same_step: whether it belongs to the step of the previous call; None means unknown.
    repeats: whether the schedule lists this timestep twice, as for second-order solvers; None without a schedule.
    follows: whether the time alone shows that the call belongs to the last step or the next one of the trajectory.
    restart: the reason why the call begins another trajectory, if it does.
    """

    entry: int | None
    value: float | None
    same_step: bool | None
    repeats: bool | None = None
    follows: bool = True
    restart: TrajectoryReason | None = None


class Clock:
    """Tracks the step of the calls inside a `trajectory()` context, over one or more trajectories.

    Several denoisers may share a clock (the experts of one pipeline). ``run`` counts the trajectories. Raises
    BadTrajectory for an invalid number of steps or scheduler.
    """

    def __init__(self, num_steps: int | None = None, scheduler: Any = None, noise: bool = False) -> None:
        if num_steps is not None and (not isinstance(num_steps, int) or isinstance(num_steps, bool)):
            raise NumStepsNotWhole(type(num_steps).__name__)
        if num_steps is not None and num_steps < 1:
            raise NoSteps(num_steps)
        if scheduler is not None and not hasattr(scheduler, "timesteps"):
            raise NoTimesteps(type(scheduler).__name__)
        self.explicit_num_steps, self.scheduler, self.noise = num_steps, scheduler, noise
        self.run = 0
        self.begin()

    def begin(self) -> None:
        """Reset to the first step of another trajectory."""
        self.run += 1
        self.step = 0
        self.num_steps = self.explicit_num_steps
        self.schedule: Schedule | None = None
        self.sigma: float | None = None
        self._begin: int | None = None  # the rank of the first step in the schedule
        self._entry: int | None = None
        self._value: float | None = None
        self._direction = 0.0
        self._uneven = False  # frames are at different steps of the schedule, so the trajectory has no entry
        self._last: tuple[Any, int | None] | None = None  # the last timestep and its version
        self._numbers: tuple[Tensor, int | None, list[float]] | None = None  # a timestep, its version and its values
        self._called: set[Hashable] = set()

    @property
    def started(self) -> bool:
        """Whether the current trajectory has had a call."""
        return self._last is not None

    def noise_at(self, step: int) -> tuple[float | None, float | None]:
        """Return sigma and SNR of a step of the current trajectory; None means unknown."""
        schedule = self.schedule
        if schedule is None or schedule.levels is None or self._uneven:
            return (self.sigma, None) if step == self.step else (None, None)
        if step == self.step and self._entry is not None:
            return schedule.levels.at(self._entry)
        if self._begin is None and self.num_steps != schedule.num_steps:
            return None, None  # the trajectory covers an unknown part of the schedule
        return schedule.levels.at(schedule.entry_at((self._begin or 0) + step))

    @property
    def times(self) -> tuple[float, ...] | None:
        """The timesteps of the schedule, or None without one."""
        return None if self.schedule is None else self.schedule.times

    def numbers(self, timestep: Tensor) -> list[float] | None:
        """Return the values of a call's timestep, or None if reading them would synchronise with a device."""
        if self._numbers is not None:
            known, before, values = self._numbers
            if known is timestep and before is not None and before == version(timestep):
                return values
        return numbers(timestep, self.schedule)

    def given(self, timestep: Tensor) -> list[Tensor]:
        """Return the timesteps of all steps as the model is given them, on the CPU; none if they are not known.

        timestep: that of the current call.
        """
        values = self.numbers(timestep)
        if values is None or self.schedule is None or self._entry is None or self._uneven:
            return []
        return self.schedule.given(torch.tensor(values, dtype=timestep.dtype).view(timestep.shape), self._entry)

    def read(self, timestep: Tensor | float | None, named: Named) -> Reading:
        """Return the time of a call. Updates only the schedule, and whether frames are at different steps."""
        started = self.started
        restart = TrajectoryReason.SCHEDULE_SET if self._read_schedule() and started else None
        time = timestep if timestep is not None else named.timestep
        entry = None if self.schedule is None or self._uneven else self.schedule.place(time)
        value, uneven, values = self._on_host(time, entry)
        self._numbers = (time, version(time), values) if isinstance(time, Tensor) and values is not None else None
        shared = self.schedule.shared(time) if uneven and self.schedule is not None else None
        if shared is not None:
            value, uneven = shared, False
        self._uneven = self._uneven or uneven
        if entry is None and self.schedule is not None and not self._uneven:
            entry = self.schedule.entry(time, value, self._last_entry)
        if entry is None and self.schedule is not None and not (started or self._uneven):
            entry = self.schedule.begin_index
        value = value if entry is None else None
        entry = None if entry == SEVERAL else entry  # steps are counted
        repeats = None if self.schedule is None else entry is not None and self.schedule.repeats(entry)
        same, follows = self._compared(entry, value, timestep, named) if started else (False, True)
        if follows is None and restart is None:
            restart = TrajectoryReason.TIMESTEP_TURNED
        return Reading(entry, value, same, repeats, bool(follows), restart)

    def _on_host(self, time: Any, place: int | None) -> OnHost:
        """Return a timestep on the host. A view of the schedule, at `place`, is not read."""
        if place is None or self.schedule is None:
            return on_host(time)
        return OnHost(None, numbers=[self.schedule.times[place]] * time.numel())

    def _compared(
        self, entry: int | None, value: float | None, timestep: Any, named: Named
    ) -> tuple[bool | None, bool | None]:
        """Return whether a call belongs to the step of the last one (None: unknown), and whether its time shows that it
        follows that (None: the time went back).

        It does not show that at the first change of a time without a schedule, whose direction is not known yet, nor
        where entries of the schedule are left out.
        """
        if named.step_index is not None:
            return named.step_index == self.step, None if named.step_index < self.step else True
        if entry is not None and self.schedule is not None:
            # a scheduler has no step_index until it has stepped: the trajectory is taken to begin with the schedule
            last = (self._begin or 0) + self.step if self._entry is None else self.schedule.rank(self._entry)
            moved = self.schedule.rank(entry) - last
            if self._entry is None:
                return False, moved == 1
            return moved == 0, None if moved < 0 else moved <= 1
        if self._uneven and self._entry is not None:  # frames were at one step: another trajectory may have begun
            return None, False
        if value is not None and self._value is not None:
            change = value - self._value
            return change == 0, None if change * self._direction < 0 else change == 0 or self._direction != 0
        return (True if self._is_last(timestep) else None), True

    @property
    def _last_entry(self) -> int | None:
        """The entry of the last call, or of the step that was counted for it, or None if it is unknown."""
        if self._entry is not None or self.schedule is None or self._begin is None or not self.started:
            return self._entry
        entry = self.schedule.entry_at(self._begin + self.step)
        return None if entry < 0 else entry

    def _is_last(self, timestep: Any) -> bool:
        """Return whether `timestep` is the same tensor object as in the last call, unmodified since."""
        if self._last is None or not isinstance(timestep, Tensor):
            return False
        last, before = self._last
        return last is timestep and before is not None and before == version(timestep)

    def step_of(self, reading: Reading, named: Named) -> int:
        """Return the step of a call before its stream is known: the current step if it may also be the next one."""
        if named.step_index is not None:
            return named.step_index
        if reading.entry is not None and self.schedule is not None and self._begin is not None:
            return self.schedule.rank(reading.entry) - self._begin
        return self.step + (self.started and reading.same_step is False)

    def enter(self, reading: Reading, timestep: Any, named: Named, key: Hashable) -> None:
        """Count a call. `key` identifies its stream among those of all denoisers that share the clock."""
        starts = not self.started
        known = reading.entry is not None and self._begin is not None
        counted = not (starts or known) and reading.same_step is None and key in self._called
        step = self.step_of(reading, named) + counted
        self._find_begin(reading, step, starts)
        step = self.step_of(reading, named) if starts else step
        if step != self.step or starts:
            self._called.clear()
        self.step = step
        self._called.add(key)
        if reading.value is not None and self._value is not None:
            self._direction = self._direction or reading.value - self._value
        self._value, self._entry, self.sigma = reading.value, reading.entry, named.sigma
        self._last = (timestep, version(timestep) if isinstance(timestep, Tensor) else None)
        if self.explicit_num_steps is None:
            schedule = None if self._uneven else self.schedule  # frames that wait for others make further steps
            left = None if schedule is None else schedule.num_steps - (self._begin or 0)
            self.num_steps = named.num_inference_steps or left

    def _find_begin(self, reading: Reading, step: int, starts: bool) -> None:
        """Find the rank at which the trajectory began in the schedule: the scheduler's begin_index, or the rank of the
        first known entry minus the steps counted until then."""
        if self.schedule is None or self._begin is not None:
            return
        begin = self.schedule.begin_index if starts else None
        if begin is not None:
            self._begin = self.schedule.rank(begin)
        elif reading.entry is not None:
            self._begin = self.schedule.rank(reading.entry) - step

    def _read_schedule(self) -> bool:
        """Read the scheduler's timesteps if they were set since the last call. Returns whether they were read.

        They are read at the first call and not earlier, because pipelines set them after entering the context.
        """
        if self.scheduler is None or self.scheduler.timesteps is None:
            return False
        if self.schedule is not None and self.schedule.is_current:
            return False
        self.schedule = Schedule(self.scheduler, self.noise)
        return True
