"""The noise of a scheduler at each step: its sigma and its signal-to-noise ratio (SNR).

A latent x = a x0 + s noise has the SNR a^2 / s^2. The kind of a scheduler is determined by its attributes, never by its
class. Its `timesteps` must have one entry for each call of the denoiser. Three kinds are supported:

- Flow matching, x = (1 - sigma) x0 + sigma noise: SNR = ((1 - sigma) / sigma)^2. The config sets `use_flow_sigmas`, or
  the scheduler has `sigmas`, and neither `alphas_cumprod` nor `sigma_data` in its config. In addition, all sigmas must
  lie in [0, 1] and never increase, and the timesteps must be sigma or 1 - sigma, times `num_train_timesteps` (times 1
  if the config has a `shift` but no such number). With `invert_sigmas` (Mochi), `sigmas` holds the share of the signal.
- Sigma-parameterised, x proportional to x0 + sigma noise: SNR = 1 / sigma^2. The scheduler has one more `sigmas` than
  timesteps, and either `alphas_cumprod` (Euler, Heun, DPM-Solver, UniPC: sigma = sqrt((1 - abar) / abar) for any scale
  of x) or `sigma_data` in its config (EDM). The sigmas are used rather than the timesteps, because x is at sigmas[i]
  while the timestep passed to the model may be rounded (Karras sigmas). Entries of equal sigma must have equal
  timesteps, as for Heun; if they differ, the second call is at a noise that the scheduler does not list.
- Variance preserving, x = sqrt(abar) x0 + sqrt(1 - abar) noise: SNR = abar / (1 - abar), where abar is `alphas_cumprod`
  at the timestep. The scheduler has no `sigmas`, and its timesteps are integers in the table that never increase (if a
  sampler inverts or jumps back, its noise differs from that of the timestep).

For any other scheduler the noise is unknown, and None is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-6  # a float32 sigma may lie outside [0, 1] by this much
SLACK = 1e-3  # a timestep may differ from its sigma by this fraction, as some are truncated to integers


@dataclass(frozen=True)
class NoiseLevels:
    """The noise at each entry of the scheduler's timesteps.

    sigmas: noise over signal, sqrt(1 / SNR); for flow matching the share of noise, from 1 to 0. snrs: from 0 to inf.
    """

    sigmas: tuple[float, ...]
    snrs: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.snrs)

    def at(self, entry: int) -> tuple[float | None, float | None]:
        """Return sigma and SNR at an entry, or (None, None) outside the schedule."""
        return (self.sigmas[entry], self.snrs[entry]) if 0 <= entry < len(self) else (None, None)


def noise_levels(scheduler: Any) -> NoiseLevels | None:
    """Return the noise levels of a scheduler whose timesteps are set, or None if they are unknown.

    Reads each device that holds part of the schedule once (diffusers keeps most of it on the CPU). Call it at the first
    call of each trajectory, because `set_timesteps` changes the levels.
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
    """Return the levels of flow matching, or None if the timesteps are not proportional to the noise or the signal."""
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
    """Return the levels of a sigma-parameterised scheduler, or None if its sigmas and timesteps do not match."""
    if len(sigmas) != len(timesteps) + 1 or setting(scheduler, "prediction_type") == "flow_prediction":
        return None
    levels = sigmas[:-1]
    pairs = zip(pairwise(levels), pairwise(timesteps), strict=True)
    if not all(sigma >= 0 for sigma in levels) or any(s == s1 and t != t1 for (s, s1), (t, t1) in pairs):
        return None
    return NoiseLevels(tuple(levels), tuple(_squared_ratio(1.0, sigma) for sigma in levels))


def _variance_preserving(timesteps: Sequence[float], table: Sequence[float]) -> NoiseLevels | None:
    """Return the levels from the table of abar (the signal's share of the variance) by timestep, or None."""
    if not (_never_rises(timesteps) and all(t.is_integer() and 0 <= t < len(table) for t in timesteps)):
        return None
    shares = [table[int(t)] for t in timesteps]
    if not _in_unit_interval(shares):
        return None
    sigmas = tuple(math.sqrt(max(_ratio(1 - abar, abar), 0.0)) for abar in shares)
    return NoiseLevels(sigmas, tuple(max(_ratio(abar, 1 - abar), 0.0) for abar in shares))


def _vector(value: Any) -> Tensor | None:
    """Convert a list, array or tensor to a non-empty real 1-d tensor, or return None."""
    try:
        vector = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return vector.detach() if vector.ndim == 1 and len(vector) and not vector.is_complex() else None


def _read(vectors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return the numbers of the vectors, with one read per device."""
    values: dict[str, list[float]] = {}
    for device in {vector.device for vector in vectors.values()}:
        here = {name: vector for name, vector in vectors.items() if vector.device == device}
        numbers = iter(torch.cat(list(here.values())).tolist())
        values |= {name: [float(next(numbers)) for _ in range(len(vector))] for name, vector in here.items()}
    return values


def setting(scheduler: Any, name: str) -> Any:
    """Return a setting of the scheduler's config (a mapping or an object), or None if it is not set."""
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
    return ratio * ratio  # `**` raises OverflowError instead of returning inf
