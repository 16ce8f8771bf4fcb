"""A scheduler's timesteps, and the entry of a call among them.

A step is a distinct timestep, not an entry: a second-order sampler (Heun, PNDM) lists a timestep twice and calls the
denoiser at both entries. The entry of a call is never counted. It is read from the memory address of the timestep (a
pipeline passes ``scheduler.timesteps[i]``, expanded), from its value if that is on the CPU, or from the scheduler's
`step_index`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_rewrite.runtime.noise import NoiseLevels, noise_levels, setting
from dit_rewrite.runtime.tensors import address, version

SEVERAL = -1  # in place of an entry: several entries are rounded to the timestep of a call

# The units in which pipelines pass a timestep t of a scheduler with n training steps.
_UNITS: tuple[Callable[[Any, float], Any], ...] = (
    lambda t, n: t,
    lambda t, n: t / n,
    lambda t, n: 1 - t / n,
)


def _forms(dtype: torch.dtype) -> list[Callable[[Tensor, float], Tensor]]:
    """Return the ways in which pipelines turn the timesteps of a scheduler into tensors of `dtype`."""
    late = [lambda t, n, unit=unit: unit(t, n).to(dtype) for unit in _UNITS]
    early = [lambda t, n, unit=unit: unit(t.to(dtype), n).to(dtype) for unit in _UNITS]
    return [*late, *early]


class Schedule:
    """The timesteps of a scheduler after `set_timesteps`. They are read once; on a GPU this is one device read."""

    def __init__(self, scheduler: Any, noise: bool) -> None:
        """Read the timesteps of `scheduler`, and with `noise` also its noise levels."""
        self.scheduler = scheduler
        self.tensor = scheduler.timesteps
        self._is_computed = self.tensor is not scheduler.timesteps  # a property computes them at each access
        self._version = version(self.tensor) if isinstance(self.tensor, Tensor) else None
        self.times = _times(self.tensor)
        self.levels: NoiseLevels | None = noise_levels(scheduler) if noise else None
        self._ranks = _ranks(self.times)
        self._repeated = {rank for rank, count in Counter(self._ranks).items() if count > 1}
        self._stepped: tuple[int, float | None] | None = None  # the scheduler's step_index, and the timestep then
        self._unit: Sequence[float] | None = None  # the timesteps in the unit that the model is given
        self._exact: dict[float, list[int]] = {}  # the entries of each of them
        self._forms: dict[torch.dtype, list[Tensor]] = {}  # the timesteps as the model may be given them
        self._rounded: dict[torch.dtype, list[list[float]]] = {}  # the same, none left out

    @property
    def begin_index(self) -> int | None:
        """The scheduler's begin_index, or None if it is not set."""
        begin = getattr(self.scheduler, "begin_index", None)
        return begin if isinstance(begin, int) else None

    @property
    def is_current(self) -> bool:
        """Whether the scheduler still has these timesteps, so that `set_timesteps` was not called again."""
        timesteps = self.scheduler.timesteps
        return timesteps is self.tensor or self._is_computed and _times(timesteps) == self.times

    def rank(self, entry: int) -> int:
        """Return the step of an entry: the number of distinct timesteps before it."""
        return self._ranks[min(entry, len(self._ranks) - 1)]

    def repeats(self, entry: int) -> bool:
        """Return whether the schedule lists the timestep of an entry more than once."""
        return self.rank(entry) in self._repeated

    def entry_at(self, rank: int) -> int:
        """Return the first entry of a step, or -1 if the step is not in the schedule."""
        return self._ranks.index(rank) if 0 <= rank < self.num_steps else -1

    @property
    def num_steps(self) -> int:
        """The number of distinct timesteps."""
        return self._ranks[-1] + 1 if self._ranks else 0

    def entry(self, timestep: Tensor | float | None, value: float | None, last: int | None) -> int | None:
        """Return the entry of a call, or None if it is unknown.

        value: the timestep on the host, if it is there. last: the entry of the previous call; of several matches, the
        first one that is not before it is returned, or SEVERAL if it may be the next step too, because different
        timesteps have been rounded to one. A timestep that has a `place` in the schedule is not for this.
        """
        index = self._step_index(value)
        fitting = self._of_value(timestep, value) if value is not None else []
        if index is not None and (not fitting or index in fitting):
            return index
        if not fitting:
            return None
        if last is None and self.begin_index in fitting:
            return self.begin_index
        ahead = fitting if last is None else [i for i in fitting if i >= last]
        if _is_coarse(timestep) and last in ahead and self.rank(ahead[-1]) > self.rank(ahead[0]):
            return SEVERAL
        return (*ahead, fitting[0])[0]

    def place(self, timestep: Any) -> int | None:
        """Return the entry that a timestep is a view of, which is found without reading it, or None."""
        tensors = isinstance(timestep, Tensor) and isinstance(self.tensor, Tensor)
        if not tensors or version(self.tensor) != self._version:  # a sampler may divide its timesteps in place
            return None
        return _place_in(self.tensor, timestep)

    def shared(self, timestep: Any) -> float | None:
        """Return the only number in a timestep for each frame or token that is in the schedule, None if several are.

        Frames at other times are conditions: they keep their noise.
        """
        found = [n for n in dict.fromkeys(timestep.flatten().tolist()) if n and self._of_value(timestep, n)]
        return found[0] if len(found) == 1 else None

    def given(self, timestep: Tensor, entry: int) -> list[Tensor]:
        """Return the timesteps of all steps, on the CPU, in the form in which the model is given them.

        timestep: the one of the call at `entry`, on the CPU. The list is empty if its form is not known. Several forms
        may fit it; a later call excludes those that do not fit. A wrong form costs time, but is never taken for the
        right one, because rows are found by the values of a call's own timestep.
        """
        if timestep.dtype not in self._forms:
            self._forms[timestep.dtype] = self._formed(timestep.dtype)
        fits = [t for t in self._forms[timestep.dtype] if torch.equal(t[entry].expand(timestep.shape), timestep)]
        self._forms[timestep.dtype] = fits
        entries = map(self.entry_at, range(self.num_steps)) if fits else ()
        return [fits[0][i].expand(timestep.shape) for i in entries]

    def _formed(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the timesteps in each of the forms of `_forms`, on the CPU."""
        times = torch.tensor(self.times, dtype=self.tensor.dtype if isinstance(self.tensor, Tensor) else None)
        return [form(times, self._total) for form in _forms(dtype)]

    def _rounded_to(self, value: float, dtype: torch.dtype, entries: Sequence[int]) -> list[int]:
        """Return those of `entries` whose timestep equals `value` in some form; all of them if none does."""
        if dtype not in self._rounded:
            self._rounded[dtype] = [form.tolist() for form in self._formed(dtype)]
        return [i for i in entries if any(form[i] == value for form in self._rounded[dtype])] or list(entries)

    @property
    def _total(self) -> float:
        total = setting(self.scheduler, "num_train_timesteps")
        return float(total) if isinstance(total, int | float) else 1000.0

    def _step_index(self, value: float | None) -> int | None:
        """Return the scheduler's step_index, or None if it does not advance with the timestep.

        In that case the sampler steps another scheduler.
        """
        index = getattr(self.scheduler, "step_index", None)
        if not isinstance(index, int) or not 0 <= index < len(self.times):
            return None
        before, self._stepped = self._stepped, (index, value)
        stays = before is not None and before[0] == index
        if stays and before is not None and None not in (value, before[1]) and value != before[1]:
            self._stepped = before
            return None
        return index

    def _of_value(self, timestep: Tensor | float | None, value: float) -> list[int]:
        """Return the entries whose timestep equals `value`, in the precision of `timestep`. If it fits in several
        units, the unit stays unknown."""
        coarse = _is_coarse(timestep)
        if not coarse and value in self._exact:  # the usual case, in every call: no scan
            return self._exact[value]
        precision = torch.finfo(timestep.dtype).eps if coarse else 1e-6  # type: ignore[union-attr]
        units = dict.fromkeys(tuple(unit(t, self._total) for t in self.times) for unit in _UNITS)
        found: dict[Sequence[float], list[int]] = {}
        for unit in units if self._unit is None else (self._unit,):
            fitting = [i for i, t in enumerate(unit) if abs(t - value) <= precision * max(abs(t), 1.0)]
            nearest = min((abs(unit[i] - value) for i in fitting), default=0.0)
            if coarse:
                found[unit] = self._rounded_to(value, timestep.dtype, fitting)  # type: ignore[union-attr]
            else:
                found[unit] = [i for i in fitting if abs(unit[i] - value) == nearest]
        matched = [unit for unit, fitting in found.items() if fitting]
        if len(matched) == 1:
            self._use(matched[0])
        return sorted({i for fitting in found.values() for i in fitting})

    def _use(self, unit: Sequence[float]) -> None:
        """Set the unit in which the model is given the timesteps."""
        if self._unit is None:
            self._unit = unit
            for entry, time in enumerate(unit):
                self._exact.setdefault(time, []).append(entry)


def _is_coarse(timestep: Any) -> bool:
    """Return whether different timesteps may be rounded to one number."""
    return isinstance(timestep, Tensor) and timestep.is_floating_point() and timestep.dtype.itemsize < 4


def _times(timesteps: Any) -> tuple[float, ...]:
    """Return timesteps as numbers."""
    return tuple(float(t) for t in torch.as_tensor(timesteps).tolist())


def _ranks(times: Sequence[float]) -> list[int]:
    ranks = [0]
    for before, now in pairwise(times):
        ranks.append(ranks[-1] + (now != before))
    return ranks if times else []


def _place_in(schedule: Tensor, timestep: Tensor) -> int | None:
    """Return the entry of `schedule` that `timestep` is a (possibly expanded) view of, without a device read."""
    if schedule.ndim != 1 or not address(schedule):
        return None
    entry, rest = divmod(address(timestep) - address(schedule), (schedule.stride(0) or 1) * schedule.itemsize)
    if rest or not 0 <= entry < len(schedule):  # most timesteps of a call are in memory of their own
        return None
    if timestep.numel() == 0 or timestep.dtype != schedule.dtype or timestep.device != schedule.device:
        return None
    expanded = not any(stride and size > 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True))
    return entry if expanded else None


def numbers(timestep: Tensor, schedule: Schedule | None = None) -> list[float] | None:
    """Return the values of a timestep, or None if reading them would synchronise with a device."""
    place = None if schedule is None else schedule.place(timestep)
    if schedule is not None and place is not None:
        return [schedule.times[place]] * timestep.numel()
    return _elements(timestep) if timestep.is_cpu else None


def _elements(tensor: Tensor) -> list[float]:
    """Return the elements of a tensor. A vector is read without an op, because each call reads its timestep."""
    found: list[float] = tensor.tolist() if tensor.ndim == 1 else tensor.flatten().tolist()
    return found


class OnHost(NamedTuple):
    """A timestep on the host. value: None if reading it would synchronise with a device. For a timestep per frame or
    token it is the mean if these are at different steps (``uneven``), and the largest one otherwise. ``numbers``: its
    elements."""

    value: float | None
    uneven: bool = False
    numbers: list[float] | None = None


def on_host(timestep: Any) -> OnHost:
    """Read a timestep, unless that would synchronise with a device. Zeros mark clean frames, which have no step."""
    if isinstance(timestep, (int, float)):
        return OnHost(float(timestep))
    if not isinstance(timestep, Tensor) or not timestep.is_cpu or timestep.numel() == 0:
        return OnHost(None)
    if not any(timestep.stride()):  # one number, perhaps expanded
        value = timestep.item() if timestep.ndim == 0 else timestep[(0,) * timestep.ndim].item()
        return OnHost(value, numbers=[value] * timestep.numel())
    numbers = _elements(timestep)
    uneven = len(set(filter(None, numbers))) > 1
    return OnHost(float(sum(numbers) / len(numbers) if uneven else max(numbers)), uneven, numbers)
