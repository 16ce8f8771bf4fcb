"""Which step of a trajectory a call belongs to, in a trajectory that the caller marked.

Evidence, strongest first: the step that `cache_context` names; the timestep's entry in the scheduler's schedule; a
timestep that is another one than the last call's. Where none of these is known (no scheduler, timesteps on a GPU, a new
tensor at each call) steps are counted: a stream that was called in this step begins the next.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_rewrite.errors import BadTrajectory, Reason
from dit_rewrite.runtime.schedule import Schedule, is_uneven, on_host
from dit_rewrite.runtime.tensors import version


@dataclass(frozen=True)
class Named:
    """What `cache_context` says of the calls inside it; the fields are those of diffusers' CacheContext."""

    name: str | None = None
    step_index: int | None = None
    sigma: float | None = None
    num_inference_steps: int | None = None
    timestep: Tensor | float | None = None


@dataclass(frozen=True)
class Reading:
    """What can be said of a call's time before its stream is known.

    ``entry`` is its place in the schedule, and ``value`` its timestep where there is none and reading it waits for no
    device. ``same_step``: whether it belongs to the step of the call before; None: unknown. ``repeats``: whether the
    schedule lists this timestep twice, as those of second-order solvers do; None where there is no schedule.
    ``restart`` is the reason why the call begins another trajectory, if it does.
    """

    entry: int | None
    value: float | None
    same_step: bool | None
    repeats: bool | None = None
    restart: Reason | None = None


class Clock:
    """The time of one trajectory after another, as the calls inside a `trajectory()` context show it.

    Several denoisers may share a clock (the experts of one pipeline). ``run`` counts the trajectories.
    """

    def __init__(self, num_steps: int | None = None, scheduler: Any = None, noise: bool = False) -> None:
        if num_steps is not None and (not isinstance(num_steps, int) or isinstance(num_steps, bool)):
            raise BadTrajectory(
                f"trajectory(num_steps={type(num_steps).__name__}) is no number.",
                "Give num_steps as a whole number, or the scheduler by name: trajectory(scheduler=pipe.scheduler).",
            )
        if num_steps is not None and num_steps < 1:
            raise BadTrajectory(f"A trajectory of {num_steps} steps has no step.", "Give num_steps >= 1.")
        if scheduler is not None and not hasattr(scheduler, "timesteps"):
            raise BadTrajectory(
                f"trajectory(scheduler={type(scheduler).__name__}) has no timesteps.",
                "Give a diffusers scheduler, or an object with `timesteps` (and `sigmas` or `alphas_cumprod`).",
            )
        self.told_steps, self.scheduler, self.noise = num_steps, scheduler, noise
        self.run = 0
        self.begin()

    def begin(self) -> None:
        """Start at the first step of another trajectory."""
        self.run += 1
        self.step = 0
        self.num_steps = self.told_steps
        self.schedule: Schedule | None = None
        self.sigma: float | None = None
        self._begin: int | None = None  # the rank of the first step in the schedule
        self._entry: int | None = None
        self._value: float | None = None
        self._direction = 0.0
        self._uneven = False  # frames are at different steps of the schedule, and the trajectory is at none of them
        self._last: tuple[Any, int | None] | None = None  # the last timestep and its version
        self._called: set[Hashable] = set()

    @property
    def started(self) -> bool:
        """Whether a call belongs to the present trajectory."""
        return self._last is not None

    def noise_at(self, step: int) -> tuple[float | None, float | None]:
        """Sigma and SNR of a step of the present trajectory, as far as they are known."""
        schedule = self.schedule
        if schedule is None or schedule.levels is None or self._uneven:
            return (self.sigma, None) if step == self.step else (None, None)
        if step == self.step and self._entry is not None:
            return schedule.levels.at(self._entry)
        if self._begin is None and self.num_steps != schedule.num_steps:
            return None, None  # the trajectory is a part of the schedule, and it is unknown which
        return schedule.levels.at(schedule.entry_at((self._begin or 0) + step))

    def read(self, timestep: Tensor | float | None, named: Named) -> Reading:
        """Read the time of a call. Changes nothing but which schedule is present, and whether entries can be told."""
        started = self.started
        restart = Reason.SCHEDULE_SET if self._read_schedule() and started else None
        time = timestep if timestep is not None else named.timestep
        self._uneven = self._uneven or is_uneven(time)
        entry = None if self.schedule is None or self._uneven else self.schedule.entry(time, self._entry)
        if entry is None and self.schedule is not None and not (started or self._uneven):
            entry = self.schedule.begin_index
        value = on_host(time) if entry is None else None
        repeats = None if self.schedule is None else entry is not None and self.schedule.repeats(entry)
        same, turned = self._compared(entry, value, timestep, named) if started else (False, False)
        if turned and restart is None:
            restart = Reason.TIMESTEP_TURNED
        return Reading(entry, value, same, repeats, restart)

    def _compared(
        self, entry: int | None, value: float | None, timestep: Any, named: Named
    ) -> tuple[bool | None, bool]:
        """Whether a call belongs to the step of the last one, and whether time went back."""
        if named.step_index is not None:
            return named.step_index == self.step, named.step_index < self.step
        if entry is not None and self._entry is not None and self.schedule is not None:
            moved = self.schedule.rank(entry) - self.schedule.rank(self._entry)
            return moved == 0, moved < 0
        if entry is not None:  # unknown at the last call: the scheduler has no step_index until it has stepped
            return False, False
        if value is not None and self._value is not None:
            change = value - self._value
            return change == 0, change * self._direction < 0
        return (True if self._is_last(timestep) else None), False

    def _is_last(self, timestep: Any) -> bool:
        """Whether this is the very timestep tensor of the last call, unchanged since."""
        if self._last is None or not isinstance(timestep, Tensor):
            return False
        last, before = self._last
        return last is timestep and before is not None and before == version(timestep)

    def step_of(self, reading: Reading, named: Named) -> int:
        """The step of a call, before its stream is known; where it may be the present one or the next, the present."""
        if named.step_index is not None:
            return named.step_index
        if reading.entry is not None and self.schedule is not None and self._begin is not None:
            return self.schedule.rank(reading.entry) - self._begin
        return self.step + (self.started and reading.same_step is False)

    def enter(self, reading: Reading, timestep: Any, named: Named, key: Hashable) -> None:
        """Count a call; `key` tells its stream apart from those of all denoisers that share the clock."""
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
        if self.told_steps is None:
            left = None if self.schedule is None else self.schedule.num_steps - (self._begin or 0)
            self.num_steps = named.num_inference_steps or left

    def _find_begin(self, reading: Reading, step: int, starts: bool) -> None:
        """Where in the schedule the trajectory began: where the scheduler says, or at the first entry that is known,
        less the steps that were counted until then."""
        if self.schedule is None or self._begin is not None:
            return
        begin = self.schedule.begin_index if starts else None
        if begin is not None:
            self._begin = self.schedule.rank(begin)
        elif reading.entry is not None:
            self._begin = self.schedule.rank(reading.entry) - step

    def _read_schedule(self) -> bool:
        """Read the scheduler's timesteps, at the first call, since pipelines set them late; whether they were read."""
        if self.scheduler is None or self.scheduler.timesteps is None:
            return False
        if self.schedule is not None and self.schedule.is_current:
            return False
        self.schedule = Schedule(self.scheduler, self.noise)
        return True
