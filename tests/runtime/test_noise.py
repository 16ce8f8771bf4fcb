"""The noise at each step, against formulas from the definitions and against the latent of an ideal denoiser.

An ideal denoiser knows the image and the noise, so its latent stays a x0 + s noise, in the plane spanned by x0 and the
noise. The coefficients a and s are measured at each call, independently of the scheduler's attributes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from dit_rewrite.runtime.noise import NoiseLevels, noise_levels

X0, NOISE = (torch.tensor(v, dtype=torch.float64).view(1, 1, 2, 1) for v in ([1.0, 0.0], [0.0, 1.0]))
MU = 0.8
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
TABLE = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0).double().numpy()  # abar, as DDPM defines it
SIGMAS = np.sqrt((1 - TABLE) / TABLE)
ENDS = SIGMAS[0], SIGMAS[-1]


def preserving(timesteps: Sequence[int]) -> list[float]:
    """Return the SNR of x = sqrt(abar) x0 + sqrt(1 - abar) noise."""
    return [TABLE[t] / (1 - TABLE[t]) for t in timesteps]


def exploding(sigmas: np.ndarray) -> list[float]:
    """Return the SNR of x = x0 + sigma noise."""
    return [1 / s**2 for s in sigmas]


def flowing(sigmas: np.ndarray) -> list[float]:
    """Return the SNR of x = (1 - sigma) x0 + sigma noise."""
    return [((1 - s) / s) ** 2 for s in sigmas]


def leading(n: int) -> list[int]:
    return [i * (1000 // n) for i in reversed(range(n))]


def linspace(n: int) -> np.ndarray:
    """Return n rounded times from 999 down, without 0."""
    return np.linspace(999, 0, n + 1)[:-1].round().astype(int)


def karras(n: int, low: float, high: float) -> np.ndarray:
    """Karras et al., equation 5, with rho = 7."""
    ramp = np.linspace(0, 1, n)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def euler(n: int) -> np.ndarray:
    """Return sigma interpolated at n times from 999 to 0."""
    return np.interp(np.linspace(999, 0, n), np.arange(1000), SIGMAS)


def shares(n: int) -> np.ndarray:
    return np.linspace(1, 1 / 1000, n)


def shifted(s: Any, shift: float) -> Any:
    return shift * s / (1 + (shift - 1) * s)


def twice_shifted(n: int) -> np.ndarray:
    """diffusers shifts the ends of its range on construction, and then all sigmas between them again."""
    return shifted(np.linspace(1, shifted(1 / 1000, 3.0), n), 3.0)


def dynamic(n: int) -> list[float]:
    """Return FLUX's sigmas, shifted by the exponential of mu."""
    return flowing(math.exp(MU) / (math.exp(MU) + 1 / shares(n) - 1))


def minimax(n: int) -> list[float]:
    """There is one call fewer than requested, because the end counts as a step."""
    return flowing(shifted(np.linspace(1, 0, n), 3.0)[:-1])


def twice(values: Sequence[float]) -> list[float]:
    """Heun calls the denoiser twice at each noise level except the first."""
    return [values[0], *np.repeat(values[1:], 2)]


def prk(n: int) -> list[float]:
    """Each of PNDM's three Runge-Kutta steps calls at its start, twice at its middle, and at its end."""
    times, half = leading(n), 1000 // n // 2
    head = [t for i in range(3) for t in (times[i], times[i + 1] + half, times[i + 1] + half, times[i + 1])]
    return preserving([*head, *times[3:]])


def plms(n: int) -> list[float]:
    """PNDM without Runge-Kutta steps calls twice at its second time."""
    return preserving([*leading(n)[:2], *leading(n)[1:]])


@dataclass(frozen=True)
class Case:
    """A scheduler, the SNR of its n steps, the arguments of `set_timesteps`, and the output of an ideal denoiser."""

    name: str
    scheduler: Callable[[], Any]
    snrs: Callable[[int], Sequence[float]]
    output: Tensor | None = None  # None if steps add noise outside the plane
    setting: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return self.name


def made(name: str, **config: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**config)


FLOW = "FlowMatchEulerDiscreteScheduler"
DPM = "DPMSolverMultistepScheduler"
DPM_FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
DPM_KARRAS = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
TO_NOISE, TO_X0 = NOISE - X0, X0 - NOISE
CASES = [
    Case("DDPM", made("DDPMScheduler", **BETAS), lambda n: preserving(leading(n))),
    Case("DDIM", made("DDIMScheduler", **BETAS, clip_sample=False), lambda n: preserving(leading(n)), NOISE),
    Case("PNDM", made("PNDMScheduler", **BETAS), prk, NOISE),
    Case("PLMS", made("PNDMScheduler", **BETAS, skip_prk_steps=True), plms, NOISE),
    Case("DPM-Solver", made(DPM, **BETAS), lambda n: preserving(linspace(n)), NOISE),
    Case("DPM-Solver++ Karras", made(DPM, **BETAS, **DPM_KARRAS), lambda n: exploding(karras(n, *ENDS)), NOISE),
    Case("UniPC", made("UniPCMultistepScheduler", **BETAS), lambda n: preserving(linspace(n)), NOISE),
    Case("DEIS", made("DEISMultistepScheduler", **BETAS), lambda n: preserving(linspace(n)), NOISE),
    Case("Euler", made("EulerDiscreteScheduler", **BETAS), lambda n: exploding(euler(n)), NOISE),
    Case("Euler ancestral", made("EulerAncestralDiscreteScheduler", **BETAS), lambda n: exploding(euler(n))),
    Case("Heun", made("HeunDiscreteScheduler", **BETAS), lambda n: twice(exploding(euler(n))), NOISE),
    Case("EDM", made("EDMEulerScheduler", sigma_min=0.01, sigma_max=9), lambda n: exploding(karras(n, 0.01, 9))),
    Case("flow", made(FLOW), lambda n: flowing(shares(n)), TO_NOISE),
    Case("flow, fixed shift", made(FLOW, shift=3.0), lambda n: flowing(twice_shifted(n)), TO_NOISE),
    Case("flow, dynamic shift", made(FLOW, use_dynamic_shifting=True), dynamic, TO_NOISE, (("mu", MU),)),
    Case("flow, inverted sigmas", made(FLOW, invert_sigmas=True), lambda n: flowing(shares(n)), TO_X0),
    Case("flow, Heun", made("FlowMatchHeunDiscreteScheduler"), lambda n: twice(flowing(shares(n))), TO_NOISE),
    Case(
        "flow, DPM-Solver", made(DPM, **DPM_FLOW), lambda n: flowing(shifted(shares(n + 1)[:-1] - 1e-3, 3.0)), TO_NOISE
    ),
    Case("flow, time of the signal", made("MiniMaxH3Scheduler", shift=3.0), minimax, TO_X0),
    Case("flow, Euler ancestral", made("LTXEulerAncestralRFScheduler"), lambda n: flowing(shares(n))),
]


def levels_of(scheduler: Any) -> NoiseLevels:
    levels = noise_levels(scheduler)
    assert levels is not None
    return levels


def start(flow: bool, snr: float) -> Tensor:
    """Return the latent of a signal-to-noise ratio in the scheduler's parameterisation."""
    a = math.sqrt(snr)
    return (a * X0 + NOISE) / (1 + a if flow else math.sqrt(1 + snr))


def walk(scheduler: Any, output: Tensor, latent: Tensor) -> list[float]:
    """Return the SNR of the latent at each call of an ideal denoiser."""
    measured = []
    for t in scheduler.timesteps:
        signal, noise = latent.flatten().tolist()
        measured.append((signal / noise) ** 2)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(latent, t)
        latent = scheduler.step(output, t, latent).prev_sample
    return measured


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula(case: Case) -> None:
    """The SNR of each step follows the definition, also after the timesteps are set again."""
    scheduler = case.scheduler()
    for n in (7, 12, 5):
        scheduler.set_timesteps(n, **dict(case.setting))
        levels = levels_of(scheduler)
        assert len(levels) == len(scheduler.timesteps)
        assert levels.snrs == pytest.approx(case.snrs(n), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sigma(case: Case) -> None:
    """Sigma is the share of noise if noise and signal are mixed linearly, and noise over signal otherwise."""
    scheduler = case.scheduler()
    scheduler.set_timesteps(7, **dict(case.setting))
    levels = levels_of(scheduler)
    sigmas = [1 / (1 + math.sqrt(s)) if "flow" in case.name else 1 / math.sqrt(s) for s in case.snrs(7)]
    assert levels.sigmas == pytest.approx(sigmas, rel=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case.output is not None], ids=str)
def test_latent(case: Case) -> None:
    """The SNR of each step is that of the latent that the scheduler passes to an ideal denoiser."""
    scheduler = case.scheduler()
    for n in (10, 5):  # PNDM rounds the middle of an odd interval in two ways
        scheduler.set_timesteps(n, **dict(case.setting))
        latent = start("flow" in case.name, case.snrs(n)[0])
        if case.name in ("Euler", "Heun"):  # their latent is x0 + sigma noise
            latent = latent / latent.flatten()[0]
        measured = walk(copy.deepcopy(scheduler), case.output, latent)
        assert levels_of(scheduler).snrs == pytest.approx(measured, rel=5e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "EDMEulerScheduler"])
def test_added_noise(name: str) -> None:
    """The SNR matches the scheduler's forward process `add_noise`."""
    scheduler = made(name)()
    scheduler.set_timesteps(9)
    for t, snr in zip(scheduler.timesteps, levels_of(scheduler).snrs, strict=True):
        signal, noise = scheduler.add_noise(X0, NOISE, t[None]).flatten().tolist()
        assert snr == pytest.approx((signal / noise) ** 2, rel=1e-3)


def test_scaled_noise() -> None:
    """The SNR matches the forward process `scale_noise` of a flow matching scheduler."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(9)
    for t, snr in zip(scheduler.timesteps, levels_of(scheduler).snrs, strict=True):
        signal, noise = scheduler.scale_noise(X0, t[None], NOISE).flatten().tolist()
        assert snr == pytest.approx((signal / noise) ** 2, rel=1e-6)


def test_inverted_sigmas() -> None:
    """Mochi's timesteps increase while its noise decreases."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == sorted(scheduler.timesteps.tolist())
    snrs = levels_of(scheduler).snrs
    assert snrs[0] == 0 and list(snrs) == sorted(snrs)


def test_zero_terminal_snr() -> None:
    """Pure noise at the first step has SNR 0; sigma is infinite, or 1 if it is a share."""
    ddim = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ddim.set_timesteps(4)
    levels = levels_of(ddim)
    assert (levels.sigmas[0], levels.snrs[0]) == (math.inf, 0.0) and 0 < levels.snrs[1] < levels.snrs[2]
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    assert levels_of(flow).at(0) == (1.0, 0.0)
    euler_zero = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    euler_zero.set_timesteps(4)
    assert levels_of(euler_zero).snrs[0] == pytest.approx(2.0**-24, rel=1e-3)  # diffusers uses 2^-24 instead of 0


def test_no_noise() -> None:
    """A call without noise has an infinite SNR."""
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    assert levels_of(scheduler) == NoiseLevels((1.0, 0.5, 0.0), (0.0, 1.0, math.inf))
    exact = SimpleNamespace(timesteps=[2, 1], sigmas=[2.0, 0.0, 0.0], config={"sigma_data": 0.5})
    assert noise_levels(exact) == NoiseLevels((2.0, 0.0), (0.25, math.inf))
    clean = SimpleNamespace(timesteps=[1, 0], alphas_cumprod=[1.0, 0.5])
    assert noise_levels(clean) == NoiseLevels((1.0, 0.0), (1.0, math.inf))


def test_at() -> None:
    """An entry outside the schedule has no noise level."""
    levels = NoiseLevels((2.0, 1.0), (0.25, 1.0))
    assert levels.at(1) == (1.0, 1.0)
    assert levels.at(2) == levels.at(-1) == (None, None)


def set_to(n: int, name: str, *, using: dict[str, Any] | None = None, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        scheduler = made(name, **config)()
        scheduler.set_timesteps(n, **(using or {}))
        return scheduler

    return build


UNTOLD: dict[str, Callable[[], Any]] = {
    "no scheduler": object,
    "nothing set": lambda: diffusers.PNDMScheduler(),
    "timesteps alone": lambda: SimpleNamespace(timesteps=torch.arange(4)),
    "sigmas that are no numbers": lambda: SimpleNamespace(timesteps=[1], sigmas=["a"], alphas_cumprod=[0.9, 0.5]),
    "before set_timesteps": lambda: diffusers.DPMSolverMultistepScheduler(),
    "a denoiser call between two sigmas": set_to(5, "KDPM2DiscreteScheduler"),
    "the same, with as many sigmas": lambda: SimpleNamespace(
        timesteps=[9, 7, 6, 4, 3], sigmas=[4.0, 2.0, 2.0, 1.0, 1.0, 0.0], alphas_cumprod=[0.5] * 10, config={}
    ),
    "predictor and corrector": set_to(5, "ScoreSdeVeScheduler"),
    "inversion": set_to(5, "DDIMInverseScheduler"),
    "jumps back": set_to(50, "RePaintScheduler"),
    "no table": set_to(5, "IPNDMScheduler"),
    "no table, cosine": set_to(5, "DDPMWuerstchenScheduler"),
    "trigonometric flow": set_to(2, "SCMScheduler"),
    "flow predicted, not flow sigmas": set_to(5, DPM, prediction_type="flow_prediction"),
    "flow sigmas above 1": set_to(5, DPM, **DPM_FLOW, use_karras_sigmas=True),
    "sigmas of a stage": set_to(5, "HeliosScheduler", using={"stage_index": 1}),
    "other timesteps than sigmas": set_to(3, FLOW, using={"timesteps": [900, 500, 100], "sigmas": [0.6, 0.4, 0.2]}),
    "rising share of noise": lambda: SimpleNamespace(
        timesteps=[100.0, 500.0], sigmas=[0.1, 0.5], config={"num_train_timesteps": 1000}
    ),
    "time that is sigma": lambda: SimpleNamespace(timesteps=[0.9, 0.5], sigmas=[0.9, 0.5, 0.0], config={}),
    "timesteps between whole ones": lambda: SimpleNamespace(timesteps=[1.5, 0.5], alphas_cumprod=[0.9, 0.5, 0.1]),
    "timesteps beyond the table": lambda: SimpleNamespace(timesteps=[3, 1], alphas_cumprod=[0.9, 0.5, 0.1]),
    "a table that is none": lambda: SimpleNamespace(timesteps=[1, 0], alphas_cumprod=[0.9, float("nan")]),
}


@pytest.mark.parametrize("reason", UNTOLD)
def test_unknown_noise(reason: str) -> None:
    """`noise_levels` returns None if the noise is unknown."""
    assert noise_levels(UNTOLD[reason]()) is None


def test_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors on one device are read at once, because each read synchronises with the device."""
    reads = []
    tolist, item = Tensor.tolist, Tensor.item
    scheduler = made("EulerDiscreteScheduler")()
    scheduler.set_timesteps(6)
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(len(self)) or tolist(self))
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append(1) or item(self))
    assert noise_levels(scheduler) is not None
    assert reads == [6 + 7 + 1000]  # timesteps, sigmas, abar
