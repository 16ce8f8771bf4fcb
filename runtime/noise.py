"""What a scheduler says of the noise at each step: its sigma, and the signal-to-noise ratio (SNR).

A latent x = a x0 + s noise has the SNR a^2 / s^2. A scheduler is known by what it carries, never by its class; of
`timesteps` it must have one entry for each call of the denoiser. What is read of it:

- flow matching, x = (1 - sigma) x0 + sigma noise: SNR = ((1 - sigma) / sigma)^2. Its config says `use_flow_sigmas`,
  or it has `sigmas`, but neither `alphas_cumprod` nor `sigma_data` in its config. That is no proof yet: all sigmas must
  lie in [0, 1] and never rise, and the timesteps must be sigma or 1 - sigma, times `num_train_timesteps` (times 1 where
  the config has a `shift` and no such number). With `invert_sigmas` (Mochi) `sigmas` holds the share of the signal.
- sigma-parameterised, x proportional to x0 + sigma noise: SNR = 1 / sigma^2. It has `sigmas`, one more than timesteps,
  and either `alphas_cumprod` (Euler, Heun, DPM-Solver, UniPC: there sigma = sqrt((1 - abar) / abar), whatever the scale
  of x) or `sigma_data` in its config (EDM). The sigmas decide, not the timesteps: the solver carries x at sigmas[i],
  while the timestep told to the model may be rounded (Karras sigmas). Entries of equal sigma must have equal timesteps,
  as Heun's pairs have; where they differ, the second call is at a noise that the scheduler does not list.
- variance preserving, x = sqrt(abar) x0 + sqrt(1 - abar) noise: SNR = abar / (1 - abar), abar being `alphas_cumprod` at
  the timestep. It has no `sigmas`, and its timesteps are whole, lie in the table and never rise (a sampler that
  inverts, or jumps back, holds another noise than its timestep says).

Whatever else there is cannot be told, and gives None: only proof permits reuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-6  # by how much a sigma in float32 may leave [0, 1]
SLACK = 1e-3  # of the whole time: by how much a timestep may differ from its sigma; some are cut to whole numbers


@dataclass(frozen=True)
class NoiseLevels:
    """The noise at each entry of the scheduler's timesteps.

    sigmas: noise over signal, sqrt(1 / SNR); of flow matching the share of noise, from 1 to 0. snrs: from 0 to inf.
    """

    sigmas: tuple[float, ...]
    snrs: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.snrs)

    def at(self, entry: int) -> tuple[float | None, float | None]:
        """Sigma and SNR at an entry; None, None outside the schedule."""
        return (self.sigmas[entry], self.snrs[entry]) if 0 <= entry < len(self) else (None, None)


def noise_levels(scheduler: Any) -> NoiseLevels | None:
    """The noise levels of a scheduler whose timesteps are set; None where they cannot be told.

    Reads each device that the schedule lies on once (diffusers keeps most of it on the CPU). To be called at the first
    call of each trajectory: what the scheduler says changes with `set_timesteps`.
    """
    given = {name: getattr(scheduler, name, None) for name in ("timesteps", "sigmas", "alphas_cumprod")}
    vectors = {name: _vector(value) for name, value in given.items() if value is not None}
    found = {name: vector for name, vector in vectors.items() if vector is not None}
    if "timesteps" not in found or len(found) < len(vectors):
        return None
    values = _read(found)
    timesteps, sigmas, table = values["timesteps"], values.get("sigmas"), values.get("alphas_cumprod")
    if sigmas is None:
        return None if table is None else _variance_preserving(timesteps, table)
    if setting(scheduler, "use_flow_sigmas") or (table is None and setting(scheduler, "sigma_data") is None):
        return _flow_matching(scheduler, timesteps, sigmas)
    return _sigma_parameterised(scheduler, timesteps, sigmas)


def _flow_matching(scheduler: Any, timesteps: Sequence[float], sigmas: Sequence[float]) -> NoiseLevels | None:
    """Levels by the share of noise, proven by the timesteps, which are that share (or the signal's) in other units."""
    unit = setting(scheduler, "num_train_timesteps")
    unit = 1 if unit is None and setting(scheduler, "shift") is not None else unit
    if not isinstance(unit, int | float) or len(sigmas) - len(timesteps) not in (0, 1):
        return None
    inverted = bool(setting(scheduler, "invert_sigmas"))
    shares = [1 - sigma if inverted else sigma for sigma in sigmas[: len(timesteps)]]
    by_noise = [abs(t / unit - share) <= SLACK for t, share in zip(timesteps, shares, strict=True)]
    by_signal = [abs(t / unit - (1 - share)) <= SLACK for t, share in zip(timesteps, shares, strict=True)]
    if not (_in_unit_interval(shares) and _never_rises(shares) and (all(by_noise) or all(by_signal))):
        return None
    return NoiseLevels(tuple(shares), tuple(_squared_ratio(1 - share, share) for share in shares))


def _sigma_parameterised(scheduler: Any, timesteps: Sequence[float], sigmas: Sequence[float]) -> NoiseLevels | None:
    """Levels by noise over signal."""
    if len(sigmas) != len(timesteps) + 1 or setting(scheduler, "prediction_type") == "flow_prediction":
        return None
    held = sigmas[:-1]
    pairs = zip(pairwise(held), pairwise(timesteps), strict=True)
    if not all(sigma >= 0 for sigma in held) or any(s == s1 and t != t1 for (s, s1), (t, t1) in pairs):
        return None
    return NoiseLevels(tuple(held), tuple(_squared_ratio(1.0, sigma) for sigma in held))


def _variance_preserving(timesteps: Sequence[float], table: Sequence[float]) -> NoiseLevels | None:
    """Levels by the table of abar (the share of the signal's variance), indexed by the timestep."""
    if not (_never_rises(timesteps) and all(t.is_integer() and 0 <= t < len(table) for t in timesteps)):
        return None
    shares = [table[int(t)] for t in timesteps]
    if not _in_unit_interval(shares):
        return None
    sigmas = tuple(math.sqrt(max(_ratio(1 - abar, abar), 0.0)) for abar in shares)
    return NoiseLevels(sigmas, tuple(max(_ratio(abar, 1 - abar), 0.0) for abar in shares))


def _vector(value: Any) -> Tensor | None:
    """A list, array or tensor of numbers as a tensor of one dimension; None where it is none."""
    try:
        vector = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return vector.detach() if vector.ndim == 1 and len(vector) and not vector.is_complex() else None


def _read(vectors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The vectors' numbers, by one read of each device."""
    values: dict[str, list[float]] = {}
    for device in {vector.device for vector in vectors.values()}:
        here = {name: vector for name, vector in vectors.items() if vector.device == device}
        numbers = iter(torch.cat(list(here.values())).tolist())
        values |= {name: [float(next(numbers)) for _ in range(len(vector))] for name, vector in here.items()}
    return values


def setting(scheduler: Any, name: str) -> Any:
    """A setting of the scheduler's config (a mapping or an object); None where there is none."""
    config = getattr(scheduler, "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _in_unit_interval(values: Sequence[float]) -> bool:
    return all(-ROUNDING <= value <= 1 + ROUNDING for value in values)


def _never_rises(values: Sequence[float]) -> bool:
    return all(a >= b for a, b in pairwise(values))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf


def _squared_ratio(a: float, b: float) -> float:
    ratio = _ratio(a, b)
    return ratio * ratio  # `**` raises where a product is inf
